"""Rows of features on disk: safetensors shards that are written whole or not at all, and read through memory maps.

A shard is an ordinary safetensors file: it travels, anything opens it, and unlike Arrow it knows bfloat16 and 8 bits. How
fast rows are read from either is measured in benchmarks/feature_formats.py.

Letters: N rows of a store, n of a shard; a row has any shape, `...`.
"""

import errno
import json
import math
import mmap
import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

FEATURES, SCALES = "features", "scales"
"""Tensors of a shard: (n, ...) in the stored dtype, and for 8 bits (n, ..., 1) float32."""
STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float8": torch.float8_e4m3fn}
"""What a cache can be stored as."""
_TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn}
"""What the file format calls them."""


class StoredShard(NamedTuple):
    """What is known of a shard that was written."""

    file: str
    rows: int
    bytes: int
    crc: int
    """CRC-32 of the whole file."""
    squared_error: float
    """Sum over all entries of (stored - exact)²."""
    squared_norm: float
    """Sum over all entries of exact²; 0 where nothing was rounded."""


def row_bytes(shape: Sequence[int], stored: str) -> int:
    """Count the bytes of a row of a shape."""
    entries = int(np.prod(shape))
    scales = 4 * entries // shape[-1] if stored == "float8" else 0
    return entries * STORED[stored].itemsize + scales


def pack(features: Tensor, stored: str) -> dict[str, Tensor]:
    """Turn features (n, ..., C) into what a shard holds.

    8 bits (e4m3) keep 3 bits behind the leading one, so each entry is off by at most 1/16 of itself. Every vector of C is
    scaled so that its largest entry is the largest that the format has: VGGT's tokens have a few giant channels.
    """
    if stored != "float8":
        return {FEATURES: features.to(STORED[stored]).contiguous()}
    exact = features.float()
    largest = torch.finfo(STORED["float8"]).max
    scales = exact.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / largest
    return {FEATURES: (exact / scales).to(STORED["float8"]).contiguous(), SCALES: scales.contiguous()}


def unpack(features: Tensor, scales: Tensor | None) -> Tensor:
    """Turn what a shard holds back into features: as they are stored, or bfloat16 where 8 bits were scaled."""
    return features if scales is None else (features.float() * scales).bfloat16()


def write_shard(path: Path, features: Tensor, stored: str) -> StoredShard:
    """Write features (n, ...) as one shard: beside its place, and moved there once it is on the disk.

    Raises:
        OSError: if the disk is full, or can't be written to; nothing half-written stays.
    """
    features = features.cpu()
    tensors = pack(features, stored)
    content = save(tensors)
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        part.unlink(missing_ok=True)
        raise
    part.replace(path)
    return StoredShard(path.name, len(features), len(content), zlib.crc32(content), *_squares(features, tensors))


def _squares(features: Tensor, tensors: dict[str, Tensor]) -> tuple[float, float]:
    """Sum the squares of what storing has changed, and of all there was; of nothing where nothing is changed."""
    if SCALES not in tensors and tensors[FEATURES].dtype == features.dtype:
        return 0.0, 0.0
    error = unpack(tensors[FEATURES], tensors.get(SCALES)).float() - features.float()
    return _squared_norm(error), _squared_norm(features)


def _squared_norm(x: Tensor) -> float:
    return torch.linalg.vector_norm(x, dtype=torch.float64).item() ** 2


def is_full(error: OSError) -> bool:
    """Whether an error says that a disk, or the share of it that one may use, is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def checksum(path: Path) -> int:
    """Give the CRC-32 of a file."""
    crc = 0
    with path.open("rb") as file:
        while piece := file.read(2**20):
            crc = zlib.crc32(piece, crc)
    return crc


class FeatureStore:
    """The rows of a store's shards, in order. It can be pickled, and forked into workers: files are opened as needed.

    Args:
        folder: where the shards lie.
        shards: in order; `file`, `rows` and `bytes` of each, as `StoredShard` has them.

    Raises:
        ValueError: naming a shard that is missing or cut short.
    """

    def __init__(self, folder: Path, shards: Sequence[dict[str, Any]]):
        self._folder = folder
        self._files = [shard["file"] for shard in shards]
        self._sizes = [shard["rows"] for shard in shards]
        self._ends = np.cumsum(self._sizes)
        self._open: dict[int, MappedShard] = {}
        for shard in shards:
            check_size(folder / shard["file"], shard["bytes"])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, row: int) -> Tensor:
        """Give one row (...) in the dtype that it is stored in, or bfloat16 for 8 bits; it is read when it is used."""
        return self.rows(row, row + 1)[0]

    def rows(self, start: int, stop: int) -> Tensor:
        """Give rows that follow one another, (stop - start, ...)."""
        parts = []
        while start < stop:
            shard = int(np.searchsorted(self._ends, start, side="right"))
            first, end = int(self._ends[shard]) - self._sizes[shard], min(stop, int(self._ends[shard]))
            parts.append(self._mapped(shard).rows(start - first, end - first))
            start = end
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _mapped(self, shard: int) -> "MappedShard":
        if shard not in self._open:
            self._open[shard] = MappedShard(self._folder / self._files[shard])
        return self._open[shard]

    def __getstate__(self):
        return {**self.__dict__, "_open": {}}


class MappedShard:
    """One shard, mapped into memory: nothing is read until it is used.

    Args:
        path: of the file.

    Raises:
        ValueError: if it isn't such a file, or ends too early.
    """

    def __init__(self, path: Path):
        try:
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(length))
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # torch wants memory that is writable
            tensors = {name: self._tensor(8 + length, header[name]) for name in (FEATURES, SCALES) if name in header}
            self._features, self._scales = tensors[FEATURES], tensors.get(SCALES)
            self._first = 8 + length + header[FEATURES]["data_offsets"][0]
        except (ValueError, KeyError, struct.error) as error:
            raise damaged(path, str(error)) from None

    def rows(self, start: int, stop: int) -> Tensor:
        """Give some of its rows; the system is told that all of them will be needed, or it would read page by page."""
        row = self._features[0].nbytes
        begin = self._first + start * row
        page = begin // mmap.PAGESIZE * mmap.PAGESIZE
        self._map.madvise(mmap.MADV_WILLNEED, page, self._first + stop * row - page)
        scales = None if self._scales is None else self._scales[start:stop]
        return unpack(self._features[start:stop], scales)

    def _tensor(self, begin: int, entry: dict[str, Any]) -> Tensor:
        count, offset = math.prod(entry["shape"]), begin + entry["data_offsets"][0]
        return torch.frombuffer(self._map, dtype=_TYPES[entry["dtype"]], count=count, offset=offset).view(
            entry["shape"]
        )


def check_size(path: Path, expected: int) -> None:
    """Refuse a shard that isn't as long as it was when it was written.

    Raises:
        ValueError: saying how long it is.
    """
    found = path.stat().st_size if path.is_file() else None
    if found != expected:
        raise damaged(path, "it is missing" if found is None else f"it has {found:,} of {expected:,} bytes")


def damaged(path: Path, reason: str) -> ValueError:
    """Say that a shard can't be used, and what to do."""
    return ValueError(
        f"{path}: this shard of a feature cache is damaged ({reason}). `hf-vla cache RECIPE` builds it again, and keeps the "
        "others."
    )
