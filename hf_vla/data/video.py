"""Pictures out of video files, one at a time, chosen by their presentation time; into them, each at its own; and copied.

Container metadata lies in real datasets (frame rate, number of frames), so nothing but each frame's pts is believed.
"""

import os
from collections import OrderedDict
from fractions import Fraction
from pathlib import Path
from typing import Protocol

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from hf_vla.data import columns
from hf_vla.data.lerobot_format import DatasetInfo, Episode
from hf_vla.data.source import HubPath, readable

_OPEN_FILES = 8
"""Decoders kept open by one camera of one process; each holds a few MB."""

_STEP_FRAMES = 4
"""Up to so many frames ahead, decoding on is cheaper than seeking to the keyframe before."""

_OUT_OF_ORDER = 8
"""Frames that are stored behind a keyframe and shown before it: about as many as an encoder ever has."""

CODECS = {"h264": ("libx264", {"crf": "18"}), "av1": ("libsvtav1", {"crf": "30", "preset": "8"})}
"""Name in a dataset's info, the encoder for it, and how well it keeps the picture."""

PIXEL_FORMAT = "yuv420p"

_KEYFRAME_EVERY = 2
"""Frames, in what is written: training reads single frames at random, and each read decodes from the keyframe before."""


def said_rate(path: Path) -> Fraction | None:
    """Give the frames a second that a video file says it has, which is often wrong; None where it can't be read."""
    try:
        with av.open(str(path)) as container:
            return container.streams.video[0].average_rate
    except (av.FFmpegError, IndexError):
        return None


def frame_times(path: Path | HubPath) -> np.ndarray:
    """Give the seconds at which each frame of a video file is shown, in ascending order; none is decoded."""
    with av.open(readable(path)) as container:
        stream = container.streams.video[0]
        shown = [p.pts for p in container.demux(stream) if p.pts is not None and not p.is_discard]
        return np.sort([float(pts * stream.time_base) for pts in shown])


class VideoFrames:
    """One camera of a dataset that is stored as video files."""

    def __init__(self, info: DatasetInfo, camera: str):
        self._root = info.root
        self._camera = camera
        self._fps = info.fps
        self._timestamps = _timestamps(info)
        self._open = _reader_class(info.video_backend)
        self._readers: OrderedDict[str, Reader] = OrderedDict()
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

    def look(self, episode: Episode, frame: int) -> bytes:
        """Say which frame of which file it is: whether others look the same takes decoding, and isn't asked."""
        span = episode.videos[self._camera]
        return f"{span.file}\n{span.start + float(self._timestamps[episode.first_row + frame])}\n".encode()

    def _reader(self, file: str) -> "Reader":
        if self._owner != os.getpid():  # a forked worker can't use its parent's decoder threads
            self._readers, self._owner = OrderedDict(), os.getpid()
        if file not in self._readers:
            self._readers[file] = self._open(self._root / file, 1 / self._fps)
        self._readers.move_to_end(file)
        if len(self._readers) > _OPEN_FILES:
            self._readers.popitem(last=False)[1].close()
        return self._readers[file]

    def __getstate__(self):
        return {**self.__dict__, "_readers": OrderedDict()}


def _reader_class(backend: str) -> type["Reader"]:
    """Choose what decodes; it is seen here that it can be loaded, before any frame is asked for."""
    if backend == "pyav":
        return PyAVReader
    from hf_vla.data.video_torchcodec import TorchcodecReader, load_decoder

    load_decoder()
    return TorchcodecReader


class Reader(Protocol):
    """One open video file."""

    def at(self, seconds: float) -> np.ndarray:
        """Decode the frame nearest to a time in seconds, as (H, W, 3) uint8 RGB.

        Raises:
            EOFError: where none lies within half a step of it, or it can't be decoded.
        """

    def close(self) -> None:
        """Let go of the file and its decoder."""


class PyAVReader:
    """One open video file and the frame that it stands at."""

    def __init__(self, path: Path | HubPath, step: float):
        self._step = step
        self._container = av.open(readable(path))
        self._stream = self._container.streams.video[0]
        # One thread: with more, dav1d and h264 hold frames back, which costs 7 ms a random frame instead of 4.
        self._stream.codec_context.thread_count = 1
        # Kept, since making one for each frame costs more than the conversion; its threads cost more than they save.
        self._to_rgb = VideoReformatter()
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
        return self._to_rgb.reformat(nearest, format="rgb24", threads=1).to_ndarray()

    def _seek(self, seconds: float) -> None:
        """Stand at a keyframe that is shown no later than a time; the nearest may be, if frames are stored out of order."""
        place = seconds
        self._start_at(place)
        while self._frame is not None and self._frame.time > seconds and place > 0:
            place -= _OUT_OF_ORDER * self._step
            self._start_at(max(0.0, place))

    def _start_at(self, seconds: float) -> None:
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


