"""Pictures out of video files, one at a time, chosen by their presentation time.

Container metadata lies in real datasets (frame rate, number of frames), so nothing but each frame's pts is believed.
"""

import os
from collections import OrderedDict
from pathlib import Path

import av
import numpy as np

from hf_vla.data import columns
from hf_vla.data.lerobot_format import DatasetInfo, Episode

_OPEN_FILES = 8
"""Decoders kept open by one camera of one process; each holds a few MB."""

_STEP_FRAMES = 4
"""Up to so many frames ahead, decoding on is cheaper than seeking to the keyframe before."""


class VideoFrames:
    """One camera of a dataset that is stored as video files."""

    def __init__(self, info: DatasetInfo, camera: str):
        self._root = info.root
        self._camera = camera
        self._fps = info.fps
        self._timestamps = _timestamps(info)
        self._readers: OrderedDict[str, _Reader] = OrderedDict()
        self._owner = os.getpid()

    def read(self, episode: Episode, frame: int) -> np.ndarray:
        """Decode the picture of one frame as (H, W, 3) uint8 RGB: the one whose pts is nearest to the frame's time.

        Raises:
            ValueError: names file, episode and frame where the video is unreadable or holds no frame within half a step.
        """
        span = episode.videos[self._camera]
        seconds = span.start + float(self._timestamps[episode.first_row + frame])
        try:
            return self._reader(span.file).at(seconds)
        except (av.FFmpegError, EOFError) as error:
            raise ValueError(
                f"{self._root / span.file}: no picture for episode {episode.index}, frame {frame}, "
                f"at {seconds:.3f} s: {error}"
            ) from None

    def _reader(self, file: str) -> "_Reader":
        if self._owner != os.getpid():  # a forked worker can't use its parent's decoder threads
            self._readers, self._owner = OrderedDict(), os.getpid()
        if file not in self._readers:
            self._readers[file] = _Reader(self._root / file, 1 / self._fps)
        self._readers.move_to_end(file)
        if len(self._readers) > _OPEN_FILES:
            self._readers.popitem(last=False)[1].close()
        return self._readers[file]

    def __getstate__(self):
        return {**self.__dict__, "_readers": OrderedDict()}


class _Reader:
    """One open video file and the frame that it stands at."""

    def __init__(self, path: Path, step: float):
        self._step = step
        self._container = av.open(str(path))
        self._stream = self._container.streams.video[0]
        # One thread: with more, dav1d and h264 hold frames back, which costs 7 ms a random frame instead of 4.
        self._stream.codec_context.thread_count = 1
        self._seek(0)

    def at(self, seconds: float) -> np.ndarray:
        """Decode the frame nearest to a time in seconds, as (H, W, 3) uint8 RGB."""
        exact = 0.1 * self._step  # of the rounding of timestamps; what lies within needs no look at the next frame
        if self._frame is None or not -exact <= seconds - self._frame.time <= _STEP_FRAMES * self._step:
            self._seek(seconds + exact)
        before = None
        while self._frame is not None and self._frame.time < seconds - exact:
            before, self._frame = self._frame, next(self._decoded, None)
        nearest = min(filter(None, (before, self._frame)), key=lambda f: abs(f.time - seconds), default=None)
        if nearest is None or abs(nearest.time - seconds) > self._step / 2:
            raise EOFError("the video has none within half a frame of it")
        return nearest.to_ndarray(format="rgb24")

    def _seek(self, seconds: float) -> None:
        self._container.seek(int(seconds / self._stream.time_base), stream=self._stream)
        self._decoded = self._container.decode(self._stream)
        self._frame = next(self._decoded, None)

    def close(self) -> None:
        """Let go of the file and its decoder."""
        self._container.close()


def _timestamps(info: DatasetInfo) -> np.ndarray:
    """Give each row's seconds since its episode's start; frames are evenly spaced where the column is missing."""
    if "timestamp" in info.table.column_names:
        return columns.matrix(info.table, "timestamp")[:, 0]
    seconds = np.zeros(len(info.table), np.float32)
    for episode in info.episodes:
        seconds[episode.first_row : episode.first_row + episode.length] = np.arange(episode.length) / info.fps
    return seconds
