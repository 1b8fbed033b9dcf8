"""Write a LeRobotDataset v3.0 folder, episode by episode, in little memory; it appears whole or not at all.

Source: the layout that lerobot 0.4 reads (`lerobot/datasets/lerobot_dataset.py`); `benchmarks/lerobot_opens_written.py`
has LeRobot itself open what is written here.
"""

import io
import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from hf_vla.data.frames import Frames
from hf_vla.data.lerobot_format import Episode
from hf_vla.data.lerobot_stats import PictureStats, vector_stats

VERSION = "v3.0"
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
EPISODES_PATH = "meta/episodes/chunk-000/file-000.parquet"
FILES_PER_CHUNK = 1000

INDEX_FEATURES = {
    "timestamp": {"dtype": "float32", "shape": [1], "names": None},
    **{
        name: {"dtype": "int64", "shape": [1], "names": None}
        for name in ("frame_index", "episode_index", "index", "task_index")
    },
}

_PICTURES_COUNTED = 10
"""Pictures of an episode that its statistics are taken from, evenly spaced."""
_EPISODES_BUFFERED = 100
_MB = 1024**2


def image_feature(height: int, width: int, storage: str = "image") -> dict[str, Any]:
    """Describe a camera; `storage` is `image` (embedded in the parquet file) or `video` (mp4 beside it)."""
    return {"dtype": storage, "shape": [height, width, 3], "names": ["height", "width", "channels"]}


def vector_feature(names: Sequence[str], dtype: str = "float32") -> dict[str, Any]:
    """Describe a vector, such as the state or the action, by the names of its dimensions."""
    return {"dtype": dtype, "shape": [len(names)], "names": list(names)}


class VideoFile(Sequence):
    """A camera of one episode that is a video file of its own already: it is copied, not encoded again.

    Args:
        path: the file; its time 0 is the episode's.
        frames: reads its pictures, a few of which the statistics are taken from.
        episode: as `frames` knows it.
    """

    def __init__(self, path: Path, frames: Frames, episode: Episode):
        self.path, self._frames, self._episode = path, frames, episode

    def __len__(self) -> int:
        return self._episode.length

    def __getitem__(self, k: int) -> np.ndarray:
        return self._frames.read(self._episode, int(k))


