"""Tiny LeRobot folders in which every number says where it belongs, written from the format's description alone.

State and action of a frame are [episode, frame, episode + frame / 100]; the picture of camera c is one colour,
(10 * episode, frame, 100 * c).
"""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

CAMERAS = ("front", "wrist")
LENGTHS = (5, 7, 3, 6)
TASKS = ("open the door", "close the door")
SIZE = 8
FPS = 10
PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
VECTOR = {"dtype": "float32", "shape": [3], "names": ["x", "y", "gripper"]}


def colour(episode: int, frame: int, camera: int) -> tuple[int, int, int]:
    return (10 * episode, frame, 100 * camera)


def task_of(episode: int) -> int:
    return episode % 2


def encode(rgb: tuple[int, int, int]) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (SIZE, SIZE), rgb).save(stream, "PNG")
    return stream.getvalue()


def episode_rows(episode: int, start: int, lengths=LENGTHS) -> dict[str, list]:
    frames = range(lengths[episode])
    vectors = [[episode, frame, episode + frame / 100] for frame in frames]
    pictures = {
        f"observation.images.{name}": [{"bytes": encode(colour(episode, f, c)), "path": None} for f in frames]
        for c, name in enumerate(CAMERAS)
    }
    return {
        **pictures,
        "observation.state": vectors,
        "action": vectors,
        "timestamp": [frame / FPS for frame in frames],
        "frame_index": list(frames),
        "episode_index": [episode] * len(frames),
        "index": [start + frame for frame in frames],
        "task_index": [task_of(episode)] * len(frames),
    }


def to_table(rows: dict[str, list]) -> pa.Table:
    types = {
        "observation.state": pa.list_(pa.float32()),
        "action": pa.list_(pa.float32(), 3),
        "timestamp": pa.float32(),
    }
    types |= {f"observation.images.{name}": PICTURE for name in CAMERAS}
    return pa.table({key: pa.array(values, types.get(key, pa.int64())) for key, values in rows.items()})


def info(version: str, data_path: str, **changes) -> dict:
    picture = {"dtype": "image", "shape": [SIZE, SIZE, 3], "names": ["height", "width", "channels"]}
    features = {f"observation.images.{name}": picture for name in CAMERAS}
    features |= {
        "observation.state": VECTOR,
        "action": VECTOR,
        "timestamp": {"dtype": "float32", "shape": [1], "names": None},
    }
    return {
        "codebase_version": version,
        "fps": FPS,
        "features": features,
        "data_path": data_path,
        "chunks_size": 2,
        **changes,
    }


def write_v3(root: Path, drop: tuple[str, ...] = (), stats: dict | None = None, lengths=LENGTHS, **changes) -> Path:
    """Write a v3.0 folder: two data files with two episodes each. `drop` names columns to leave out."""
    data_path = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
    starts = np.cumsum([0, *lengths]).tolist()
    episodes = [
        {
            "episode_index": i,
            "tasks": [TASKS[task_of(i)]],
            "length": length,
            "data/chunk_index": 0,
            "data/file_index": i // 2,
            "dataset_from_index": starts[i],
            "dataset_to_index": starts[i + 1],
            "stats/action/mean": [0.0, 0.0, 0.0],
        }
        for i, length in enumerate(lengths)
    ]
    for file in range((len(lengths) + 1) // 2):
        tables = [
            to_table(episode_rows(i, starts[i], lengths)) for i in range(2 * file, min(2 * file + 2, len(lengths)))
        ]
        path = root / data_path.format(chunk_index=0, file_index=file)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.concat_tables(tables).drop_columns(list(drop)), path)
    (root / "meta/episodes/chunk-000").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(episodes), root / "meta/episodes/chunk-000/file-000.parquet")
    pq.write_table(pa.table({"task_index": [0, 1], "__index_level_0__": TASKS}), root / "meta/tasks.parquet")
    (root / "meta/info.json").write_text(json.dumps(info("v3.0", data_path, **changes)))
    if stats is not None:
        (root / "meta/stats.json").write_text(json.dumps(stats))
    return root


def write_v2(root: Path, drop: tuple[str, ...] = (), lengths=LENGTHS, **changes) -> Path:
    """Write a v2.1 folder: a data file for each episode, two episodes a chunk."""
    data_path = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
    starts = np.cumsum([0, *lengths]).tolist()
    for i in range(len(lengths)):
        path = root / data_path.format(episode_chunk=i // 2, episode_index=i)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(to_table(episode_rows(i, starts[i], lengths)).drop_columns(list(drop)), path)
    (root / "meta").mkdir()
    episodes = [
        {"episode_index": i, "tasks": [TASKS[task_of(i)]], "length": length} for i, length in enumerate(lengths)
    ]
    write_lines(root / "meta/episodes.jsonl", episodes)
    write_lines(root / "meta/tasks.jsonl", [{"task_index": i, "task": text} for i, text in enumerate(TASKS)])
    (root / "meta/info.json").write_text(json.dumps(info("v2.1", data_path, **changes)))
    return root


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
