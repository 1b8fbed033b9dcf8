"""Building a cache of view features: look at every pair, encode each different one once, and survive being stopped.

First every pair is looked at, undecoded, so that pairs of the same pictures are stored once and the size is known before
anything is encoded. Then shards are written, each whole or not at all; ranks deal them out among themselves. A build that
was killed, or ran into a full disk, goes on with the shards that are missing, with whatever number of ranks.

Letters: N samples, K augmented copies, V views, H W pixels, M pairs (N x (1 + K)), R rows (pairs that differ).
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hf_vla.data.feature_cache import FORMAT, MANIFEST, ROWS, Key, read_manifest
from hf_vla.data.feature_store import StoredShard, check_size, checksum, is_full, row_bytes, write_shard
from hf_vla.sample import Draw

SHARD_BYTES = 2**28
"""Of a shard, at most: small enough to hold in memory while it is made and to send about, large enough to be few."""
FIRSTS = "firsts.npy"
"""(R,) int64: the first pair that looks like each row; only while a cache is built."""
DIGEST_BYTES = 16

logger = logging.getLogger(__name__)


class Pairs(Dataset):
    """What VGGT is shown of every sample: its pictures as they are, then K augmented copies of them.

    Args:
        dataset: the whole dataset's samples.
        prepare: B lists of V pictures to pixels (B, V, 3, H, W), as training prepares them.
        look: tells a sample's pictures from those of others.
        copies: K.
        augmented: the dataset with augmentation, asked for K epochs; not read where K is 0.
    """

    def __init__(
        self,
        dataset: Dataset,
        prepare: Callable[[list], Tensor],
        look: Callable[[int], bytes],
        copies: int = 0,
        augmented: Dataset | None = None,
    ):
        self.dataset, self.prepare, self.copies, self.augmented = dataset, prepare, copies, augmented
        self._look = look

    def __len__(self) -> int:
        return len(self.dataset) * (1 + self.copies)

    def __getitem__(self, pair: int) -> Tensor:
        """Give one pair's pixels (V, 3, H, W)."""
        index, copy = divmod(pair, 1 + self.copies)
        shown = self.dataset.pictures(index) if copy == 0 else self.augmented[Draw(index, copy - 1)].images
        return self.prepare([shown])[0]

    def look(self, pair: int) -> np.ndarray:
        """Give one pair's digest, (16,) uint8: pairs of one digest look the same; each augmented copy is drawn alone."""
        index, copy = divmod(pair, 1 + self.copies)
        seen = self._look(index) if copy == 0 else f"copy {pair}".encode()
        return np.frombuffer(hashlib.blake2b(seen, digest_size=DIGEST_BYTES).digest(), np.uint8)


@dataclass(frozen=True)
class Rank:
    """Which of several processes this one is."""

    index: int = 0
    count: int = 1
    wait: Callable[[], None] = lambda: None
    """Returns once all of them have called it."""


@dataclass(frozen=True)
class ViewBuild:
    """What a cache of view features is built of, and how.

    Args:
        folder: of the cache.
        key: what its content is made of.
        episodes: index and length of each episode, in the order of the samples.
        pairs: what is encoded.
        encode: pixels (B, V, 3, H, W) to features (B, ...).
        row_shape: of one row, (V, g², 2C).
        stored: `float32`, `bfloat16` or `float8`.
        batch_size: pairs that are encoded at once.
        workers: processes that read pictures.
        max_bytes: what the cache may take on the disk; None takes what is free.
        shard_bytes: of one shard, at most.
        tick: called with the number of pairs that were looked at or encoded.
    """

    folder: Path
    key: Key
    episodes: list[tuple[int, int]]
    pairs: Pairs
    encode: Callable[[Tensor], Tensor]
    row_shape: tuple[int, ...]
    stored: str
    batch_size: int
    workers: int = 0
    max_bytes: int | None = None
    shard_bytes: int = SHARD_BYTES
    tick: Callable[[str, int, int], None] = lambda what, done, total: None

    @property
    def bytes_at_most(self) -> int:
        """Bytes of the cache if no two pairs look the same."""
        return len(self.pairs) * row_bytes(self.row_shape, self.stored)


def build_views(build: ViewBuild, rank: Rank = Rank()) -> None:
    """Build a cache of view features, or go on with one.

    Raises:
        OSError: if the disk is full, or has less room than the rest needs; what is written is kept.
        ValueError: if it would be larger than it may be.
    """
    build.folder.mkdir(parents=True, exist_ok=True)
    with said_plainly(build.folder):
        _build_views(build, rank)