class LeRobotWriter:
    """A dataset being written: add episodes, then `finish`; leaving the `with` block without that leaves nothing behind.

    Args:
        root: the folder that will be the dataset; must not exist yet.
        fps: rows a second.
        features: by key, as `image_feature` and `vector_feature` describe them.
        robot_type: LeRobot's word for which robot it is.
        video_codec: of cameras that are stored as video, `h264` or `av1`.
        data_files_size_in_mb: a parquet file that has reached it is followed by a new one.
        video_files_size_in_mb: the same for mp4 files.

    Raises:
        FileExistsError: where `root` is already there.
        ValueError: for a feature that LeRobot has no column for.
    """

    def __init__(
        self,
        root: str | Path,
        fps: int,
        features: Mapping[str, Mapping[str, Any]],
        robot_type: str | None = None,
        video_codec: str = "h264",
        data_files_size_in_mb: int = 100,
        video_files_size_in_mb: int = 200,
    ):
        self.root = Path(root)
        if self.root.exists():
            raise FileExistsError(f"{self.root} is already there; remove it, or write the dataset to another folder.")
        self._fps, self._robot_type, self._codec = fps, robot_type, video_codec
        self._features = {key: dict(feature) for key, feature in features.items()}
        self._cameras = [key for key, feature in self._features.items() if feature["dtype"] in ("image", "video")]
        self._videos = [key for key in self._cameras if self._features[key]["dtype"] == "video"]
        self._schema = _arrow_schema(self._features)
        self._data_limit, self._video_limit = data_files_size_in_mb, video_files_size_in_mb
        self._tasks: dict[str, int] = {}
        self._episodes, self._frames = 0, 0
        self._pictures = {key: PictureStats() for key in self._cameras}
        self._rows: list[dict[str, Any]] = []
        self._data_file = _FileNumber()
        self._video_files = {key: _FileNumber() for key in self._videos}
        self._data_writer: pq.ParquetWriter | None = None
        self._episodes_writer: pq.ParquetWriter | None = None
        self._video_writers: dict[str, Any] = {}
        self.root.parent.mkdir(parents=True, exist_ok=True)
        self._partial = Path(tempfile.mkdtemp(prefix=f".{self.root.name}.partial-", dir=self.root.parent))
        self._partial.chmod(0o755)  # mkdtemp lets nobody else in

    def __enter__(self) -> "LeRobotWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.discard()

    def add_episode(self, columns: Mapping[str, Any], task: str | Sequence[str]) -> None:
        """Append one episode.

        Args:
            columns: by feature key. Vectors: (N, D) numbers. Cameras: N pictures, each (H, W, 3) uint8, or bytes of a
                JPEG or PNG file, which are embedded as they are; or a `VideoFile`.
            task: the instruction, in natural language; of each row, where it changes on the way.

        Raises:
            ValueError: where keys, lengths or sizes aren't those of the features.
        """
        length = self._check(columns)
        tasks = [task] * length if isinstance(task, str) else list(task)
        index = {
            "timestamp": (np.arange(length) / self._fps).astype(np.float32),
            "frame_index": np.arange(length),
            "episode_index": np.full(length, self._episodes),
            "index": np.arange(self._frames, self._frames + length),
            "task_index": np.array([self._tasks.setdefault(text, len(self._tasks)) for text in tasks]),
        }
        vectors = {key: np.asarray(columns[key]) for key in self._features if key not in self._cameras} | index
        row = {"episode_index": self._episodes, "tasks": list(dict.fromkeys(tasks)), "length": length}
        row |= {"dataset_from_index": self._frames, "dataset_to_index": self._frames + length}
        row |= self._write_data(columns, vectors)
        for key in self._videos:
            row |= self._write_video(key, columns[key])
        row |= self._episode_stats(columns, vectors)
        row |= {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}
        self._rows.append(row)
        self._episodes, self._frames = self._episodes + 1, self._frames + length
        if len(self._rows) >= _EPISODES_BUFFERED:
            self._flush_episodes()

    def finish(self, recording: Mapping[str, Any] | None = None) -> Path:
        """Write the metadata, put the folder in its place, and return it.

        Args:
            recording: how it was recorded, kept as `meta/recording.json` for whoever wants the same scene again.

        Raises:
            ValueError: where no episode was added.
        """
        if self._episodes == 0:
            raise ValueError(f"{self.root}: a dataset needs at least one episode; none was added.")
        self._flush_episodes()
        self._close_files()
        meta = self._partial / "meta"
        tasks = pd.DataFrame({"task_index": list(self._tasks.values())}, index=pd.Index(self._tasks, name="task"))
        tasks.to_parquet(meta / "tasks.parquet")
        _write_json(meta / "stats.json", self._dataset_stats())
        _write_json(meta / "info.json", self._info())
        if recording is not None:
            _write_json(meta / "recording.json", recording)
        if self.root.exists():
            raise FileExistsError(f"{self.root} has appeared meanwhile; the recording was not put in its place.")
        self._partial.rename(self.root)
        return self.root

    def discard(self) -> None:
        """Remove what isn't finished; does nothing to a finished dataset."""
        if self._partial.exists():
            try:
                self._close_files()
            finally:
                shutil.rmtree(self._partial)

    def _check(self, columns: Mapping[str, Any]) -> int:
        if set(columns) != set(self._features):
            raise ValueError(f"an episode must have the columns {sorted(self._features)}, not {sorted(columns)}.")
        lengths = {key: len(column) for key, column in columns.items()}
        if len(set(lengths.values())) != 1 or 0 in lengths.values():
            raise ValueError(f"the columns of an episode must have one length of at least 1, not {lengths}.")
        for key, feature in self._features.items():
            for shape in self._row_shapes(key, columns[key]):
                if tuple(shape) != tuple(feature["shape"]):
                    raise ValueError(f"{key}: each row must have the shape {tuple(feature['shape'])}, not {shape}.")
        return lengths[key]

    def _row_shapes(self, key: str, column: Any) -> Iterable[tuple[int, ...]]:
        if isinstance(column, VideoFile):
            return [column[0].shape]
        return map(picture_shape, column) if key in self._cameras else [np.shape(column)[1:]]

    def _write_data(self, columns: Mapping[str, Any], vectors: Mapping[str, np.ndarray]) -> dict[str, int]:
        path = self._partial / DATA_PATH.format(**self._data_file.indices())
        if self._data_writer is not None and path.stat().st_size >= self._data_limit * _MB:
            self._data_writer.close()
            self._data_writer = None
            self._data_file.advance()
            path = self._partial / DATA_PATH.format(**self._data_file.indices())
        if self._data_writer is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._data_writer = pq.ParquetWriter(path, self._schema, use_dictionary=False)
        arrays = [
            _image_array(columns[field.name])
            if field.name in self._cameras
            else _array(vectors[field.name], field.type)
            for field in self._schema
        ]
        table = pa.Table.from_arrays(arrays, schema=self._schema)
        self._data_writer.write_table(table, row_group_size=len(table))  # one group an episode: readable alone
        return {f"data/{name}": index for name, index in self._data_file.indices().items()}

    def _write_video(self, key: str, pictures: Sequence[np.ndarray | bytes]) -> dict[str, Any]:
        copied = pictures.path if isinstance(pictures, VideoFile) else None
        writer = self._video_writers.get(key)
        is_full = writer is not None and writer.size >= self._video_limit * _MB
        if is_full or (writer is not None and copied and not writer.takes(copied)):
            writer.close()
            self._video_files[key].advance()
            writer = None
        if writer is None:
            path = self._partial / VIDEO_PATH.format(video_key=key, **self._video_files[key].indices())
            writer = self._video_writers[key] = self._open_video(path, key, copied)
        start = writer.seconds
        if copied:
            writer.append(copied, len(pictures))
        else:
            for picture in pictures:
                writer.add(_decode(picture))
        row = self._video_files[key].indices() | {"from_timestamp": start, "to_timestamp": writer.seconds}
        return {f"videos/{key}/{name}": value for name, value in row.items()}

    def _open_video(self, path: Path, key: str, copied: Path | None) -> Any:
        try:
            from hf_vla.data.video import VideoCopier, VideoWriter
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"{key} is stored as video, which PyAV writes: pip install 'hf-vla[video]'."
            ) from error
        if copied:
            return VideoCopier(path, copied)
        height, width, _ = self._features[key]["shape"]
        return VideoWriter(path, self._fps, self._codec, height, width)

    def _episode_stats(self, columns: Mapping[str, Any], vectors: Mapping[str, np.ndarray]) -> dict[str, list]:
        stats = {key: vector_stats(values.reshape(len(values), -1)) for key, values in vectors.items()}
        for key in self._cameras:
            counted = PictureStats()
            for index in np.unique(np.linspace(0, len(columns[key]) - 1, _PICTURES_COUNTED).astype(int)):
                counted.add(_decode(columns[key][index]))
            self._pictures[key].merge(counted)
            stats[key] = counted.stats()
        return {f"stats/{key}/{name}": value for key, table in stats.items() for name, value in table.items()}

    def _flush_episodes(self) -> None:
        if not self._rows:
            return
        table = pa.Table.from_pylist(self._rows, schema=self._episodes_writer and self._episodes_writer.schema)
        if self._episodes_writer is None:
            path = self._partial / EPISODES_PATH
            path.parent.mkdir(parents=True, exist_ok=True)
            self._episodes_writer = pq.ParquetWriter(path, table.schema)
        self._episodes_writer.write_table(table)
        self._rows.clear()

    def _close_files(self) -> None:
        for writer in (self._data_writer, self._episodes_writer, *self._video_writers.values()):
            if writer is not None:
                writer.close()
        self._data_writer = self._episodes_writer = None
        self._video_writers.clear()

    def _dataset_stats(self) -> dict[str, dict[str, list]]:
        """Compute the statistics of all rows; vectors are read back a column at a time, for exact quantiles."""
        files = sorted((self._partial / "data").glob("*/*.parquet"))
        stats = {key: self._pictures[key].stats() for key in self._cameras}
        for key in (name for name in self._schema.names if name not in self._cameras):
            rows = [pq.read_table(file, columns=[key])[key].to_numpy() for file in files]
            values = np.concatenate([np.stack(column) for column in rows])
            stats[key] = vector_stats(values.reshape(len(values), -1))
        return stats

    def _info(self) -> dict[str, Any]:
        features = self._features | INDEX_FEATURES
        for key in self._videos:
            features[key] = {"info": self._video_info(key)} | features[key]
        return {
            "codebase_version": VERSION,
            "robot_type": self._robot_type,
            "total_episodes": self._episodes,
            "total_frames": self._frames,
            "total_tasks": len(self._tasks),
            "chunks_size": FILES_PER_CHUNK,
            "data_files_size_in_mb": self._data_limit,
            "video_files_size_in_mb": self._video_limit,
            "fps": self._fps,
            "splits": {"train": f"0:{self._episodes}"},
            "data_path": DATA_PATH,
            "video_path": VIDEO_PATH if self._videos else None,
            "features": features,
        }

    def _video_info(self, key: str) -> dict[str, Any]:
        height, width, channels = self._features[key]["shape"]
        video = {"height": height, "width": width, "codec": self._codec, "pix_fmt": "yuv420p"}
        video |= {"is_depth_map": False, "fps": self._fps, "channels": channels}
        return {f"video.{name}": value for name, value in video.items()} | {"has_audio": False}


