"""Samples of a dataset that is never whole on disk nor in memory: one episode at a time, from a folder or from the Hub.

Only `meta/` is read ahead. An episode's rows are fetched from the parquet row groups that hold them, its pictures with them
or frame by frame out of its videos, and it becomes a `WindowDataset` of its own: what a sample is, is written there alone.
The last few episodes are kept, and `order.py` goes through as many at a time.

Any of its samples can be asked for, and training reads them through a `datasets.IterableDataset` in an order that is made
before (`loader.py`, `order.py`): going on with a run is a seek. One that shuffles by itself goes on with its buffer filled
anew: with its 1,000 samples, each stop of an epoch of 6,600 cost 546 to 617 that weren't seen, and had 46 to 117 seen twice
(`benchmarks/streaming_resume.py`; github.com/huggingface/datasets/issues/7444).

Letters: n samples, S state dims, A action dims, T chunk length.
"""

import logging
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch.utils.data import Dataset

from hf_vla.data import columns
from hf_vla.data.episode_faults import leave_out_faulty
from hf_vla.data.lerobot_format import (
    STAT_NAMES,
    DatasetInfo,
    Episode,
    dimension_names,
    episodes_on_disk,
    present_cameras,
    spans_by_column,
    true_fps,
)
from hf_vla.data.lerobot_meta import DescribedEpisode, read_meta
from hf_vla.data.order import Part
from hf_vla.data.running_stats import RunningStats
from hf_vla.data.source import HubPath, find_stream, list_files, readable
from hf_vla.data.windows import ViewLike, Window, WindowDataset, check_view, choose_episodes
from hf_vla.sample import ACTION, STATE, Sample

_NUMBERS = (STATE, ACTION, "timestamp", "task_index", "episode_index")
_OPEN_FILES = 4
_MOST_ROWS = 500_000
"""Rows whose states and actions may be asked for at once."""

logger = logging.getLogger(__name__)


class Rows(NamedTuple):
    """Some rows of a dataset, as `datasets.Dataset` gives all of them to whoever reads columns."""

    data: pa.Table

    @property
    def column_names(self) -> list[str]:
        """Name the columns."""
        return self.data.column_names

    def __len__(self) -> int:
        return len(self.data)


@dataclass
class StreamInfo(DatasetInfo):
    """A dataset that is opened and not read; `table` holds the rows of its first episode."""

    shards: "Shards" = field(default=None, repr=False)
    on_error: str = "raise"

    def _stats_of(self, key: str) -> dict[str, np.ndarray]:
        stats = self.meta_stats.get(key, {})
        if any(np.size(stats.get(name, ())) != len(self.names[key]) for name in STAT_NAMES):
            logger.info("%s: computing the stats of %s, in one pass over its numbers.", self.name, key)
            stats = self._count(key).stats()
        return {name: np.ravel(stats[name]).astype(np.float32) for name in STAT_NAMES}

    def _count(self, key: str) -> RunningStats:
        running, left_out = RunningStats(len(self.names[key])), 0
        for file in dict.fromkeys(episode.file for episode in self.episodes):
            for rows in self._pieces(file, key):
                values = columns.matrix(rows, key)
                is_finite = np.isfinite(values).all(1)
                left_out += int((~is_finite).sum())
                running.add(values[is_finite])
        if left_out:
            logger.warning("%s: %d rows of %s aren't finite and are left out of its stats.", self.name, left_out, key)
        return running

    def _pieces(self, file: str, key: str) -> Iterator["Rows"]:
        try:
            yield from self.shards.pieces(file, key)
        except ValueError as error:
            if self.on_error == "raise":
                raise
            logger.warning("%s Its rows are left out of the stats of %s (data.on_error).", error, key)


class Shards:
    """The parquet files of a dataset, a few of them open at a time."""

    def __init__(self, root: Path | HubPath):
        self.root = root
        self._open: OrderedDict[str, _Shard] = OrderedDict()
        self._owner = os.getpid()

    def rows(self, episode: DescribedEpisode | Episode, names: Sequence[str]) -> Rows:
        """Fetch an episode's rows, of these columns as far as they are there.

        Raises:
            ValueError: names file and episode where the file can't be read, or doesn't hold what `meta/` says.
        """
        try:
            return self._shard(episode.file).rows(episode, names)
        except (pa.ArrowException, OSError, EOFError) as error:
            raise ValueError(
                f"{self.root / episode.file}: the rows of episode {episode.index} can't be read ({error}). Fetch or record "
                "the file again, or set data.on_error to 'skip'."
            ) from None

    def pieces(self, file: str, name: str) -> Iterator[Rows]:
        """Go through one column of a file, a row group at a time."""
        try:
            reader = self._shard(file).reader
            for k in range(reader.num_row_groups):
                yield Rows(reader.read_row_group(k, columns=[name]))
        except (pa.ArrowException, OSError, EOFError) as error:
            raise ValueError(
                f"{self.root / file}: {name} can't be read for the statistics ({error}). Fetch or record the file again."
            ) from None

    def _shard(self, file: str) -> "_Shard":
        if self._owner != os.getpid():  # a forked worker would move its parent's place in the file
            self._open, self._owner = OrderedDict(), os.getpid()
        if file not in self._open:
            self._open[file] = _Shard(self.root, file)
        self._open.move_to_end(file)
        if len(self._open) > _OPEN_FILES:
            self._open.popitem(last=False)
        return self._open[file]

    def __getstate__(self):
        return {**self.__dict__, "_open": OrderedDict()}


