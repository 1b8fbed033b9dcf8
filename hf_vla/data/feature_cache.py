"""Stored outputs of frozen backbones: pooled view tokens of every observation, text states of every instruction.

A cache is a folder of shards (`feature_store.py`) with a `cache.json` that says what made it: weights, layer, pooling,
pictures, preprocessing, precision, frames. The folder's name is a digest of that. A cache is used only if all of it is the
same, and if only others are there, the error names what differs: training from another backbone's features would look
like training.

Letters: N samples of the whole dataset, K augmented copies, V views, g grid side, C VGGT width, L text tokens, D LLaMA
width.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from hf_vla.data.feature_store import FeatureStore
from hf_vla.data.windows import WindowDataset
from hf_vla.sample import Draw, Sample

MANIFEST = "cache.json"
"""Written last: a folder without it isn't a whole cache."""
ROWS = "rows.npy"
"""(N, 1 + K) int64: the store's row of each sample, as it is and in each of its augmented copies."""
FORMAT = 1
NAMED = 3
"""Differences of one kind that an error names."""

Key = dict[str, Any]
"""What makes a cache's content, by name; values are plain, or a dict of digests (of files, of instructions)."""


class Found(NamedTuple):
    """A cache that is whole and fits."""

    folder: Path
    manifest: dict[str, Any]


def folder_name(kind: str, key: Key) -> str:
    """Name a cache's folder by the backbone and a digest of all that makes its content."""
    digest = hashlib.sha256(json.dumps([FORMAT, key], sort_keys=True).encode()).hexdigest()
    return f"{kind}-{digest[:12]}"


def find_cache(root: Path, kind: str, key: Key) -> Found | None:
    """Find the cache of a backbone that was made of just this.

    Args:
        root: folder that holds caches.
        kind: `vggt` or `lang_encoder`.
        key: what its content must have been made of.

    Returns:
        The cache; None if there is none of this backbone.

    Raises:
        ValueError: if there are only caches made of something else; names what differs from the nearest.
    """
    others = [Found(path.parent, read_manifest(path)) for path in sorted(root.glob(f"{kind}-*/{MANIFEST}"))]
    for found in others:
        if found.manifest["key"] == key and found.manifest["format"] == FORMAT:
            return found
    if not others:
        return None
    nearest = min(others, key=lambda found: len(differences(found.manifest["key"], key)))
    raise ValueError(
        f"{nearest.folder}: this cache is of something else than this recipe asks for, and isn't used: "
        f"{'; '.join(differences(nearest.manifest['key'], key)) or 'its format is another version'}. Build the right one "
        f"with `hf-vla cache RECIPE`, undo the change, name another memory.cache_dir, or take {kind!r} out of memory.cache."
    )


def read_manifest(path: Path) -> dict[str, Any]:
    """Read a cache's `cache.json`.

    Raises:
        ValueError: if it can't be read.
    """
    try:
        manifest = json.loads(path.read_text())
        return {"format": manifest["format"], "key": manifest["key"], **manifest}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: no manifest of a feature cache ({error}). Delete its folder and build it again."
        ) from None


def differences(there: Key, here: Key) -> list[str]:
    """Say in words in what two keys differ; the cache's comes first."""
    names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    return [_difference(name, there.get(name), here.get(name)) for name in names]


def _difference(name: str, there: Any, here: Any) -> str:
    if not (isinstance(there, dict) and isinstance(here, dict)):
        return f"{name} is {_shown(there)} there and {_shown(here)} here"
    changed = [part for part in {**there, **here} if there.get(part) != here.get(part)]
    named = [f"{part} {_change(there, here, part)}" for part in changed[:NAMED]]
    more = f" and {len(changed) - NAMED} more" if len(changed) > NAMED else ""
    return f"{name}: {', '.join(named)}{more}"


def _change(there: dict, here: dict, part: str) -> str:
    if part in there and part in here:
        return "has changed"
    return "is new" if part in here else "is gone"