@dataclass
class _FileNumber:
    """Which of the numbered files is being written."""

    chunk: int = 0
    file: int = 0

    def indices(self) -> dict[str, int]:
        return {"chunk_index": self.chunk, "file_index": self.file}

    def advance(self) -> None:
        carry, self.file = divmod(self.file + 1, FILES_PER_CHUNK)
        self.chunk += carry


def _arrow_schema(features: Mapping[str, Mapping[str, Any]]) -> pa.Schema:
    """Give the columns of a data file, with what `datasets` needs to decode them; videos have none."""
    columns = {key: f for key, f in features.items() if f["dtype"] != "video"} | INDEX_FEATURES
    return datasets.Features({key: _column_type(key, feature) for key, feature in columns.items()}).arrow_schema


def _column_type(key: str, feature: Mapping[str, Any]) -> Any:
    if "/" in key:
        raise ValueError(f"{key}: LeRobot allows no '/' in the name of a feature.")
    if feature["dtype"] == "image":
        return datasets.Image()
    if len(feature["shape"]) != 1:
        raise ValueError(f"{key}: a feature is a picture or a vector; its shape is {tuple(feature['shape'])}.")
    (size,) = feature["shape"]
    value = datasets.Value(feature["dtype"])
    return value if size == 1 else datasets.List(value, length=size)  # LeRobot stores a vector of one as a number


def _array(values: np.ndarray, kind: pa.DataType) -> pa.Array:
    if not pa.types.is_fixed_size_list(kind):
        return pa.array(values.reshape(-1), kind)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1), kind.value_type), type=kind)


def _image_array(pictures: Sequence[np.ndarray | bytes]) -> pa.Array:
    encoded = [picture if isinstance(picture, bytes) else _encode_png(picture) for picture in pictures]
    return pa.array([{"bytes": picture, "path": None} for picture in encoded], datasets.Image().pa_type)


def _encode_png(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "png")
    return buffer.getvalue()


def _decode(picture: np.ndarray | bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")) if isinstance(picture, bytes) else picture


def picture_shape(picture: np.ndarray | bytes) -> tuple[int, ...]:
    """Give the shape (H, W, 3) of a picture, or of what is in a JPEG or PNG file."""
    if not isinstance(picture, bytes):
        return picture.shape
    width, height = Image.open(io.BytesIO(picture)).size  # reads the header only
    return height, width, 3


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=4, ensure_ascii=False) + "\n", encoding="utf-8")
