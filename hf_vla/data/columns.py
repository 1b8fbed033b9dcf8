"""Columns of a memory-mapped Arrow table as numpy arrays.

`datasets` gives the table: parquet is unpacked once into its Arrow cache, which every process then maps. The columns are
read from `Dataset.data` directly, since the formatting behind `Dataset[i]` costs 22 µs a row, and this 4.

Letters: N rows, D numbers of a row.
"""

import glob
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from datasets.exceptions import DatasetGenerationError


def open_table(files: list[Path]) -> Dataset:
    """Map the rows of parquet files, in their order, as one table.

    Raises:
        ValueError: where they can't be read; `find_fault` says of a file whether it is the one.
    """
    try:
        # Escaped, since `datasets` takes a path for a pattern.
        return Dataset.from_parquet([glob.escape(str(file)) for file in files])
    except (DatasetGenerationError, pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{files[0].parent}: the parquet files can't be read as one table: {error}") from error


def find_fault(file: Path) -> str | None:
    """Say what is wrong with a parquet file, by reading all of it; None where nothing is."""
    try:
        reader = pq.ParquetFile(file)
        for group in range(reader.num_row_groups):
            reader.read_row_group(group)
    except (pa.ArrowException, OSError) as error:
        return f"can't be read as parquet ({error})."
    return None


def num_rows(file: Path) -> int:
    """Count the rows of a parquet file from its footer.

    Raises:
        ValueError: for a file that isn't parquet, or is cut short.
    """
    try:
        return pq.read_metadata(file).num_rows
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{file}: can't be read as parquet ({error}). Fetch or record it again.") from None


def matrix(table: Dataset, key: str, start: int = 0, length: int | None = None) -> np.ndarray:
    """Read rows of a column of numbers, or of lists of numbers, as (N, D) in the column's own type.

    Raises:
        ValueError: for lists of differing lengths, or missing values.
    """
    column = table.data.column(key).slice(start, length)
    values = column
    while _is_list(values.type):
        values = pa.chunked_array([chunk.flatten() for chunk in values.chunks], values.type.value_type)
    width, rest = divmod(len(values), max(len(column), 1))
    if rest or values.null_count:
        raise ValueError(f"Column {key!r}: its rows aren't lists of one length without gaps, as vectors have to be.")
    return values.to_numpy().reshape(len(column), width)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
