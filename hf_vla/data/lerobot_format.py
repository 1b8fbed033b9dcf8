"""LeRobot datasets of format v2.0, v2.1 and v3.0, as a folder or a Hub repo, opened as one DatasetInfo.

What `meta/` says is a claim; the rows on disk are the truth. Where they differ, the rows win, and the log says so once.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from hf_vla.data import columns
from hf_vla.data.lerobot_meta import DescribedEpisode, Meta, VideoSpan, read_meta
from hf_vla.data.running_stats import RunningStats
from hf_vla.data.source import find_root, list_files
from hf_vla.sample import ACTION, STATE

STAT_NAMES = ("mean", "std", "min", "max", "q01", "q99")

_ROWS_AT_ONCE = 65_536

_TIMED_EPISODES = 64
"""Whose timestamps the dataset's rate is taken from, at most."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Episode:
    """One demonstration whose files are on disk."""

    index: int
    length: int
    """Frames, as the rows have it."""
    tasks: tuple[str, ...]
    """Its instructions, as `meta/` has them; usually one."""
    file: str
    """Its parquet file, relative to the dataset's folder."""
    first_row: int
    """Row of the dataset's table at which it starts; its rows follow one another."""
    videos: dict[str, VideoSpan]
    """By camera name; cameras that are embedded in the table aren't in it."""


@dataclass
class DatasetInfo:
    """An opened dataset: what it holds, and its rows as a memory-mapped table. Cheap to pickle: files are reopened."""

    name: str
    root: Path
    version: str
    fps: float
    features: dict[str, dict[str, Any]] = field(repr=False)
    camera_keys: dict[str, str]
    """Camera name to its feature's key."""
    names: dict[str, list[str]] = field(repr=False)
    """Names of the dimensions of `observation.state` and `action`."""
    episodes: tuple[Episode, ...] = field(repr=False)
    tasks: dict[int, str] = field(repr=False)
    table: Dataset = field(repr=False)
    meta_stats: dict[str, dict[str, Any]] = field(repr=False)
    """`meta/stats.json` where it covers just the rows of `table`; else empty."""
    repairs: tuple[str, ...] = field(default=(), repr=False)
    """Where `meta/` and the rows contradict each other, and what is believed."""
    left_out: tuple[str, ...] = field(default=(), repr=False)
    """What was wrong with each episode that isn't used, where such are to be skipped."""
    video_backend: str = "pyav"
    """What decodes its videos: `pyav` or `torchcodec`."""

    @property
    def cameras(self) -> tuple[str, ...]:
        """Name the cameras, in the dataset's order."""
        return tuple(self.camera_keys)

    @property
    def action_names(self) -> list[str]:
        """Name the dimensions of an action."""
        return self.names[ACTION]

    @property
    def state_dim(self) -> int:
        """Count the dimensions S of the robot's state."""
        return len(self.names[STATE])

    @property
    def action_dim(self) -> int:
        """Count the dimensions A of an action."""
        return len(self.names[ACTION])

    @cached_property
    def stats(self) -> dict[str, dict[str, np.ndarray]]:
        """Give mean, std, min, max, q01 and q99 of state and action, each (D,) float32.

        They are the dataset's own, or computed from its rows where those are missing or cover other rows. Held-out episodes
        count, as in LeRobot's `meta/`: so the same scale is used whichever are held out, but it has seen their range.
        """
        return {key: self._stats_of(key) for key in (STATE, ACTION)}

    def _stats_of(self, key: str) -> dict[str, np.ndarray]:
        stats = self.meta_stats.get(key, {})
        if any(np.size(stats.get(name, ())) != len(self.names[key]) for name in STAT_NAMES):
            logger.info("%s: computing the stats of %s from %d rows.", self.name, key, len(self.table))
            stats = self._count(key)
        return {name: np.ravel(stats[name]).astype(np.float32) for name in STAT_NAMES}

    def _count(self, key: str) -> dict[str, list]:
        """Compute statistics in one pass; more than 16,384 rows cost quantiles up to 0.06 % of rank."""
        counted = RunningStats(len(self.names[key]))
        for start, stop in _row_runs(self.episodes):
            for row in range(start, stop, _ROWS_AT_ONCE):
                counted.add(columns.matrix(self.table, key, row, min(_ROWS_AT_ONCE, stop - row)))
        return counted.stats()