class VideoWriter:
    """One mp4 file that frame k of is shown at k / fps seconds.

    Args:
        path: the file; its folder is made.
        fps: frames a second.
        codec: one of `CODECS`.
        height: of every picture, even: the pixel format keeps one colour for each 2 x 2 pixels.
        width: as the height.

    Raises:
        ValueError: for an unknown codec or an odd size.
    """

    def __init__(self, path: Path, fps: int, codec: str, height: int, width: int):
        if codec not in CODECS:
            raise ValueError(f"video codec must be one of {', '.join(CODECS)}, not {codec!r}.")
        if height % 2 or width % 2:
            raise ValueError(
                f"video needs an even height and width, not {height} x {width}; embed the images instead."
            )
        encoder, options = CODECS[codec]
        path.parent.mkdir(parents=True, exist_ok=True)
        self._fps, self._frames = fps, 0
        self.size = 0  # bytes of what the encoder has given out
        self._container = av.open(str(path), "w")
        self._stream = self._container.add_stream(encoder, rate=fps, options=options)
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, PIXEL_FORMAT
        self._stream.codec_context.time_base = Fraction(1, fps)
        self._stream.codec_context.gop_size = _KEYFRAME_EVERY
        self._stream.codec_context.max_b_frames = 0

    @property
    def seconds(self) -> float:
        """Length of what has been added: where the next frame will stand."""
        return self._frames / self._fps

    def add(self, picture: np.ndarray) -> None:
        """Append one (H, W, 3) uint8 RGB picture."""
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
        frame.pts, frame.time_base = self._frames, Fraction(1, self._fps)
        self._write(self._stream.encode(frame))
        self._frames += 1

    def close(self) -> None:
        """Write what the encoder still holds, and end the file."""
        self._write(self._stream.encode())
        self._container.close()

    def _write(self, packets: list[av.Packet]) -> None:
        self.size += sum(packet.size for packet in packets)
        self._container.mux(packets)


class VideoCopier:
    """One mp4 file of others, one behind the other: encoded pictures are copied, and nothing is decoded.

    Args:
        path: the file; its folder is made.
        first: a file whose codec, size and parameters are those of all that follow.
    """

    def __init__(self, path: Path, first: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.size, self.seconds = 0, 0.0
        self._container = av.open(str(path), "w")
        with av.open(str(first)) as source:
            self._stream = self._container.add_stream_from_template(source.streams.video[0], opaque=True)
            self._coding = _coding(source)

    def takes(self, source: Path) -> bool:
        """Say whether a file's pictures are encoded just as those that are there."""
        with av.open(str(source)) as container:
            return _coding(container) == self._coding

    def append(self, source: Path, length: int) -> None:
        """Copy a file's pictures behind those that are there; its time 0 is then at `seconds`.

        Raises:
            ValueError: where it holds fewer than `length` pictures, or can't be read.
        """
        try:
            with av.open(str(source)) as container:
                packets = [packet for packet in container.demux(container.streams.video[0]) if packet.size]
        except av.FFmpegError as error:
            raise ValueError(f"{source}: can't be read as video ({error}). Fetch or record it again.") from None
        if len(packets) < length:
            raise ValueError(f"{source}: {len(packets)} pictures, where its episode has {length} rows.")
        unit = packets[0].time_base
        shift = round(self.seconds / unit)
        self.seconds = float(unit * (shift + max(packet.pts + packet.duration for packet in packets)))
        for packet in packets:
            packet.pts, packet.dts, packet.stream = packet.pts + shift, packet.dts + shift, self._stream
            self.size += packet.size
            self._container.mux(packet)

    def close(self) -> None:
        """End the file."""
        self._container.close()


def _coding(container: av.container.InputContainer) -> tuple:
    """Give what pictures of one file must share."""
    stream = container.streams.video[0]
    context = stream.codec_context
    return context.name, stream.width, stream.height, stream.time_base, context.extradata
