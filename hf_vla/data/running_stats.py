"""Statistics of vectors in one pass and bounded memory, over any number of rows; exact, but for quantiles of known error.

Letters: N rows seen, D dimensions, K rows of one buffer.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hf_vla.data.lerobot_stats import QUANTILES

BUFFER_ROWS = 16_384
"""Up to so many rows the quantiles are exact; beyond, the error of a quantile's rank is below 0.0006 at a billion rows."""


class RunningStats:
    """Mean, std, min, max and quantiles of (N, D) numbers that come a piece at a time.

    Quantiles come from a deterministic sketch: full buffers of one weight are sorted two at a time, and every second value
    is kept with twice the weight, in turn the odd and the even ones, so that their errors cancel. `rank_error` says how far
    the value given for a quantile may be off at most, as a share of the rows: q01 is then surely between 0.01 less that and
    0.01 more.

    Source: Manku, Rajagopalan, Lindsay, Approximate medians and other quantiles in one pass, SIGMOD 1998, with alternating
    offsets.
    """

    def __init__(self, dimensions: int, buffer_rows: int = BUFFER_ROWS):
        self.count = 0
        self._size = buffer_rows
        self._mean = np.zeros(dimensions)
        self._squares = np.zeros(dimensions)
        self._min = np.full(dimensions, np.inf)
        self._max = np.full(dimensions, -np.inf)
        self._waiting: list[np.ndarray] = []
        self._levels: list[np.ndarray | None] = []
        self._errors = [0, 0]  # rows by which ranks may have been given too high, and too low

    def add(self, values: np.ndarray) -> None:
        """Count (N, D) finite numbers."""
        if not len(values):
            return
        exact = values.astype(np.float64)  # float32 loses the std of a large offset
        self._add_moments(len(exact), exact.mean(0), ((exact - exact.mean(0)) ** 2).sum(0))
        self._min = np.minimum(self._min, exact.min(0))
        self._max = np.maximum(self._max, exact.max(0))
        self._waiting.append(np.asarray(values))
        if sum(map(len, self._waiting)) >= self._size:
            rows = np.concatenate(self._waiting)
            whole = len(rows) // self._size * self._size
            for start in range(0, whole, self._size):
                self._push(np.sort(rows[start : start + self._size], axis=0), 0)
            self._waiting = [rows[whole:].copy()]

    def merge(self, other: "RunningStats") -> None:
        """Count what another has counted, too."""
        if not other.count:
            return
        self._add_moments(other.count, other._mean, other._squares)
        self._min, self._max = np.minimum(self._min, other._min), np.maximum(self._max, other._max)
        self._errors = [ours + theirs for ours, theirs in zip(self._errors, other._errors, strict=True)]
        for level, values in enumerate(other._levels):
            if values is not None:
                self._push(values, level)
        for rows in other._waiting:
            self._waiting.append(rows)

    @property
    def dimensions(self) -> int:
        """Count the dimensions D."""
        return len(self._mean)

    @property
    def rank_error(self) -> float:
        """Bound the error of a quantile's rank, as a share of the rows; 0 where it is exact."""
        heaviest = max((2**level for level, rows in enumerate(self._levels) if rows is not None), default=1)
        return (max(self._errors) + heaviest) / self.count if max(self._errors) or heaviest > 1 else 0.0

    def stats(self) -> dict[str, list]:
        """Return the statistics in LeRobot's form: lists of D floats, and `count`.

        Raises:
            ValueError: where nothing was counted.
        """
        if not self.count:
            raise ValueError("statistics need at least one row; none was counted.")
        stats = {"min": self._min, "max": self._max, "mean": self._mean, "std": np.sqrt(self._squares / self.count)}
        stats |= self._quantiles()
        return {name: np.asarray(value, np.float64).tolist() for name, value in stats.items()} | {
            "count": [self.count]
        }

    def _add_moments(self, count: int, mean: np.ndarray, squares: np.ndarray) -> None:
        total, shift = self.count + count, mean - self._mean
        self._mean = self._mean + shift * count / total
        self._squares = self._squares + squares + shift**2 * self.count * count / total
        self.count = total

    def _push(self, values: np.ndarray, level: int) -> None:
        """Put a sorted buffer on its level; two of one level become one of the next."""
        while len(self._levels) <= level:
            self._levels.append(None)
        resident = self._levels[level]
        if resident is None:
            self._levels[level] = values
            return
        self._levels[level] = None
        offset = 0 if self._errors[0] <= self._errors[1] else 1
        self._errors[offset] += 2**level
        self._push(np.sort(np.concatenate([resident, values]), axis=0)[offset::2], level + 1)

    def _quantiles(self) -> dict[str, np.ndarray]:
        buffers = [(rows, 1) for rows in self._waiting if len(rows)]
        buffers += [(rows, 2**level) for level, rows in enumerate(self._levels) if rows is not None]
        values = np.concatenate([rows for rows, _ in buffers]).astype(np.float64)
        shares = list(QUANTILES.values())
        if all(weight == 1 for _, weight in buffers):
            return dict(zip(QUANTILES, np.quantile(values, shares, axis=0), strict=True))
        weights = np.concatenate([np.full(len(rows), weight) for rows, weight in buffers])
        order = np.argsort(values, axis=0, kind="stable")
        ranks = np.cumsum(weights[order], axis=0)
        places = [
            [np.searchsorted(ranks[:, d], share * self.count) for d in range(values.shape[1])] for share in shares
        ]
        columns = np.arange(values.shape[1])
        found = [
            values[order[np.minimum(place, len(values) - 1), columns], columns] for place in map(np.array, places)
        ]
        return dict(zip(QUANTILES, found, strict=True))


def stats_of_files(files: Iterable[Path]) -> dict[str, RunningStats]:
    """Count every column of numbers, or of lists of numbers, in parquet files: a row group at a time, each row once.

    Raises:
        ValueError: names the file that can't be read, and the column and row of what isn't a finite number.
    """
    counted: dict[str, RunningStats] = {}
    for file in files:
        try:
            source = pq.ParquetFile(file)
            keys = [field.name for field in source.schema_arrow if _is_numbers(field.type)]
            for group in range(source.num_row_groups if source.metadata.num_rows else 0):
                _count(file, source.read_row_group(group, columns=keys), counted)
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{file}: can't be read as parquet ({error}). Fetch or record it again.") from None
    return counted


def _count(file: Path, rows: pa.Table, counted: dict[str, RunningStats]) -> None:
    for key in rows.column_names:
        values = np.stack(rows[key].to_numpy()).reshape(len(rows), -1)
        bad = ~np.isfinite(values).all(1)
        if bad.any():
            row = int(bad.argmax())
            episode = rows["episode_index"][row].as_py() if "episode_index" in rows.column_names else "?"
            raise ValueError(
                f"{file}: {key} of episode {episode} has values that aren't finite, first in row {row} of its group. Repair "
                "the episode, or leave it out."
            )
        counted.setdefault(key, RunningStats(values.shape[1])).add(values)


def _is_numbers(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _is_numbers(kind.value_type)
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)
