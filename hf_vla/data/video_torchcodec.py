"""torchcodec in PyAV's place: the same frames of the same files, in the same order of trust, decoded by another library.

PyAV still says when each frame is shown: torchcodec gives frames by number, and finds times by the container's frame rate
unless it goes through the whole file.

Letters: H W pixels.
"""

from pathlib import Path

import numpy as np

from hf_vla.data.source import HubPath, readable
from hf_vla.data.video import frame_times

_TIME_TOLERANCE = 1e-4
"""Seconds by which the times of one frame may differ between the libraries: rounding."""


class TorchcodecReader:
    """One open video file.

    Args:
        path: the file.
        step: seconds between two frames of the dataset.

    Raises:
        ImportError: where torchcodec isn't installed, or can't be loaded.
        EOFError: where it can't read the file.
    """

    def __init__(self, path: Path | HubPath, step: float):
        decoder = load_decoder()
        self._step, self._times = step, frame_times(path)
        try:
            # One thread, as PyAV has; its scan of the whole file is what makes frame k the k-th that is shown.
            self._decoder = decoder(readable(path), dimension_order="NHWC", num_ffmpeg_threads=1)
        except RuntimeError as error:
            raise EOFError(f"torchcodec can't open it: {_first_line(error)}") from None

    def at(self, seconds: float) -> np.ndarray:
        """Decode the frame nearest to a time in seconds, as (H, W, 3) uint8 RGB."""
        distances = np.abs(self._times - seconds)
        if not len(distances) or distances.min() > self._step / 2:
            raise EOFError("the video has none within half a frame of it")
        nearest = int(distances.argmin())
        try:
            frame = self._decoder.get_frame_at(nearest)
        except (RuntimeError, IndexError) as error:
            raise EOFError(f"torchcodec can't decode it: {_first_line(error)}") from None
        if abs(frame.pts_seconds - self._times[nearest]) > _TIME_TOLERANCE:
            raise EOFError(f"torchcodec gives the frame at {frame.pts_seconds:.3f} s in its place")
        return frame.data.numpy()

    def close(self) -> None:
        """Let go of the file and its decoder."""
        self._decoder = None


def load_decoder() -> type:
    """Import torchcodec's decoder.

    Raises:
        ImportError: where torchcodec isn't installed, or can't be loaded.
    """
    try:
        from torchcodec.decoders import VideoDecoder
    except ModuleNotFoundError as error:
        raise ImportError(
            "data.video_backend is 'torchcodec', which isn't installed: pip install 'hf-vla[torchcodec]', or leave it at "
            "'pyav'."
        ) from error
    except (ImportError, OSError, RuntimeError) as error:
        raise ImportError(
            f"data.video_backend is 'torchcodec', which can't be loaded ({_first_line(error)}). It needs FFmpeg's shared "
            "libraries (apt-get install ffmpeg), and the version that goes with torch; or leave it at 'pyav'."
        ) from error
    return VideoDecoder


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