def _shown(value: Any) -> str:
    return "not there" if value is None else json.dumps(value)


class ViewCache:
    """Pooled view tokens of every sample of a dataset.

    Args:
        found: the cache.

    Raises:
        ValueError: naming a shard that is missing or cut short.
    """

    def __init__(self, found: Found):
        manifest = found.manifest
        self.folder = found.folder
        self.copies: int = manifest["copies"]
        self._store = FeatureStore(found.folder, manifest["shards"])
        self._rows = np.load(found.folder / ROWS)
        lengths = [length for _, length in manifest["episodes"]]
        starts = np.cumsum([0, *lengths]).tolist()
        self._starts = {index: start for (index, _), start in zip(manifest["episodes"], starts, strict=False)}

    def read(self, episode_index: int, frame: int, copy: int = 0) -> Tensor:
        """Read the features of one observation.

        Args:
            episode_index, frame: as the dataset counts them.
            copy: 0 for the pictures as they are, 1 to K for an augmented copy.

        Returns:
            (V, g², 2C).
        """
        return self._store[int(self._rows[self._starts[episode_index] + frame, copy])]


class TextCache:
    """Text states of every instruction of a dataset, each as long as its own prompt.

    Args:
        found: the cache.

    Raises:
        ValueError: naming a shard that is missing or cut short.
    """

    def __init__(self, found: Found):
        self.folder = found.folder
        self._store = FeatureStore(found.folder, found.manifest["shards"])
        self._spans: dict[str, list[int]] = found.manifest["texts"]

    def read(self, task: str) -> Tensor:
        """Read the states of one instruction, (L, D)."""
        return self._store.rows(*self._spans[task])


class CachedDataset(Dataset):
    """A dataset's samples with stored features in place of what they were computed from.

    Args:
        dataset: what gives states, actions and instructions; and pictures, where views aren't cached.
        views: view features; None leaves the pictures.
        texts: text features; None leaves the instruction to the tokenizer.
        augments: whether samples show one of the augmented copies, drawn anew each epoch.
        seed: of those draws; with epoch and index it decides each of them.
    """

    def __init__(
        self,
        dataset: WindowDataset,
        views: ViewCache | None,
        texts: TextCache | None,
        augments: bool = False,
        seed: int = 0,
    ):
        self.dataset, self.view_cache, self.text_cache = dataset, views, texts
        self.wants_epoch = augments or (views is None and getattr(dataset, "wants_epoch", False))
        self._augments, self._seed = augments, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, where: int | Draw) -> Sample:
        """Read a sample; a plain number is one of epoch 0."""
        if self.view_cache is None:
            sample = self.dataset[where]
        else:
            sample = self.dataset.without_pictures(where.index if isinstance(where, Draw) else where)
            features = self.view_cache.read(sample.episode_index, sample.frame_index, self._copy(where))
            sample = sample._replace(view_features=features)
        if self.text_cache is not None:
            sample = sample._replace(text_features=self.text_cache.read(sample.task))
        return sample

    def _copy(self, where: int | Draw) -> int:
        if not self._augments:
            return 0
        draw = where if isinstance(where, Draw) else Draw(where, 0)
        generator = np.random.default_rng((self._seed, draw.epoch, draw.index))
        return int(generator.integers(1, self.view_cache.copies, endpoint=True))

    @property
    def info(self):
        """The dataset's DatasetInfo."""
        return self.dataset.info

    @property
    def tasks(self) -> list[str]:
        """The instruction of every sample."""
        return self.dataset.tasks


def pad_texts(states: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Pad text states of different lengths on the right, as their prompts would have been.

    Returns:
        (B, L, D), and the attention mask (B, L) int64.
    """
    padded = torch.nn.utils.rnn.pad_sequence(states, batch_first=True)
    lengths = torch.tensor([len(state) for state in states])
    return padded, (torch.arange(padded.shape[1]) < lengths[:, None]).long()