def _build_views(build: ViewBuild, rank: Rank) -> None:
    if rank.index == 0:
        reopen(build.folder)
    rank.wait()
    firsts = look(build, rank)
    spans = shard_spans(len(firsts), build)
    missing = [shard for shard in range(len(spans)) if not is_done(build.folder, shard)]
    check_room(build, sum(len(spans[shard]) for shard in missing), len(firsts))
    rank.wait()  # or a rank could see a shard that another has just written as one that needs no dealing
    encode_shards(build, firsts, spans, missing[rank.index :: rank.count])
    rank.wait()
    if rank.index == 0:
        finish(build, len(spans), len(firsts))
    rank.wait()


def is_whole(folder: Path) -> bool:
    """Whether a cache is there, and every shard holds what was written; reads all of it."""
    if not (folder / MANIFEST).exists():
        return False
    return all(_holds(folder, shard) for shard in read_manifest(folder / MANIFEST)["shards"])


def reopen(folder: Path) -> None:
    """Turn a cache with damaged shards back into one that is being built, for those to be built again."""
    if (folder / MANIFEST).exists():
        for number, shard in enumerate(read_manifest(folder / MANIFEST)["shards"]):
            _write_text(_note(folder, number), json.dumps(shard))
        (folder / MANIFEST).unlink()


def look(build: ViewBuild, rank: Rank) -> np.ndarray:
    """Look at every pair, and say of each row which pair is the first that looks like it: (R,)."""
    if not (build.folder / FIRSTS).exists():
        own = build.folder / f"looks-{rank.index}-of-{rank.count}.npy"
        if not own.exists():
            _save(own, _digests(build, range(rank.index, len(build.pairs), rank.count)))
        rank.wait()
        if rank.index == 0:
            _merge_looks(build, rank.count)
    rank.wait()
    return np.load(build.folder / FIRSTS)


def _digests(build: ViewBuild, pairs: range) -> np.ndarray:
    found = np.empty((len(pairs), DIGEST_BYTES), np.uint8)
    for start in _starts(range(len(pairs)), build.batch_size):
        batch = pairs[start : start + build.batch_size]
        found[start : start + len(batch)] = [build.pairs.look(pair) for pair in batch]
        build.tick("looked at", len(batch), len(pairs))
    return found


def _merge_looks(build: ViewBuild, ranks: int) -> None:
    digests = np.empty((len(build.pairs), DIGEST_BYTES), np.uint8)
    for index in range(ranks):
        digests[index::ranks] = np.load(build.folder / f"looks-{index}-of-{ranks}.npy")
    whole = digests.view(f"V{DIGEST_BYTES}")[:, 0]
    _, firsts, rows = np.unique(whole, return_index=True, return_inverse=True)
    order = np.argsort(firsts)  # as the dataset has them, so that neighbours in time are neighbours in the store
    places = np.empty_like(order)
    places[order] = np.arange(len(order))
    _save(build.folder / ROWS, places[rows].reshape(-1, 1 + build.pairs.copies))
    _save(build.folder / FIRSTS, firsts[order])


def _save(path: Path, array: np.ndarray) -> None:
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with aside.open("wb") as file:
        np.save(file, array)
    aside.replace(path)


