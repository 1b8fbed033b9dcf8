"""Faults put into a tiny LeRobot folder, each into the data file in the middle."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


def middle(root: Path) -> Path:
    files = sorted((root / "data").rglob("*.parquet"))
    return files[len(files) // 2]


def change(root: Path, key: str, values) -> None:
    table = pq.read_table(middle(root))
    column = pa.array(values(table.column(key)), table.schema.field(key).type)
    pq.write_table(table.set_column(table.column_names.index(key), key, column), middle(root))


def break_parquet(root: Path) -> None:
    middle(root).write_bytes(middle(root).read_bytes()[:-100])


def remove_parquet(root: Path) -> None:
    middle(root).unlink()


def break_actions(root: Path) -> None:
    change(root, "action", lambda column: [[np.nan] * 3] * len(column))


def break_tasks(root: Path) -> None:
    change(root, "task_index", lambda column: [7] * len(column))


def slow_down(root: Path) -> None:
    change(root, "timestamp", lambda column: [2 * seconds for seconds in column.to_pylist()])


def shorten(root: Path) -> None:
    table = pq.read_table(middle(root))
    pq.write_table(table.slice(0, len(table) - 1), middle(root))
