"""Several LeRobotDataset v3.0 folders to one: rows are copied and renumbered, pictures and videos are not decoded.

Letters: D dimensions of a column.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from hf_vla.data.lerobot_stats import QUANTILES, vector_stats
from hf_vla.data.lerobot_writer import DATA_PATH, EPISODES_PATH, FILES_PER_CHUNK, VIDEO_PATH
from hf_vla.data.running_stats import RunningStats

_MB = 1024**2


def merge_datasets(
    parts: Sequence[Path],
    root: Path,
    recording: Mapping[str, Any] | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Path:
    """Put datasets that `LeRobotWriter` wrote with the same features after one another; the result is whole or not there.

    Statistics of vectors are taken anew from all rows; those of pictures from what each episode has of them, quantiles as
    means weighted by the number of pictures, which is how LeRobot itself aggregates.

    Args:
        parts: folders, in the order that their episodes will have.
        root: the folder that will be the dataset; must not exist yet.
        recording: kept as `meta/recording.json`.
        progress: called with the number of each part that is done.

    Raises:
        FileExistsError: where `root` is already there.
        ValueError: where features or rates differ, naming the part.
    """
    if root.exists():
        raise FileExistsError(f"{root} is already there; remove it, or write the dataset to another folder.")
    infos = [json.loads((part / "meta/info.json").read_text()) for part in parts]
    _check_alike(parts, infos)
    partial = Path(tempfile.mkdtemp(prefix=f".{root.name}.partial-", dir=root.parent))
    partial.chmod(0o755)
    try:
        merged = _Merged(partial, infos[0])
        for number, part in enumerate(parts):
            merged.add(part)
            progress(number)
        merged.finish(recording)
        partial.rename(root)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return root


def _check_alike(parts: Sequence[Path], infos: list[dict[str, Any]]) -> None:
    for part, info in zip(parts, infos, strict=True):
        for key in ("fps", "features"):
            if info[key] != infos[0][key]:
                raise ValueError(
                    f"{part}: its {key} differ from those of {parts[0]}: {_difference(info, infos[0], key)}."
                )


def _difference(info: dict[str, Any], first: dict[str, Any], key: str) -> str:
    if key == "fps":
        return f"{info[key]} and {first[key]}"
    names = [name for name in {*info[key], *first[key]} if info[key].get(name) != first[key].get(name)]
    return "; ".join(f"{name}: {info[key].get(name)} and {first[key].get(name)}" for name in sorted(names))


class _Merged:
    """The dataset that grows."""

    def __init__(self, root: Path, info: dict[str, Any]):
        self._root, self._info = root, info
        self._videos = [key for key, feature in info["features"].items() if feature["dtype"] == "video"]
        self._tasks: dict[str, int] = {}
        self._episodes, self._frames = 0, 0
        self._data_file, self._video_files = 0, dict.fromkeys(self._videos, 0)
        self._data: pq.ParquetWriter | None = None
        self._table: pq.ParquetWriter | None = None
        self._vectors: dict[str, RunningStats] = {}
        self._pictures: dict[str, _PictureStats] = {}

    def add(self, part: Path) -> None:
        """Append one dataset's episodes."""
        table = pd.read_parquet(part / "meta/tasks.parquet")
        renumbered = {
            int(i): self._tasks.setdefault(text, len(self._tasks)) for text, i in table["task_index"].items()
        }
        places = self._add_data(part, renumbered)
        video_offsets = {key: self._link_videos(part, key) for key in self._videos}
        for file in sorted((part / "meta/episodes").rglob("*.parquet")):
            rows = pq.read_table(file)
            self._count_pictures(rows)
            self._write_episodes(rows, places, video_offsets)
        self._episodes += len(places)
        self._frames += sum(place.length for place in places)

    def finish(self, recording: Mapping[str, Any] | None) -> None:
        """Write the metadata."""
        for writer in (self._data, self._table):
            writer.close()
        meta = self._root / "meta"
        tasks = pd.DataFrame({"task_index": list(self._tasks.values())}, index=pd.Index(self._tasks, name="task"))
        tasks.to_parquet(meta / "tasks.parquet")
        stats = {key: counted.stats() for key, counted in (self._pictures | self._vectors).items()}
        totals = {"total_episodes": self._episodes, "total_frames": self._frames, "total_tasks": len(self._tasks)}
        info = self._info | totals | {"splits": {"train": f"0:{self._episodes}"}}
        files = {"stats": stats, "info": info} | ({} if recording is None else {"recording": recording})
        for name, content in files.items():
            text = json.dumps(content, indent=4, ensure_ascii=False) + "\n"
            (meta / f"{name}.json").write_text(text, encoding="utf-8")

    def _add_data(self, part: Path, tasks: dict[int, int]) -> list["_Copied"]:
        """Copy the rows an episode at a time."""
        places: list[_Copied] = []
        for file in sorted((part / "data").rglob("*.parquet")):
            source = pq.ParquetFile(file)
            for group in range(source.num_row_groups):
                rows = source.read_row_group(group)
                writer = self._data_writer(rows.schema)
                rows = self._renumber(rows, self._episodes + len(places), tasks, sum(p.length for p in places))
                writer.write_table(rows, row_group_size=len(rows))
                self._count_vectors(rows)
                of_tasks = vector_stats(rows["task_index"].to_numpy()[:, None])
                places.append(_Copied(self._data_file, len(rows), of_tasks))
        return places

    def _data_writer(self, schema: pa.Schema) -> pq.ParquetWriter:
        path = self._root / DATA_PATH.format(**_place(self._data_file))
        if self._data is not None and path.stat().st_size >= self._info["data_files_size_in_mb"] * _MB:
            self._data.close()
            self._data, self._data_file = None, self._data_file + 1
            path = self._root / DATA_PATH.format(**_place(self._data_file))
        if self._data is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._data = pq.ParquetWriter(path, schema, use_dictionary=False)
        return self._data

    def _renumber(self, rows: pa.Table, episode: int, tasks: dict[int, int], before: int) -> pa.Table:
        columns = {
            "episode_index": np.full(len(rows), episode),
            "index": self._frames + before + np.arange(len(rows)),
            "task_index": np.array([tasks[index] for index in rows["task_index"].to_pylist()]),
        }
        for name, values in columns.items():
            place = rows.schema.get_field_index(name)
            rows = rows.set_column(place, rows.schema.field(place), pa.array(values, pa.int64()))
        return rows

    def _link_videos(self, part: Path, key: str) -> int:
        """Give the part's video files the next numbers; return how far theirs moved."""
        offset = self._video_files[key]
        files = sorted((part / "videos" / key).rglob("*.mp4"))
        for number, file in enumerate(files, offset):
            path = self._root / VIDEO_PATH.format(video_key=key, **_place(number))
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(file, path)
            except OSError:  # another file system, or one that knows no links
                shutil.copyfile(file, path)
        self._video_files[key] = offset + len(files)
        return offset

    def _write_episodes(self, rows: pa.Table, places: list["_Copied"], video_offsets: dict[str, int]) -> None:
        changed = {name: rows[name].to_numpy() for name in ("episode_index", "dataset_from_index", "dataset_to_index")}
        copied = [places[index] for index in changed["episode_index"]]
        columns = {
            "episode_index": changed["episode_index"] + self._episodes,
            "dataset_from_index": changed["dataset_from_index"] + self._frames,
            "dataset_to_index": changed["dataset_to_index"] + self._frames,
            **_columns_of("data", [place.file for place in copied]),
        }
        for key, offset in video_offsets.items():
            chunks, files = (rows[f"videos/{key}/{name}_index"].to_numpy() for name in ("chunk", "file"))
            columns |= _columns_of(f"videos/{key}", (chunks * FILES_PER_CHUNK + files + offset).tolist())
        columns |= {key: values for key, values in self._index_stats(rows, copied).items() if key in rows.column_names}
        for name, values in columns.items():
            place = rows.schema.get_field_index(name)
            rows = rows.set_column(place, rows.schema.field(place), pa.array(values, rows.schema.field(place).type))
        if self._table is None:
            path = self._root / EPISODES_PATH
            path.parent.mkdir(parents=True, exist_ok=True)
            self._table = pq.ParquetWriter(path, rows.schema)
        self._table.write_table(rows)

    def _index_stats(self, rows: pa.Table, copied: list["_Copied"]) -> dict[str, list]:
        """Move the statistics of the columns that were renumbered; those of tasks, whose order can change, are new."""
        shifts = {"episode_index": self._episodes, "index": self._frames}
        moved = {}
        for name, shift in shifts.items():
            for kind in ("min", "max", "mean", *QUANTILES):
                key = f"stats/{name}/{kind}"
                if key in rows.column_names:
                    moved[key] = [[value + shift for value in row] for row in rows[key].to_pylist()]
        tasks = {f"stats/task_index/{kind}": [place.tasks[kind] for place in copied] for kind in copied[0].tasks}
        return moved | tasks

    def _count_vectors(self, rows: pa.Table) -> None:
        for field in rows.schema:
            if pa.types.is_struct(field.type):
                continue
            values = np.stack(rows[field.name].to_numpy()).reshape(len(rows), -1)
            self._vectors.setdefault(field.name, RunningStats(values.shape[1])).add(values)

    def _count_pictures(self, rows: pa.Table) -> None:
        for key, feature in self._info["features"].items():
            if feature["dtype"] in ("image", "video"):
                self._pictures.setdefault(key, _PictureStats()).add(key, rows)


