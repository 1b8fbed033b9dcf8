"""Does the loader's memory grow with the dataset?

    OMP_NUM_THREADS=1 python -m benchmarks.loader_memory --g1 G1_LEROBOT_FOLDER

The G1 sample's two episodes are written ten times over and a hundred times, as JPEG files embedded in the rows and as the
AV1 that they were recorded in: ten times are more episodes than workers keep of a stream. A process of its own reads equally
many samples of both with two workers, map-style and streamed. What the process and its workers hold is added up every tenth
of a second: each page counts once, shared ones in parts. Pages of their own, and those that they share to hand batches over,
are memory that the machine must have. Pages of mapped files are copies of what is on disk, which the kernel drops when it
wants memory; they are given apart.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.lerobot_datasets import rewrite
from benchmarks.result import RESULTS, write_result
from hf_vla.convert.lerobot_v2 import to_v3
from hf_vla.data.lerobot_merge import merge_datasets

TIMES_OVER = 10
"""That the small dataset holds the sample, and that the large one holds the small one."""
SETTINGS = {"chunk": 16, "past": 5, "batch_size": 8, "workers": 2, "threads": 1, "samples": 3000}
KINDS = {"own": ("Pss_Anon", "Pss_Shmem"), "mapped_files": ("Pss_File",)}
"""What is added up to a kind of memory, by the kernel's names."""
MiB = 1024**2

_EVERY = 0.1
"""Seconds between two looks."""


def main() -> None:
    """Write the datasets, go through each, and write the peaks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--g1", type=Path, required=True, help="folder of the G1 sample, LeRobot v2.1")
    parser.add_argument("--times", type=int, default=TIMES_OVER, help="how much larger the large dataset is")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the result is written")
    options = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recorded = to_v3(options.g1, folder / "av1")
        for store, once in {"av1": recorded, "jpeg": rewrite(recorded, "jpeg", folder / "jpeg")}.items():
            small = merge_datasets([once] * TIMES_OVER, folder / f"{store}_small")
            large = merge_datasets([small] * options.times, folder / f"{store}_large")
            results[store] = {way: compare(small, large, way == "streamed") for way in ("map-style", "streamed")}
    print(json.dumps(results, indent=2))
    facts = {"settings": SETTINGS, "times_over": options.times}
    print(f"Written: {write_result('loader_memory', facts | {'stores': results}, options.results)}")


def compare(small: Path, large: Path, streaming: bool) -> dict[str, Any]:
    """Give the peaks of both datasets in MiB, and how many times the small one's the large one's are."""
    peaks = [peak(dataset, streaming) for dataset in (small, large)]
    return {
        kind: {"small": peaks[0][kind], "large": peaks[1][kind], "grown": peaks[1][kind] - peaks[0][kind]}
        for kind in KINDS
    }


def peak(dataset: Path, streaming: bool) -> dict[str, float]:
    """Read of a dataset in a process of its own, and give the most that it and its workers held, in MiB."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.our_loader",
        str(dataset),
        json.dumps(SETTINGS | {"streaming": streaming}),
    ]
    highest = dict.fromkeys(KINDS, 0.0)
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            held = add_up(family(process.pid))
            highest = {kind: max(highest[kind], held[kind]) for kind in KINDS}
            time.sleep(_EVERY)
    if process.returncode:
        raise SystemExit(f"the loader of {dataset} failed")
    return highest


def family(pid: int) -> list[int]:
    """List a process and all that it has started."""
    found = [pid]
    for parent in found:
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            found += map(int, _read(children).split())
    return found


def add_up(pids: list[int]) -> dict[str, float]:
    """Add up what processes hold, in MiB; one that has just ended holds nothing."""
    lines = [line.split() for pid in pids for line in _read(Path(f"/proc/{pid}/smaps_rollup")).splitlines()[1:]]
    return {
        kind: sum(int(words[1]) * 1024 for words in lines if words[0].rstrip(":") in names) / MiB
        for kind, names in KINDS.items()
    }


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


if __name__ == "__main__":
    main()