class _Shard:
    """One open parquet file, and where its episodes lie."""

    def __init__(self, root: Path | HubPath, file: str):
        self._path = root / file
        self.reader = pq.ParquetFile(readable(self._path))
        self.names = self.reader.schema_arrow.names
        sizes = [self.reader.metadata.row_group(k).num_rows for k in range(self.reader.num_row_groups)]
        self._ends = np.cumsum(sizes)
        self._spans = None
        if "episode_index" in self.names:
            self._spans = spans_by_column(self._path, Rows(self.reader.read(columns=["episode_index"])))

    def rows(self, episode: DescribedEpisode | Episode, names: Sequence[str]) -> Rows:
        start, length = self._span(episode)
        groups = [k for k, end in enumerate(self._ends) if end > start and self._begin(k) < start + length]
        found = self.reader.read_row_groups(groups, columns=[name for name in names if name in self.names])
        own = found.slice(start - self._begin(groups[0]), length)
        # A slice would keep all that was fetched with it.
        return Rows(own if len(found) < 2 * length else own.take(pa.array(range(length))))

    def _span(self, episode: DescribedEpisode | Episode) -> tuple[int, int]:
        if self._spans is None and int(self._ends[-1]) == episode.length:
            return 0, episode.length
        if self._spans is None:
            raise ValueError(
                f"{self._path}: {int(self._ends[-1])} rows and no column episode_index, which streaming needs to find "
                f"episode {episode.index} with its {episode.length} rows among them; set data.streaming to false."
            )
        if episode.index not in self._spans:
            raise ValueError(f"{self._path}: has no rows of episode {episode.index}, which meta/ says it has.")
        start, length = self._spans[episode.index]
        if length != episode.length:
            raise ValueError(
                f"{self._path}: {length} rows of episode {episode.index}, which has {episode.length} by meta/. Streaming "
                "counts on meta/: repair it, or set data.streaming to false."
            )
        return start, length

    def _begin(self, group: int) -> int:
        return int(self._ends[group - 1]) if group else 0


def open_stream(source: str | Path, revision: str | None = None, on_error: str = "raise") -> StreamInfo:
    """Open a LeRobot dataset without fetching it.

    Args:
        source: folder, or Hub id `user/name`.
        revision: branch, tag or commit of the Hub repo.
        on_error: `raise`, or `skip` to leave out the episodes of files that are missing between others, and to take what is
            the same of all episodes from the first that can be read.

    Raises:
        FileNotFoundError: for a dataset that isn't there, is gated or can't be reached, or has no episode.
        ValueError: for one whose `meta/` or first episode can't be read.
    """
    meta_root, root = find_stream(source, revision)
    meta = read_meta(meta_root)
    repairs: list[str] = []
    described, left_out = episodes_on_disk(root, meta, list_files(root), on_error, repairs)
    shards = Shards(root)
    episodes = tuple(Episode(e.index, e.length, e.tasks, e.file, 0, e.videos) for e in described)
    first, rows = _first_rows(shards, episodes, [*_NUMBERS, *meta.camera_keys.values()], on_error)
    info = StreamInfo(
        name=meta_root.resolve().name if root == meta_root else str(source),
        root=root,
        version=meta.version,
        fps=true_fps(meta, rows, [first], repairs),
        features=meta.features,
        camera_keys=present_cameras(meta, rows, first, repairs),
        names={key: dimension_names(root, meta, rows, key, repairs) for key in (STATE, ACTION)},
        episodes=episodes,
        tasks=meta.tasks,
        table=rows,
        meta_stats=meta.stats if len(described) == len(meta.episodes) else {},
        repairs=tuple(repairs),
        left_out=left_out,
        shards=shards,
        on_error=on_error,
    )
    if repairs:
        logger.warning("%s: %s", info.name, "; ".join(repairs))
    return info


def _first_rows(
    shards: Shards, episodes: Sequence[Episode], names: Sequence[str], on_error: str
) -> tuple[Episode, Rows]:
    """Fetch the first episode that can be read; those before it are read again, and counted, when training gets to them."""
    for episode in episodes:
        try:
            return episode, shards.rows(episode, names)
        except ValueError as error:
            if on_error == "raise":
                raise
            logger.warning("%s It is passed over (data.on_error).", error)
    raise ValueError(f"{shards.root}: data.on_error is 'skip', but none of its {len(episodes)} episodes can be read.")