class _Copied(NamedTuple):
    """One episode's rows in the dataset that grows."""

    file: int
    """Number of its data file."""
    length: int
    tasks: dict[str, list]
    """Statistics of its `task_index`."""


class _PictureStats:
    """Statistics of one camera's pictures, gathered from those of its episodes."""

    def __init__(self):
        self._rows: dict[str, list[np.ndarray]] = {}

    def add(self, key: str, rows: pa.Table) -> None:
        for name in ("min", "max", "mean", "std", "count", *QUANTILES):
            found = rows[f"stats/{key}/{name}"].to_pylist()
            self._rows.setdefault(name, []).extend(np.asarray(row, np.float64) for row in found)

    def stats(self) -> dict[str, list]:
        rows = {name: np.stack(values) for name, values in self._rows.items()}
        weights = rows["count"].reshape(-1, 1, 1, 1) / rows["count"].sum()
        mean = (weights * rows["mean"]).sum(0)
        spread = (weights * (rows["std"] ** 2 + (rows["mean"] - mean) ** 2)).sum(0)
        stats = {"min": rows["min"].min(0), "max": rows["max"].max(0), "mean": mean, "std": np.sqrt(spread)}
        stats |= {name: (weights * rows[name]).sum(0) for name in QUANTILES}
        return {name: value.tolist() for name, value in stats.items()} | {"count": [int(rows["count"].sum())]}


def _place(number: int) -> dict[str, int]:
    return {"chunk_index": number // FILES_PER_CHUNK, "file_index": number % FILES_PER_CHUNK}


def _columns_of(prefix: str, numbers: list[int]) -> dict[str, list[int]]:
    return {f"{prefix}/{name}": [_place(number)[name] for number in numbers] for name in ("chunk_index", "file_index")}