def open_dataset(source: str | Path, revision: str | None = None, on_error: str = "raise") -> DatasetInfo:
    """Open a LeRobot dataset.

    Args:
        source: folder, or Hub id `user/name`.
        revision: branch, tag or commit of the Hub repo.
        on_error: `raise`, or `skip` to leave out the episodes of files that are missing between others or can't be read.

    Raises:
        FileNotFoundError: for a dataset that isn't there, or has no episode on disk.
        ValueError: for a file that is missing between others or can't be read, or a dataset without `action` or
            `observation.state`.
    """
    root = find_root(source, revision)
    meta = read_meta(root)
    repairs: list[str] = []
    described, missing = episodes_on_disk(root, meta, list_files(root), on_error, repairs)
    table, described, unreadable = _open_rows(root, described, on_error)
    episodes = _locate(root, described, table, repairs)
    is_whole = len(episodes) == len(meta.episodes)
    info = DatasetInfo(
        name=root.resolve().name if Path(source).expanduser() == root else str(source),
        root=root,
        version=meta.version,
        fps=true_fps(meta, table, episodes, repairs),
        features=meta.features,
        camera_keys=present_cameras(meta, table, episodes[0], repairs),
        names={key: dimension_names(root, meta, table, key, repairs) for key in (STATE, ACTION)},
        episodes=episodes,
        tasks=meta.tasks,
        table=table,
        meta_stats=meta.stats if is_whole else {},
        repairs=tuple(repairs),
        left_out=missing + unreadable,
    )
    if repairs:
        logger.warning("%s: %s", info.name, "; ".join(repairs))
    return info


def episodes_on_disk(
    root: Path, meta: Meta, there: set[str], on_error: str, repairs: list[str]
) -> tuple[list[DescribedEpisode], tuple[str, ...]]:
    """Keep the episodes whose files are there: part of a dataset is a dataset, but a hole in one is a loss.

    Args:
        root: folder of the dataset.
        meta: what should be there.
        there: files that are, relative to the root.
        on_error: `raise`, or `skip` to leave out the episodes of a file that is missing between others.
        repairs: is told of a part.

    Returns:
        These episodes, and what was wrong with each that lies between them.
    """
    cameras = {name for episode in meta.episodes for name, span in episode.videos.items() if span.file in there}
    wanted = [
        replace(episode, videos={name: span for name, span in episode.videos.items() if name in cameras})
        for episode in meta.episodes
    ]
    places = [k for k, episode in enumerate(wanted) if set(episode.files) <= there]
    if not wanted:
        raise ValueError(f"{root}: the dataset has no episodes. Was its recording or conversion cut short?")
    if not places:
        raise FileNotFoundError(
            f"{root}: meta/ describes {len(wanted)} episodes, but none has its files on disk; {wanted[0].file} would be the "
            "first."
        )
    part = wanted[places[0] : places[-1] + 1]
    if len(part) < len(wanted):
        repairs.append(f"{len(places)} of the {len(wanted)} episodes in meta/ are on disk; the others are left out")
    missing = {file: "missing, and files after it are there." for e in part for file in e.files if file not in there}
    return leave_out(root, part, missing, on_error)


def _open_rows(
    root: Path, described: list[DescribedEpisode], on_error: str
) -> tuple[Dataset, list[DescribedEpisode], tuple[str, ...]]:
    """Map the rows of all episodes, or of those whose file can be read.

    Returns:
        The table, the episodes that it holds, and what was wrong with each of the others.
    """
    files = sorted({episode.file for episode in described})
    try:
        return columns.open_table([root / file for file in files]), described, ()
    except ValueError:
        faults = {file: fault for file in files if (fault := columns.find_fault(root / file))}
        if not faults:
            raise
    kept, left_out = leave_out(root, described, faults, on_error)
    return columns.open_table([root / file for file in files if file not in faults]), kept, left_out


def leave_out(
    root: Path, described: list[DescribedEpisode], faults: dict[str, str], on_error: str
) -> tuple[list[DescribedEpisode], tuple[str, ...]]:
    """Leave out the episodes of files that something is wrong with, if that is what the recipe asks for.

    Args:
        root: folder of the dataset.
        described: its episodes.
        faults: file to what is wrong with it.
        on_error: `raise` or `skip`.

    Returns:
        The other episodes, and what was wrong with each that isn't among them.

    Raises:
        ValueError: names a file and its episodes.
    """
    lost = {episode.index: file for episode in described for file in episode.files if file in faults}
    kept = [episode for episode in described if episode.index not in lost]
    texts = tuple(f"{root / file}: {faults[file]} It holds episode {index}." for index, file in lost.items())
    if not kept:
        raise ValueError(f"{root}: none of its {len(lost)} episodes can be read. {texts[0]}")
    if lost and on_error == "raise":
        raise ValueError(
            f"{texts[0]} Fetch or record it again, or let data.on_error be 'skip': {len(lost)} of {len(described)} episodes "
            "would be left out."
        )
    return kept, texts