def shard_spans(rows: int, build: ViewBuild) -> list[range]:
    """Cut rows into shards."""
    size = max(1, build.shard_bytes // row_bytes(build.row_shape, build.stored))
    return [range(start, min(start + size, rows)) for start in range(0, rows, size)]


def shard_file(shard: int) -> str:
    """Name a shard."""
    return f"shard-{shard:05d}.safetensors"


def is_done(folder: Path, shard: int) -> bool:
    """Whether a shard was written, and holds what was written."""
    note = _note(folder, shard)
    return note.exists() and _holds(folder, json.loads(note.read_text()))


def _holds(folder: Path, written: dict[str, Any]) -> bool:
    path = folder / written["file"]
    try:
        check_size(path, written["bytes"])
    except ValueError:
        return False
    return checksum(path) == written["crc"]


def check_room(build: ViewBuild, missing_rows: int, rows: int) -> None:
    """Compare what the cache takes with what it may take and with what the disk has free, and say so.

    Raises:
        OSError: if the disk has less room than the rest needs.
        ValueError: if the cache would be larger than it may be.
    """
    one = row_bytes(build.row_shape, build.stored)
    free = shutil.disk_usage(build.folder).free
    whole, missing = _size(rows * one), _size(missing_rows * one)
    text = "%s: %d pairs, %d of them different, %s in %s; %s are still to be written, %s are free."
    logger.info(text, build.folder, len(build.pairs), rows, whole, build.stored, missing, _size(free))
    if build.max_bytes is not None and rows * one > build.max_bytes:
        raise ValueError(
            f"{build.folder}: the cache would take {whole}, and may take {_size(build.max_bytes)} "
            "(memory.cache_budget). Raise that, or lower model.pool_grid, memory.cache_copies or memory.cache_dtype."
        )
    if missing_rows * one > free:
        raise OSError(
            f"{build.folder}: {missing} are still to be written, and the disk has {_size(free)} free. "
            "Make room, or choose another --output."
        )


@torch.inference_mode()
def encode_shards(build: ViewBuild, firsts: np.ndarray, spans: list[range], shards: list[int]) -> None:
    """Encode this rank's shards, and write each while the next is encoded: a disk may take as long for one as a GPU."""
    total = sum(len(spans[shard]) for shard in shards)
    loader = _pixels(build, firsts, [spans[shard] for shard in shards])
    writing: Future | None = None
    with ThreadPoolExecutor(1) as writer:
        for shard in shards:
            features = []
            for _ in _starts(spans[shard], build.batch_size):
                features.append(build.encode(next(loader)).cpu())
                build.tick("encoded", len(features[-1]), total)
            if writing:
                writing.result()  # no more than two shards are held in memory
            writing = writer.submit(_write, build, shard, torch.cat(features))
        if writing:
            writing.result()


def _write(build: ViewBuild, shard: int, features: Tensor) -> None:
    written = write_shard(build.folder / shard_file(shard), features, build.stored)
    _write_text(_note(build.folder, shard), json.dumps(written._asdict()))


def _pixels(build: ViewBuild, firsts: np.ndarray, spans: list[range]) -> Iterator[Tensor]:
    """Read the pixels of shards, batch after batch; none reaches over the end of a shard."""
    size = build.batch_size
    batches = [
        firsts[start : min(start + size, span.stop)].tolist() for span in spans for start in _starts(span, size)
    ]
    loader = DataLoader(
        build.pairs,
        batch_sampler=batches,
        num_workers=build.workers,
        collate_fn=torch.stack,
        pin_memory=torch.cuda.is_available(),
    )
    return iter(loader)


def _starts(span: range, size: int) -> range:
    return range(span.start, span.stop, size)


@contextmanager
def said_plainly(folder: Path) -> Iterator[None]:
    """Turn a disk that is full into an error that says what is kept, and what to do.

    Raises:
        OSError: saying so.
    """
    try:
        yield
    except OSError as error:
        if not is_full(error):
            raise
        there = len(list(folder.glob("shard-*.json")))
        raise OSError(
            f"{folder}: the disk is full. What is written is kept, {there} shards of the cache. Make room, then run the "
            f"same command again: it goes on from there. ({error.strerror})"
        ) from None


def finish(build: ViewBuild, shards: int, rows: int) -> None:
    """Write the manifest, and clear away what only building needed."""
    notes = [StoredShard(**json.loads(_note(build.folder, shard).read_text())) for shard in range(shards)]
    facts = {
        "row_shape": list(build.row_shape),
        "stored": build.stored,
        "rows": rows,
        "copies": build.pairs.copies,
        "episodes": [list(episode) for episode in build.episodes],
    }
    write_manifest(build.folder, build.key, notes, facts)
    for path in (*build.folder.glob("shard-*.json"), *build.folder.glob("looks-*.npy"), build.folder / FIRSTS):
        path.unlink()


def write_manifest(folder: Path, key: Key, shards: list[StoredShard], facts: dict[str, Any]) -> None:
    """Write a cache's `cache.json`, which makes it a whole one."""
    norm = sum(shard.squared_norm for shard in shards)
    manifest = {
        "format": FORMAT,
        "key": key,
        **facts,
        "bytes": sum(shard.bytes for shard in shards),
        "relative_error": (sum(shard.squared_error for shard in shards) / norm) ** 0.5 if norm else 0.0,
        "shards": [shard._asdict() for shard in shards],
    }
    _write_text(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def _write_text(path: Path, text: str) -> None:
    """Write a file beside its place and move it there, so that a kill leaves a whole one or none."""
    aside = path.with_name(f"{path.name}.part")
    aside.write_text(text)
    aside.replace(path)


def _note(folder: Path, shard: int) -> Path:
    """Where it is kept, until the manifest is written, what is known of a shard."""
    return folder / f"shard-{shard:05d}.json"


def _size(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**20:.2f} MiB"
