"""RLDS datasets as TensorFlow Datasets stores them: a folder with `features.json`, `dataset_info.json` and TFRecord files.

One record is one episode; what `features.json` calls `steps/observation/state` is flattened over the episode's N steps.

Source: tensorflow_datasets/core/features; checked against BridgeData V2 files. Letters: N steps of an episode.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hf_vla.convert.episode import Column, RawEpisode, Shard
from hf_vla.convert.tfrecord import Value, parse_example, read_records

_STEPS = "steps/"


@dataclass(frozen=True)
class Feature:
    """One column: how a step of it looks."""

    shape: tuple[int, ...]
    is_bytes: bool
    """Whether a step is a byte string: a text, or an encoded picture."""
    description: str = ""
    """What the recorder said of it, if it is to be believed."""


class RLDSSource:
    """One split of an RLDS dataset.

    Args:
        folder: the folder that holds `features.json`, or one above it with a single such folder (`name/1.0.0`).
        split: such as `train`.

    Raises:
        FileNotFoundError: where that isn't an RLDS dataset, or the split has no file.
        ValueError: for metadata that can't be read.
    """

    def __init__(self, folder: Path, split: str = "train"):
        self.folder = _find(Path(folder))
        self.split = split
        self.features = read_features(self.folder / "features.json")
        self._lengths = _shard_lengths(self.folder / "dataset_info.json", split)

    def shards(self) -> list[Shard]:
        """List the TFRecord files of the split; a missing one is an error, not a smaller dataset.

        Raises:
            FileNotFoundError: where files of the split are missing.
        """
        files = sorted(self.folder.glob(f"*-{self.split}.tfrecord-*"))
        if not files:
            splits = sorted({f.name.split(".tfrecord")[0].split("-")[-1] for f in self.folder.glob("*.tfrecord-*")})
            raise FileNotFoundError(
                f"{self.folder}: no TFRecord file of split {self.split!r}; it has {', '.join(splits) or 'none'}."
            )
        numbers = {int(file.name.rsplit("tfrecord-", 1)[1].split("-of-")[0]) for file in files}
        count = int(files[0].name.rsplit("-of-", 1)[1])
        absent = sorted(set(range(count)) - numbers)
        if absent:
            raise FileNotFoundError(
                f"{files[0].parent}: {len(absent)} of {count} files are missing, first {absent[0]}."
            )
        lengths = self._lengths if len(self._lengths) == count else [None] * count
        return [Shard(file, length) for file, length in zip(files, lengths, strict=True)]

    def episodes(self, shard: Shard) -> Iterator[RawEpisode]:
        """Read the episodes of one file.

        Raises:
            ValueError: names the file and the record that is damaged, or the file that has too few.
        """
        number = -1
        for number, record in enumerate(read_records(shard.file)):
            try:
                yield read_episode(record, self.features, f"record {number}")
            except ValueError as error:
                raise ValueError(f"{shard.file}: record {number}: {error}") from None
        if shard.num_episodes is not None and number + 1 != shard.num_episodes:
            raise ValueError(
                f"{shard.file}: {number + 1} episodes, where dataset_info.json says {shard.num_episodes}: it is cut short."
            )


def read_features(file: Path) -> dict[str, Feature]:
    """Read what each step holds, by path without the leading `steps/`; what holds for an episode keeps its whole path.

    Raises:
        ValueError: for a file that can't be read.
    """
    try:
        return {path.removeprefix(_STEPS): feature for path, feature in _walk(json.loads(file.read_text()), "")}
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{file}: can't be read as the features of a TensorFlow dataset ({error!r}).") from None


def _walk(node: dict[str, Any], path: str) -> Iterator[tuple[str, Feature]]:
    if "featuresDict" in node:
        for name, inner in node["featuresDict"]["features"].items():
            yield from _walk(inner, f"{path}/{name}" if path else name)
    elif "sequence" in node:
        yield from _walk(node["sequence"]["feature"], path)
    else:
        kind = next((key for key in ("image", "text", "tensor", "scalar") if key in node), "tensor")
        shape = node.get(kind, {}).get("shape", {}).get("dimensions", [])
        encoded = kind == "tensor" and node["tensor"].get("encoding", "none") != "none"
        is_text = node.get(kind, {}).get("dtype") in ("string", "object")
        yield (
            path,
            Feature(
                tuple(int(size) for size in shape),
                kind in ("image", "text") or encoded or is_text,
                node.get("description", ""),
            ),
        )


def read_episode(record: bytes, features: dict[str, Feature], name: str) -> RawEpisode:
    """Read one record.

    Raises:
        ValueError: for a record that isn't an episode of these features.
    """
    values = parse_example(record)
    steps = {path: values[_STEPS + path] for path in features if _STEPS + path in values}
    whole = {path: values[path] for path in features if isinstance(values.get(path), list)}
    texts = {path: value[0].decode(errors="replace") for path, value in whole.items() if value}
    numbers = {p: values[p] for p in features if isinstance(values.get(p), np.ndarray)}
    return RawEpisode(name, tuple(steps), partial(_column, steps, features), texts, numbers)


def _column(steps: dict[str, Value], features: dict[str, Feature], path: str) -> Column:
    values, feature = steps[path], features[path]
    if isinstance(values, list):
        return values
    size = int(np.prod(feature.shape, dtype=int))
    if size < 1 or len(values) % size:
        raise ValueError(f"{path} has {len(values)} numbers, which aren't steps of the shape {feature.shape}")
    return values.reshape(-1, *feature.shape) if feature.shape else values[:, None]


def _find(folder: Path) -> Path:
    found = [folder] if (folder / "features.json").is_file() else [f.parent for f in folder.rglob("features.json")]
    if len(found) != 1:
        which = f"{len(found)} of them" if found else "none"
        raise FileNotFoundError(
            f"{folder}: expected one RLDS dataset (a folder with features.json and *.tfrecord-* files), found {which}"
            + (": " + ", ".join(sorted(str(f.relative_to(folder)) for f in found)) + "." if found else ".")
        )
    return found[0]


def _shard_lengths(file: Path, split: str) -> list[int]:
    """Give the number of episodes in each file of a split; empty where that isn't said."""
    if not file.is_file():
        return []
    try:
        splits = json.loads(file.read_text()).get("splits", [])
        return [int(n) for entry in splits if entry["name"] == split for n in entry.get("shardLengths", [])]
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{file}: can't be read ({error!r}).") from None
