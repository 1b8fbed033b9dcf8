"""Pictures into a video file, each at exactly its own time, so that a reader finds it again by that time."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

CODECS = {"h264": ("libx264", {"crf": "18"}), "av1": ("libsvtav1", {"crf": "30", "preset": "8"})}
"""Name in a dataset's info, the encoder for it, and how well it keeps the picture."""

PIXEL_FORMAT = "yuv420p"
_KEYFRAME_EVERY = 2
"""Frames; training reads single frames at random, and each read decodes from the keyframe before it."""


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
