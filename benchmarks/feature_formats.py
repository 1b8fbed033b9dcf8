"""How fast is a row of features read at random: safetensors through a memory map or the library, and Arrow both ways.

    OMP_NUM_THREADS=1 python -m benchmarks.feature_formats

Rows are as large as VGGT-1B's pairs. Cold is with none of the file in this system's page cache; what the disk or its host
keeps of it is out of reach. Written means on the disk, for each format alike.

Letters: N rows.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors import safe_open
from torch import Tensor

from benchmarks.result import RESULTS, write_result
from hf_vla.data.feature_store import FEATURES, FeatureStore, write_shard

ROW = (2, 64, 2048)
"""A pair of VGGT-1B pooled to 8 x 8: half a MiB in bfloat16."""
SHARD_ROWS, SHARDS = 100, 3
READS = 600
BATCH = 8


def main() -> None:
    """Measure every format."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the result is written")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = {"row": ROW, "rows": SHARD_ROWS * SHARDS, "reads": READS, "formats": measure_formats(Path(folder))}
    print(f"Written: {write_result('feature_formats', results, options.results)}")


def measure_formats(folder: Path) -> list[dict[str, Any]]:
    """Write the same rows in each format, and read them in the same random order: cold, then warm."""
    generator = torch.Generator().manual_seed(0)
    shards = [torch.randn(SHARD_ROWS, *ROW, generator=generator).bfloat16() for _ in range(SHARDS)]
    order = np.random.default_rng(0).integers(0, SHARD_ROWS * SHARDS, READS).tolist()
    rows = []
    for name, (write, open_format) in FORMATS.items():
        place = folder / name.replace(" ", "_")
        place.mkdir(parents=True, exist_ok=True)
        begun = time.perf_counter()
        for number, features in enumerate(shards):
            write(place, number, features)
        for path in place.iterdir():
            reach_disk(path)
        seconds = time.perf_counter() - begun
        size = sum(path.stat().st_size for path in place.iterdir())
        cold, warm = (read_all(open_format(place), order, place if is_cold else None) for is_cold in (True, False))
        check(open_format(place), shards, order[:5])
        rows.append(
            {
                "format": name,
                "bytes": size,
                "write_mb_per_s": round(size / seconds / 1e6),
                "cold_rows_per_s": round(cold),
                "warm_rows_per_s": round(warm),
            }
        )
    return rows


def read_all(read: Callable[[int], Tensor], order: list[int], cold: Path | None) -> float:
    """Read rows into batches, and give rows/s; cold: with none of them in this system's page cache."""
    if cold is not None:
        for path in cold.iterdir():
            forget(path)
    begun = time.perf_counter()
    for start in range(0, len(order), BATCH):
        torch.stack([read(row) for row in order[start : start + BATCH]])
    return len(order) / (time.perf_counter() - begun)


def check(read: Callable[[int], Tensor], shards: list[Tensor], rows: list[int]) -> None:
    """Make sure that what is read is what was written."""
    for row in rows:
        if not torch.equal(read(row).view(torch.int16), shards[row // SHARD_ROWS][row % SHARD_ROWS].view(torch.int16)):
            raise ValueError(f"Row {row} isn't what was written.")


def reach_disk(path: Path) -> None:
    """Wait until a file lies on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def forget(path: Path) -> None:
    """Drop a file's pages from the system's page cache."""
    reach_disk(path)
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def write_safetensors(folder: Path, number: int, features: Tensor) -> None:
    """Write one shard as the cache does."""
    write_shard(folder / f"{number}.safetensors", features, "bfloat16")


def open_mapped(folder: Path) -> Callable[[int], Tensor]:
    """Read as the cache does."""
    paths = sorted(folder.iterdir())
    shards = [{"file": p.name, "rows": SHARD_ROWS, "bytes": p.stat().st_size} for p in paths]
    return FeatureStore(folder, shards).__getitem__


def open_library(folder: Path) -> Callable[[int], Tensor]:
    """Read through safetensors' own slices."""
    slices = [safe_open(path, "pt").get_slice(FEATURES) for path in sorted(folder.iterdir())]
    return lambda row: slices[row // SHARD_ROWS][row % SHARD_ROWS]


def write_arrow(folder: Path, number: int, features: Tensor, rows_of_batch: int) -> None:
    """Write one Arrow IPC file of binary rows; Arrow has no bfloat16."""
    flat = features.flatten(1).view(torch.uint8).numpy()
    kind = pa.binary(flat.shape[1])
    with (
        pa.OSFile(str(folder / f"{number}.arrow"), "wb") as sink,
        pa.ipc.new_file(sink, pa.schema([(FEATURES, kind)])) as writer,
    ):
        for start in range(0, len(flat), rows_of_batch):
            piece = flat[start : start + rows_of_batch]
            array = pa.FixedSizeBinaryArray.from_buffers(kind, len(piece), [None, pa.py_buffer(piece)])
            writer.write_batch(pa.record_batch([array], names=[FEATURES]))


def open_arrow(folder: Path) -> Callable[[int], Tensor]:
    """Read rows of memory-mapped Arrow files."""
    columns = []
    for path in sorted(folder.iterdir()):
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        columns.append([reader.get_batch(i).column(0) for i in range(reader.num_record_batches)])
    size = len(columns[0][0])

    def read(row: int) -> Tensor:
        shard, row = divmod(row, SHARD_ROWS)
        buffer = columns[shard][row // size][row % size].as_buffer()
        return torch.frombuffer(buffer, dtype=torch.bfloat16).view(ROW)

    return read


def write_arrow_alone(folder: Path, number: int, features: Tensor) -> None:
    """Write with a record batch a row."""
    write_arrow(folder, number, features, 1)


def write_arrow_whole(folder: Path, number: int, features: Tensor) -> None:
    """Write with one record batch."""
    write_arrow(folder, number, features, SHARD_ROWS)


FORMATS = {
    "safetensors mapped": (write_safetensors, open_mapped),
    "safetensors library": (write_safetensors, open_library),
    "arrow": (write_arrow_whole, open_arrow),
    "arrow batch a row": (write_arrow_alone, open_arrow),
}
"""How each is written and opened."""

if __name__ == "__main__":
    main()