class StreamedDataset(Dataset):
    """What `WindowDataset` is, for a dataset that is fetched as it is read; the samples are the same, bit for bit.

    Args:
        info: the opened dataset.
        views: as for `WindowDataset`.
        chunk_size: actions of a sample, T.
        episodes: indices of the episodes to use; None takes all.
        kept_episodes: episodes that each process keeps in memory, as read: what it costs doesn't grow with the dataset.
    """

    def __init__(
        self,
        info: StreamInfo,
        views: Sequence[ViewLike],
        chunk_size: int,
        episodes: Sequence[int] | None = None,
        kept_episodes: int = 8,
    ):
        self.info = info
        self.views = [check_view(view, info) for view in views]
        self.chunk_size, self.kept_episodes = chunk_size, kept_episodes
        self.episodes = choose_episodes(info, episodes)
        self._ends = np.cumsum([episode.length for episode in self.episodes])
        self._kept: OrderedDict[int, WindowDataset] = OrderedDict()

    @property
    def part(self) -> Part:
        """Say how its order is made: windows of as many episodes as are kept."""
        return Part(tuple(episode.length for episode in self.episodes), self.kept_episodes)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, i: int) -> Sample:
        position, frame = self._position(i)
        return self._open(position)[frame]

    def locate(self, i: int) -> tuple[Episode, int]:
        """Say which episode sample `i` is from, and at which of its frames."""
        position, frame = self._position(i)
        return self.episodes[position], frame

    @property
    def tasks(self) -> list[str]:
        """Give the instruction of every sample, as `meta/` has it."""
        any_task = next(iter(self.info.tasks.values()), "")
        return [(e.tasks or (any_task,))[0] for e in self.episodes for _ in range(e.length)]

    def numbers(self) -> WindowDataset:
        """Fetch its states, actions and instructions in one pass: a dataset of as many samples, without pictures.

        Where `on_error` is `skip`, it has fewer: its `info.left_out` says which episodes were no use, and why.
        """
        self._check_size()
        info = replace(self.info, **self._read_all())
        if info.on_error == "skip":
            info = leave_out_faulty(info)
        if lost := info.left_out[len(self.info.left_out) :]:
            logger.warning("%s: %d episodes' numbers are left out, the first: %s", info.name, len(lost), lost[0])
        return WindowDataset(info, [], self.chunk_size)

    def windows(self, indices: Sequence[int]) -> Window:
        """Fetch states and action chunks of many samples, without their pictures."""
        places = [self._position(int(i)) for i in indices]
        parts: dict[int, Window] = {}
        for position in sorted({position for position, _ in places}):
            own = [k for k, (p, _) in enumerate(places) if p == position]
            found = self._fetch(position, _NUMBERS, []).windows([places[k][1] for k in own])
            parts |= {k: Window(*row) for k, row in zip(own, zip(*found, strict=True), strict=True)}
        return Window(*map(np.stack, zip(*(parts[k] for k in range(len(places))), strict=True)))

    def _position(self, i: int) -> tuple[int, int]:
        if not 0 <= i < len(self):
            raise IndexError(f"Sample {i} of {len(self)}.")
        position = int(np.searchsorted(self._ends, i, side="right"))
        return position, int(i - self._ends[position] + self.episodes[position].length)

    def _open(self, position: int) -> WindowDataset:
        if position not in self._kept:
            cameras = {self.info.camera_keys[view.camera] for view in self.views}
            self._kept[position] = self._fetch(position, [*_NUMBERS, *cameras], self.views)
        self._kept.move_to_end(position)
        if len(self._kept) > self.kept_episodes:
            self._kept.popitem(last=False)
        return self._kept[position]

    def _fetch(self, position: int, names: Sequence[str], views: Sequence[ViewLike]) -> WindowDataset:
        episode = self.episodes[position]
        rows = self.info.shards.rows(episode, names)
        return WindowDataset(replace(self.info, episodes=(episode,), table=rows), views, self.chunk_size)

    def _check_size(self) -> None:
        if len(self) > _MOST_ROWS:
            raise ValueError(
                f"{self.info.name}: {len(self)} samples are too many to hold the numbers of all of them in memory, as was "
                "asked. Choose fewer episodes, or a head other than 'discrete'."
            )

    def _read_all(self) -> dict[str, Any]:
        """Read the rows of all episodes that can be, one behind the other, as fields of a `DatasetInfo`."""
        tables, episodes, faults, first_row = [], [], [], 0
        for episode in self.episodes:
            try:
                tables.append(self.info.shards.rows(episode, _NUMBERS).data)
            except ValueError as error:
                if self.info.on_error == "raise":
                    raise
                faults.append(str(error))
                continue
            episodes.append(replace(episode, first_row=first_row))
            first_row += episode.length
        if not tables:
            raise ValueError(f"{self.info.name}: none of {len(faults)} episodes can be read, the first: {faults[0]}")
        rows = Rows(pa.concat_tables(tables, promote_options="permissive"))
        return {"episodes": tuple(episodes), "table": rows, "left_out": (*self.info.left_out, *faults)}

    def __getstate__(self):
        return {**self.__dict__, "_kept": OrderedDict()}