def _locate(root: Path, described: list[DescribedEpisode], table: Dataset, repairs: list[str]) -> tuple[Episode, ...]:
    """Find each episode's rows by the column `episode_index`, or by the lengths in `meta/` where that column is missing."""
    if "episode_index" in table.column_names:
        spans = spans_by_column(root, table)
    else:
        repairs.append("the column episode_index is missing; episodes are cut by the lengths in meta/")
        spans = _spans_by_length(root, described)
    found = [episode for episode in described if episode.index in spans]
    lost = len(described) - len(found)
    differing = sum(spans[episode.index][1] != episode.length for episode in found)
    if lost:
        repairs.append(f"{lost} episodes have no rows and are left out")
    if differing:
        repairs.append(f"{differing} episodes have another length than meta/ says; the rows' is used")
    if not found:
        raise ValueError(
            f"{root}: no row belongs to an episode that meta/ describes; data and meta/ don't belong together."
        )
    return tuple(Episode(e.index, spans[e.index][1], e.tasks, e.file, spans[e.index][0], e.videos) for e in found)


def spans_by_column(root: Path, table: Dataset) -> dict[int, tuple[int, int]]:
    """Find the first row and the length of each episode, by index."""
    indices = columns.matrix(table, "episode_index")[:, 0]
    starts = np.flatnonzero(np.diff(indices, prepend=indices[:1] - 1))
    lengths = np.diff(starts, append=len(indices))
    runs = Counter(indices[starts].tolist())
    torn = [index for index, count in runs.items() if count > 1]
    if torn:
        raise ValueError(
            f"{root}: the rows of episode {torn[0]} don't follow one another; sort the data by episode and frame."
        )
    return {int(indices[start]): (int(start), int(length)) for start, length in zip(starts, lengths, strict=True)}


def _spans_by_length(root: Path, described: list[DescribedEpisode]) -> dict[int, tuple[int, int]]:
    spans, row = {}, 0
    for file, episodes in groupby(sorted(described, key=lambda e: (e.file, e.index)), key=lambda e: e.file):
        first_row = row
        for episode in episodes:
            spans[episode.index] = (row, episode.length)
            row += episode.length
        num_rows = columns.num_rows(root / file)
        if row - first_row != num_rows:
            raise ValueError(
                f"{root / file}: {num_rows} rows, where its episodes have {row - first_row} together by meta/, and there is "
                "no column episode_index to tell them apart."
            )
    return spans


def _row_runs(episodes: Sequence[Episode]) -> list[tuple[int, int]]:
    """List the rows of these episodes, as (start, stop) of those that follow one another."""
    runs: list[tuple[int, int]] = []
    for episode in sorted(episodes, key=lambda e: e.first_row):
        start, stop = episode.first_row, episode.first_row + episode.length
        if runs and runs[-1][1] == start:
            start = runs.pop()[0]
        runs.append((start, stop))
    return runs


def true_fps(meta: Meta, table: Dataset, episodes: Sequence[Episode], repairs: list[str]) -> float:
    """Trust the timestamps where they contradict `meta/info.json`; of some episodes spread over the dataset, most's."""
    timed = [episode for episode in episodes if episode.length > 1]
    if "timestamp" not in table.column_names or not timed:
        return meta.fps
    some = timed[:: -(-len(timed) // _TIMED_EPISODES)]
    seconds = [columns.matrix(table, "timestamp", e.first_row, e.length)[:, 0] for e in some]
    step = float(np.median([np.median(np.diff(times)) for times in seconds]))
    if step <= 0 or abs(step * meta.fps - 1) < 0.01:
        return meta.fps
    repairs.append(f"info.json says {meta.fps:g} fps, the timestamps {1 / step:g}; the timestamps' is used")
    return 1 / step


def present_cameras(meta: Meta, table: Dataset, episode: Episode, repairs: list[str]) -> dict[str, str]:
    """Keep the cameras that have a column or a video; what `features` says of them can be wrong."""
    there = {
        name: key for name, key in meta.camera_keys.items() if key in table.column_names or name in episode.videos
    }
    absent = sorted(set(meta.camera_keys) - set(there))
    if absent:
        repairs.append(f"no pictures of the cameras {', '.join(absent)} are there")
    return there


def dimension_names(root: Path, meta: Meta, table: Dataset, key: str, repairs: list[str]) -> list[str]:
    """Name each dimension that the rows have, by `features` where its names fit."""
    if key not in table.column_names:
        raise ValueError(
            f"{root}: no column {key!r}, which a policy needs. Columns there are: {', '.join(table.column_names)}."
        )
    dim = columns.matrix(table, key, 0, 1).shape[1]
    names = _flat_names(meta.features.get(key, {}).get("names"))
    if len(names) == dim:
        return names
    if names:
        repairs.append(f"{key} has {dim} dimensions but {len(names)} names; they are numbered instead")
    return [f"{key.split('.')[-1]}_{i}" for i in range(dim)]


def _flat_names(names: Any) -> list[str]:
    """Flatten the forms that occur: a list, a nested list, a dict of lists, a dict of name to position, null."""
    if isinstance(names, dict):
        is_positions = all(isinstance(value, int) for value in names.values())
        return sorted(names, key=names.get) if is_positions else _flat_names(list(names.values()))
    if isinstance(names, list):
        return [name for item in names for name in _flat_names(item)]
    return [] if names is None else [str(names)]
