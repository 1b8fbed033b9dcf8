"""The `meta/` folder of a LeRobot dataset, versions 2.0, 2.1 and 3.0, read into one description of what should be on disk.

Source: the layouts that lerobot 0.4 reads (`lerobot/datasets/lerobot_dataset.py`); v2.1 and v3.0 checked against real files.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hf_vla.sample import IMAGES


@dataclass(frozen=True)
class VideoSpan:
    """Where one episode lies in a video file, which it may share with others."""

    file: str
    """Relative to the dataset's folder."""
    start: float
    """Seconds into the file at which the episode's first frame stands."""


@dataclass(frozen=True)
class DescribedEpisode:
    """One episode as `meta/` has it, whether or not its files are there."""

    index: int
    length: int
    tasks: tuple[str, ...]
    file: str
    """Its parquet file, relative to the dataset's folder."""
    videos: dict[str, VideoSpan]
    """By camera name; cameras that are embedded in the parquet file aren't in it."""

    @property
    def files(self) -> list[str]:
        """Name all files that it lies in."""
        return [self.file, *(span.file for span in self.videos.values())]


@dataclass(frozen=True)
class Meta:
    """All that `meta/` says, in one form for every version."""

    version: str
    fps: float
    features: dict[str, dict[str, Any]]
    camera_keys: dict[str, str]
    """Camera name to its feature's key, in the dataset's order."""
    tasks: dict[int, str]
    episodes: list[DescribedEpisode]
    stats: dict[str, dict[str, Any]]
    """Over the whole dataset; empty where the version has none."""


def read_meta(root: Path) -> Meta:
    """Read `meta/` of the dataset in `root`.

    Raises:
        FileNotFoundError: where a file of `meta/` is missing.
        ValueError: for a file that can't be read, or a version that this reader doesn't know.
    """
    if not (root / "meta/info.json").is_file():
        raise FileNotFoundError(f"{root}: not a LeRobot dataset, it has no meta/info.json.")
    info = _json(root / "meta/info.json")
    for key in ("codebase_version", "fps", "features"):
        if key not in info:
            raise ValueError(f"{root / 'meta/info.json'}: the key {key!r} is missing; every LeRobot dataset has it.")
    layout = _layout(str(info["codebase_version"]), root)
    camera_keys = {_camera_name(key): key for key, feature in info["features"].items() if _is_camera(key, feature)}
    return Meta(
        version=info["codebase_version"],
        fps=float(info["fps"]),
        features=info["features"],
        camera_keys=camera_keys,
        tasks=layout.read_tasks(root),
        episodes=layout.read_episodes(root, info, camera_keys),
        stats=_json(root / "meta/stats.json") if (root / "meta/stats.json").is_file() else {},
    )


def _layout(version: str, root: Path) -> "_Layout":
    major = version.lstrip("v").split(".")[0]
    if major not in _LAYOUTS:
        raise ValueError(
            f"{root}: LeRobot format {version}; readable are v2.0, v2.1 and v3.0. Convert it with the scripts of the "
            "lerobot package (lerobot.datasets.v30.convert_dataset_v21_to_v30 and its predecessors)."
        )
    return _LAYOUTS[major]


def _is_camera(key: str, feature: dict[str, Any]) -> bool:
    info = feature.get("info") or feature.get("video_info") or {}
    is_depth = info.get("video.is_depth_map") or info.get("is_depth_map")
    return feature.get("dtype") in ("image", "video") and not is_depth


def _camera_name(key: str) -> str:
    return key.removeprefix(IMAGES + ".").removeprefix("observation.")


# v3.0: many episodes a file, tables in parquet -------------------------------------------------------------------------


def _read_episodes_v3(root: Path, info: dict[str, Any], camera_keys: dict[str, str]) -> list[DescribedEpisode]:
    files = sorted((root / "meta/episodes").rglob("*.parquet"))
    if not files:
        raise FileNotFoundError(f"{root}: format v3.0, but meta/episodes holds no parquet file.")
    rows = [row for file in files for row in _episode_table(file).to_pylist()]
    return [_episode_v3(row, info, camera_keys) for row in sorted(rows, key=lambda row: row["episode_index"])]


