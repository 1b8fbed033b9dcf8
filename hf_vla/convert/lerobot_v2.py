"""LeRobot v2.0 and v2.1 folders, an episode a file, to v3.0, many a file: numbers, JPEG files and video packets are copied.

Letters: N rows of an episode, D dimensions of a column.
"""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from hf_vla.data import columns
from hf_vla.data.frames import Frames
from hf_vla.data.lerobot_format import DatasetInfo, Episode, open_dataset
from hf_vla.data.lerobot_writer import INDEX_FEATURES, LeRobotWriter, VideoFile
from hf_vla.data.windows import open_frames

logger = logging.getLogger(__name__)

_TOLERANCE = 1e-3
"""Seconds that a row may stand beside its place in an even rate, which v3.0 counts on; LeRobot itself allows a tenth."""


def to_v3(source: Path, out: Path, progress: Callable[[int, int], None] = lambda done, of: None) -> Path:
    """Convert a folder; the result is whole or not there.

    Episodes that aren't on disk are left out, and the others renumbered.

    Statistics are counted anew, with the quantiles that v2.1 lacks: of vectors from all rows, of cameras from ten pictures
    of each episode.

    Args:
        source: folder of a LeRobot dataset.
        out: the folder that will be the dataset; must not exist yet.
        progress: called with how many episodes of how many are done.

    Raises:
        FileExistsError: where `out` is there.
        ValueError: for a file that can't be read, a rate that isn't even and whole, or a column that v3.0 has no place for.
    """
    info = open_dataset(source)
    fps = round(info.fps)
    readers = {key: open_frames(info, name, 0) for name, key in info.camera_keys.items()}
    features = {key: f for key, f in info.features.items() if key not in INDEX_FEATURES and _is_there(info, key)}
    features |= {key: features[key] | _true_shape(info, reader) for key, reader in readers.items()}
    robot = json.loads((info.root / "meta/info.json").read_text()).get("robot_type")
    with LeRobotWriter(out, fps, features, robot) as writer:
        for done, episode in enumerate(info.episodes, 1):
            _check_times(info, episode, fps)
            rows = {key: _column(info, episode, key, readers.get(key)) for key in features}
            writer.add_episode(rows, _tasks(info, episode))
            progress(done, len(info.episodes))
        return writer.finish()


def _is_there(info: DatasetInfo, key: str) -> bool:
    is_there = key in info.camera_keys.values() or key in info.table.column_names
    if not is_there:
        logger.warning("%s: %s has no column and no pictures, and is left out.", info.name, key)
    return is_there


def _true_shape(info: DatasetInfo, reader: Frames) -> dict[str, list]:
    """Describe pictures as they are decoded: recordings say channels first, or sizes that never were."""
    return {"shape": list(reader.read(info.episodes[0], 0).shape), "names": ["height", "width", "channels"]}


def _column(info: DatasetInfo, episode: Episode, key: str, reader: Frames | None) -> Any:
    """Give (N, D) numbers, encoded pictures as they are, or the video file to copy."""
    if reader is None:
        return columns.matrix(info.table, key, episode.first_row, episode.length)
    camera = next(name for name, camera_key in info.camera_keys.items() if camera_key == key)
    if camera in episode.videos:
        return VideoFile(info.root / episode.videos[camera].file, reader, episode)
    cells = info.table.data.column(key).slice(episode.first_row, episode.length).to_pylist()
    return [cell["bytes"] or (info.root / cell["path"]).read_bytes() for cell in cells]


def _tasks(info: DatasetInfo, episode: Episode) -> list[str]:
    if "task_index" not in info.table.column_names:
        return [episode.tasks[0]] * episode.length
    indices = columns.matrix(info.table, "task_index", episode.first_row, episode.length)[:, 0]
    return [info.tasks[index] for index in indices.tolist()]


def _check_times(info: DatasetInfo, episode: Episode, fps: int) -> None:
    if "timestamp" not in info.table.column_names:
        return
    seconds = columns.matrix(info.table, "timestamp", episode.first_row, episode.length)[:, 0]
    off = np.abs(seconds - np.arange(episode.length) / fps).max()
    if off > _TOLERANCE:
        raise ValueError(
            f"{info.root / episode.file}: episode {episode.index} has a row {off:.4f} s off an even {fps} rows a second, "
            "and v3.0 has no place for uneven time. Record or resample it at one whole rate."
        )
