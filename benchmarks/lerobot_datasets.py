"""The datasets that LeRobot and this project are both given: the same episodes, each way of storing them.

Letters: N rows of an episode.
"""

import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from hf_vla.data.lerobot_format import Episode, open_dataset
from hf_vla.data.lerobot_writer import LeRobotWriter, image_feature, vector_feature
from hf_vla.data.windows import WindowDataset
from hf_vla.recipe import View
from hf_vla.sample import ACTION, STATE

SAMPLE = Path(__file__).resolve().parent.parent / "tests/data/metaworld_sample"

_JPEG_QUALITY = 95


def rewrite(source: Path, store: str, to: Path) -> Path:
    """Write a dataset's episodes again, its pictures stored as `jpeg`, `png`, `h264` or `av1`."""
    info = open_dataset(source)
    data = WindowDataset(info, [View(camera) for camera in info.cameras], 1)
    is_video = store in ("h264", "av1")
    sizes = [picture.shape[:2] for picture in data.pictures(0)]
    features = {
        key: image_feature(*size, "video" if is_video else "image")
        for key, size in zip(info.camera_keys.values(), sizes, strict=True)
    }
    features |= {key: vector_feature(info.names[key]) for key in (STATE, ACTION)}
    with LeRobotWriter(to, round(info.fps), features, video_codec=store if is_video else "h264") as writer:
        start = 0
        for episode in info.episodes:
            rows = range(start, start + episode.length)
            views = zip(*(data.pictures(i) for i in rows), strict=True)
            columns = {
                key: [as_jpeg(picture) for picture in pictures] if store == "jpeg" else pictures
                for key, pictures in zip(info.camera_keys.values(), views, strict=True)
            }
            columns |= {STATE: data.states[rows], ACTION: data.actions[rows]}
            writer.add_episode(columns, [data.tasks[i] for i in rows])
            start = rows.stop
        return writer.finish()


def as_jpeg(picture: np.ndarray) -> bytes:
    """Encode one (H, W, 3) uint8 picture."""
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "JPEG", quality=_JPEG_QUALITY)
    return stream.getvalue()


def make_whole(source: Path, to: Path) -> Path:
    """Copy the episodes of a v2.1 folder that are on disk, as a dataset of just those: LeRobot reads no part of one."""
    info = open_dataset(source)
    meta = json.loads((source / "meta/info.json").read_text())
    first_rows = np.cumsum([0, *(episode.length for episode in info.episodes)]).tolist()
    for index, episode in enumerate(info.episodes):
        place = {"episode_chunk": 0, "episode_index": index}
        _copy_rows(source / episode.file, to / meta["data_path"].format(**place), index, first_rows[index])
        for name, span in episode.videos.items():
            copy = to / meta["video_path"].format(video_key=info.camera_keys[name], **place)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / span.file, copy)
    (to / "meta").mkdir()
    shutil.copyfile(source / "meta/tasks.jsonl", to / "meta/tasks.jsonl")
    for name in ("episodes.jsonl", "episodes_stats.jsonl"):
        _copy_lines(source / "meta" / name, to / "meta" / name, info.episodes)
    count = len(info.episodes)
    meta |= {"total_episodes": count, "total_frames": first_rows[-1], "splits": {"train": f"0:{count}"}}
    meta |= {"total_videos": count * len(info.cameras)}
    (to / "meta/info.json").write_text(json.dumps(meta, indent=4))
    return to


def _copy_rows(source: Path, to: Path, index: int, first_row: int) -> None:
    rows = pq.read_table(source)
    columns = {"episode_index": np.full(len(rows), index), "index": first_row + np.arange(len(rows))}
    for name, values in columns.items():
        rows = rows.set_column(rows.schema.get_field_index(name), rows.schema.field(name), pa.array(values))
    to.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(rows, to)


def _copy_lines(source: Path, to: Path, episodes: Sequence[Episode]) -> None:
    """Keep the lines of these episodes, numbered from 0; statistics of what is renumbered move along."""
    lines = {row["episode_index"]: row for row in map(json.loads, source.read_text().splitlines())}
    kept = [lines[episode.index] | {"episode_index": index} for index, episode in enumerate(episodes)]
    first_row = 0
    for row, episode in zip(kept, episodes, strict=True):
        for name, start in (("episode_index", row["episode_index"]), ("index", first_row)):
            _move(row.get("stats", {}).get(name, {}), start)
        first_row += episode.length
    to.write_text("".join(json.dumps(row) + "\n" for row in kept))


def _move(stats: dict[str, list], start: int) -> None:
    """Let the statistics of a running number begin at `start`."""
    if stats:
        shift = start - stats["min"][0]
        stats |= {name: [value + shift for value in stats[name]] for name in ("min", "max", "mean")}