def _episode_table(file: Path) -> pa.Table:
    """Read a table of episodes without its hundreds of `stats/` columns."""
    try:
        columns = [name for name in pq.read_schema(file).names if not name.startswith("stats/")]
        return pq.read_table(file, columns=columns)
    except pa.ArrowInvalid as error:
        raise _unreadable(file, error) from None


def _episode_v3(row: dict[str, Any], info: dict[str, Any], camera_keys: dict[str, str]) -> DescribedEpisode:
    videos = {
        camera: VideoSpan(
            file=info["video_path"].format(
                video_key=key,
                chunk_index=row[f"videos/{key}/chunk_index"],
                file_index=row[f"videos/{key}/file_index"],
            ),
            start=float(row[f"videos/{key}/from_timestamp"]),
        )
        for camera, key in camera_keys.items()
        if f"videos/{key}/file_index" in row
    }
    file = info["data_path"].format(chunk_index=row["data/chunk_index"], file_index=row["data/file_index"])
    return DescribedEpisode(row["episode_index"], row["length"], tuple(row.get("tasks") or ()), file, videos)


def _read_tasks_v3(root: Path) -> dict[int, str]:
    file = root / "meta/tasks.parquet"
    if not file.is_file():
        raise FileNotFoundError(f"{root}: format v3.0, but meta/tasks.parquet is missing: instructions come from it.")
    try:
        table = pq.read_table(file)
    except pa.ArrowInvalid as error:
        raise _unreadable(file, error) from None
    # The text is the frame's pandas index, stored as `task` or `__index_level_0__` according to the writer's version.
    text = next(
        field.name for field in table.schema if pa.types.is_string(field.type) or pa.types.is_large_string(field.type)
    )
    return dict(zip(table["task_index"].to_pylist(), table[text].to_pylist(), strict=True))


# v2.0 and v2.1: one episode a file, tables in JSON lines ---------------------------------------------------------------


def _read_episodes_v2(root: Path, info: dict[str, Any], camera_keys: dict[str, str]) -> list[DescribedEpisode]:
    rows = _json_lines(root / "meta/episodes.jsonl")
    return [_episode_v2(row, info, camera_keys) for row in sorted(rows, key=lambda row: row["episode_index"])]


def _episode_v2(row: dict[str, Any], info: dict[str, Any], camera_keys: dict[str, str]) -> DescribedEpisode:
    index = row["episode_index"]
    place = {"episode_chunk": index // info.get("chunks_size", 1000), "episode_index": index}
    videos = {
        camera: VideoSpan(info["video_path"].format(video_key=key, **place), 0.0)
        for camera, key in camera_keys.items()
        if info["features"][key]["dtype"] == "video"
    }
    return DescribedEpisode(index, row["length"], tuple(row["tasks"]), info["data_path"].format(**place), videos)


def _read_tasks_v2(root: Path) -> dict[int, str]:
    return {row["task_index"]: row["task"] for row in _json_lines(root / "meta/tasks.jsonl")}


@dataclass(frozen=True)
class _Layout:
    read_episodes: Callable[[Path, dict[str, Any], dict[str, str]], list[DescribedEpisode]]
    read_tasks: Callable[[Path], dict[int, str]]


_LAYOUTS = {"2": _Layout(_read_episodes_v2, _read_tasks_v2), "3": _Layout(_read_episodes_v3, _read_tasks_v3)}


def _json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise _unreadable(file, error) from None


def _json_lines(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: missing, and a LeRobot dataset of format v2 needs it.")
    try:
        return [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
    except ValueError as error:
        raise _unreadable(file, error) from None


def _unreadable(file: Path, error: Exception) -> ValueError:
    return ValueError(f"{file}: can't be read ({error}); it may be cut short. Fetch or record it again.")
