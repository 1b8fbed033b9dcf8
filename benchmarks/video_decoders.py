"""Does torchcodec decode videos faster than PyAV here, and to the same pictures?

    OMP_NUM_THREADS=1 python -m benchmarks.video_decoders --g1 G1_LEROBOT_FOLDER

The G1 sample's episodes (640 x 480), as the AV1 that they were recorded in, and as h264. The loader is what training builds,
with its two workers, in random order; the decoders take turns. Every picture of both is compared, too.
"""

import argparse
import statistics
import sys
import tempfile
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import av
import numpy as np

from benchmarks.lerobot_datasets import rewrite
from benchmarks.loader_beside_lerobot import BATCH, OURS, WINDOWS, Speed, loader
from benchmarks.result import RESULTS, write_result
from hf_vla.convert.lerobot_v2 import to_v3
from hf_vla.data.lerobot_format import open_dataset
from hf_vla.data.windows import WindowDataset
from hf_vla.recipe import View

BACKENDS = ("pyav", "torchcodec")


def main() -> None:
    """Make the stores, compare pictures, measure in turns, and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--g1", type=Path, required=True, help="folder of the G1 sample, LeRobot v2.1")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each decoder")
    parser.add_argument("--seconds", type=float, default=4.0, help="that a turn is counted for")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the result is written")
    options = parser.parse_args()
    settings = {"batch_size": BATCH, "streaming": False, "warm_up": 1.5, "seconds": options.seconds} | OURS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recorded = to_v3(options.g1, folder / "av1")
        stores = {"av1": recorded, "h264": rewrite(recorded, "h264", folder / "h264")}
        with loader([sys.executable, "-m", "benchmarks.our_loader"], folder / "cache") as ours:
            results = {
                store: {"pictures": compare_pictures(path), **measure(path, settings, options.rounds, ours)}
                for store, path in stores.items()
            }
    decoders = {"av": version("av"), "torchcodec": version("torchcodec"), "ffmpeg_of": ffmpeg_versions()}
    path = write_result("video_decoders", {"decoders": decoders} | settings | {"stores": results}, options.results)
    print(f"Written: {path}")


def ffmpeg_versions() -> dict[str, str]:
    """Name the FFmpeg that each decoder has: PyAV's own, and the machine's."""
    from torchcodec import ffmpeg_major_version

    libavcodec = ".".join(map(str, av.library_versions["libavcodec"]))
    return {"av": f"libavcodec {libavcodec}", "torchcodec": f"FFmpeg {ffmpeg_major_version}"}


def compare_pictures(path: Path) -> dict[str, Any]:
    """Decode every picture with both, and count where they differ."""
    info = open_dataset(path)
    views = [View(camera) for camera in info.cameras]
    first, second = (WindowDataset(replace(info, video_backend=backend), views, 1) for backend in BACKENDS)
    levels = [
        np.abs(a.astype(np.int16) - b).max()
        for i in range(len(first))
        for a, b in zip(first.pictures(i), second.pictures(i), strict=True)
    ]
    return {"compared": len(levels), "differing": int(np.count_nonzero(levels)), "most_levels": int(max(levels))}


def measure(path: Path, settings: dict[str, Any], rounds: int, ours: Speed) -> dict[str, Any]:
    """Let both take turns; give medians of each window."""
    found = {}
    for window, given in WINDOWS.items():
        turns: dict[str, list[dict[str, float]]] = {backend: [] for backend in BACKENDS}
        for _ in range(rounds):
            for backend in BACKENDS:
                turns[backend].append(ours(path, settings | given | {"video_backend": backend}))
        found[window] = {
            key: {backend: statistics.median(turn[key] for turn in turns[backend]) for backend in BACKENDS}
            | {"turns": {backend: [turn[key] for turn in turns[backend]] for backend in BACKENDS}}
            for key in ("samples_per_second", "processor_ms")
        }
        print(path.name, window, found[window]["samples_per_second"])
    return found


if __name__ == "__main__":
    main()
