"""The committed sample many times over, its pictures shifted a little more each time: no two observations look the same.

Letters: H W pixels.
"""

import io
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from hf_vla.data.lerobot_merge import merge_datasets

SAMPLE = Path(__file__).parent.parent / "tests/data/metaworld_sample"
PICTURES = "observation.images."


def write_longer_sample(root: Path, times: int) -> Path:
    """Write the sample so many times over as one dataset."""
    parts = [write_shifted(root.with_name(f"{root.name}-{pixels}"), pixels) for pixels in range(times)]
    merge_datasets(parts, root)
    for part in parts:
        shutil.rmtree(part)
    return root


def write_shifted(folder: Path, pixels: int) -> Path:
    """Write the sample with its pictures shifted to the side; an episode stays a group of rows."""
    shutil.copytree(SAMPLE, folder)
    for file in (folder / "data").rglob("*.parquet"):
        source = pq.ParquetFile(file)
        episodes = [shift_all(source.read_row_group(i), pixels) for i in range(source.num_row_groups)]
        with pq.ParquetWriter(file, source.schema_arrow) as writer:
            for episode in episodes:
                writer.write_table(episode)
    return folder


def shift_all(rows: pa.Table, pixels: int) -> pa.Table:
    """Shift every camera's pictures."""
    for place, field in enumerate(rows.schema):
        if field.name.startswith(PICTURES):
            pictures = [{**row, "bytes": shift(row["bytes"], pixels)} for row in rows[field.name].to_pylist()]
            rows = rows.set_column(place, field, pa.array(pictures, field.type))
    return rows


def shift(encoded: bytes, pixels: int) -> bytes:
    """Shift one picture (H, W, 3)."""
    picture = np.roll(np.asarray(Image.open(io.BytesIO(encoded))), pixels, axis=1)
    written = io.BytesIO()
    Image.fromarray(picture).save(written, "PNG")
    return written.getvalue()
