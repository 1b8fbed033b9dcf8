"""Pictures that are embedded in the rows of a table, decoded one at a time; and pictures kept once they are decoded."""

import hashlib
import io
from typing import Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from hf_vla.data.lerobot_format import DatasetInfo, Episode

LOOK_BYTES = 16
"""Of the digest that tells pictures apart."""


class Frames(Protocol):
    """One camera of a dataset."""

    def read(self, episode: Episode, frame: int) -> np.ndarray:
        """Give the picture of one frame as (H, W, 3) uint8 RGB."""

    def look(self, episode: Episode, frame: int) -> bytes:
        """Tell the picture of one frame from others without decoding it: those of the same digest look the same."""


class CachedFrames:
    """One camera of a dataset whose pictures are kept in memory as they are decoded, as long as there is room.

    None makes room for another: in random order, each is as likely to be wanted next. A pickled copy starts empty, so that a
    dataset is as small to send as one that has read nothing.
    """

    def __init__(self, frames: Frames, max_bytes: int):
        self._frames = frames
        self._max_bytes = max_bytes
        self._bytes = 0
        self._kept: dict[int, np.ndarray] = {}

    def read(self, episode: Episode, frame: int) -> np.ndarray:
        """Give the picture of one frame as (H, W, 3) uint8 RGB, read-only since others will be given the same."""
        row = episode.first_row + frame
        if row in self._kept:
            return self._kept[row]
        picture = self._frames.read(episode, frame)
        picture.flags.writeable = False
        if self._bytes + picture.nbytes <= self._max_bytes:
            self._bytes += picture.nbytes
            self._kept[row] = picture
        return picture

    def look(self, episode: Episode, frame: int) -> bytes:
        """Tell the picture of one frame from others."""
        return self._frames.look(episode, frame)

    def __getstate__(self):
        return {**self.__dict__, "_kept": {}, "_bytes": 0}


class EmbeddedFrames:
    """One camera of a dataset whose pictures are JPEG or PNG bytes in its parquet files."""

    def __init__(self, info: DatasetInfo, camera: str):
        self._root = info.root
        self._table = info.table
        self._key = info.camera_keys[camera]
        self._open()

    def read(self, episode: Episode, frame: int) -> np.ndarray:
        """Decode the picture of one frame as (H, W, 3) uint8 RGB.

        Raises:
            ValueError: names file, episode and frame of a picture that can't be decoded.
        """
        encoded, path = self._fetch(episode.first_row + frame)
        try:
            picture = Image.open(io.BytesIO(encoded) if encoded is not None else self._root / path)
            return np.array(picture if picture.mode == "RGB" else picture.convert("RGB"))
        except (UnidentifiedImageError, OSError, TypeError) as error:
            raise ValueError(
                f"{self._root / episode.file}: {self._key} of episode {episode.index}, frame {frame}, "
                f"can't be decoded: {error}"
            ) from None

    def look(self, episode: Episode, frame: int) -> bytes:
        """Digest the encoded picture of one frame, or the path of its file."""
        encoded, path = self._fetch(episode.first_row + frame)
        return hashlib.blake2b(encoded if encoded is not None else path.encode(), digest_size=LOOK_BYTES).digest()

    def _open(self) -> None:
        chunks = self._table.data.column(self._key).chunks
        self._encoded = [chunk.field("bytes") for chunk in chunks]
        self._paths = [chunk.field("path") for chunk in chunks]
        self._ends = np.cumsum([len(chunk) for chunk in chunks])

    def _fetch(self, row: int) -> tuple[bytes | None, str | None]:
        chunk = int(np.searchsorted(self._ends, row, side="right"))
        offset = row - int(self._ends[chunk])  # counted from the chunk's end, so negative
        encoded = self._encoded[chunk]
        return encoded[len(encoded) + offset].as_py(), self._paths[chunk][len(encoded) + offset].as_py()

    def __getstate__(self):
        # Arrow arrays would be pickled by value; the table goes by the path of its memory-mapped file.
        return {"_root": self._root, "_table": self._table, "_key": self._key}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._open()
