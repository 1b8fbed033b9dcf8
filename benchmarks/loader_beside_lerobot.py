"""How many samples a second does our loader give beside LeRobot's, of the same files on the same cores?

    OMP_NUM_THREADS=1 python -m benchmarks.loader_beside_lerobot --g1 G1_LEROBOT_FOLDER

The G1 sample's episodes (640 x 480, one camera) lie in LeRobot's v3.0 format as JPEG files embedded in the rows, as h264,
and as the AV1 that they were recorded in; both loaders read the same folders. A sample is a state, 16 actions and one
picture, or two of different moments, drawn in random order. `LeRobotDataset` in torch's DataLoader gets the best of a grid
of its settings (video backend, workers, threads) for each store; ours is what training builds, with its two workers.
No processor runs on either side, and torch's own collate stacks both: LeRobot's pictures are float32, ours uint8. Both are
warm, and take turns.

To cut a chunk of actions LeRobot decodes the pictures of all of its rows where they are embedded, so that store is measured
with a single action, too.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.lerobot_datasets import rewrite
from benchmarks.lerobot_environment import SCRIPT, facts_of, make_environment, variables, working_backends
from benchmarks.result import RESULTS, write_result
from hf_vla.convert.lerobot_v2 import to_v3

Speed = Callable[[Path, dict[str, Any]], dict[str, float]]

BATCH = 8
WINDOWS = {"one picture": {"past": 0, "chunk": 16}, "two moments": {"past": 5, "chunk": 16}}
"""Frames from the earlier moment to now, none where there is one, and actions."""
ONE_ACTION = {"one picture, one action": {"past": 0, "chunk": 1}}
OURS = {"workers": 2, "threads": 1}
READERS = ((0, 1), (0, 2), (1, 1), (2, 1))
"""Workers and threads that LeRobot's loader is tried with; torch gives a worker one thread."""
TIMES = {"warm_up": 1.5, "seconds": 3.0}
TARGET = 2.0


def main() -> None:
    """Make the stores, choose LeRobot's settings, measure in turns, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--g1", type=Path, required=True, help="folder of the G1 sample, LeRobot v2.1")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each loader")
    parser.add_argument("--seconds", type=float, default=TIMES["seconds"], help="that a turn is counted for")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the result is written")
    options = parser.parse_args()
    TIMES["seconds"] = options.seconds
    python = make_environment()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        facts = facts_of(python, folder / "cache")
        stores = make_stores(options.g1, folder)
        in_lerobot = [str(python), str(SCRIPT), "speeds"]
        in_ours = [sys.executable, "-m", "benchmarks.our_loader"]
        with loader(in_lerobot, folder / "cache") as theirs, loader(in_ours, folder / "ours") as ours:
            backends = working_backends(facts)
            results = {store: measure(path, backends, options.rounds, theirs, ours) for store, path in stores.items()}
    settings = {"batch_size": BATCH, "ours": OURS, "target": TARGET, "windows": WINDOWS | ONE_ACTION} | TIMES
    print(table(results))
    path = write_result("loader_beside_lerobot", {"lerobot": facts} | settings | {"stores": results}, options.results)
    print(f"Written: {path}")


def make_stores(g1: Path, folder: Path) -> dict[str, Path]:
    """Store the episodes in each way; AV1 packets stay as they were recorded."""
    recorded = to_v3(g1, folder / "av1")
    return {store: rewrite(recorded, store, folder / store) for store in ("jpeg", "h264")} | {"av1": recorded}


@contextmanager
def loader(command: list[str], cache: Path):
    """Start a process that measures one project's loader; give the function that asks it."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=variables(cache), **pipes) as process:

        def ask(dataset: Path, given: dict[str, Any]) -> dict[str, float]:
            print(json.dumps([str(dataset), given]), file=process.stdin, flush=True)
            answer = process.stdout.readline()
            if not answer:
                raise SystemExit(f"{' '.join(command)} ended without an answer for {dataset.name}: {given}")
            return json.loads(answer)

        yield ask
        process.stdin.close()


def measure(path: Path, backends: list[str], rounds: int, theirs: Speed, ours: Speed) -> dict[str, Any]:
    """Find LeRobot's best settings for a store, and let both loaders take turns on each window."""
    common = {"batch_size": BATCH, "streaming": False} | TIMES
    is_video = (path / "videos").exists()
    grid = try_settings(path, backends if is_video else backends[:1], common | WINDOWS["one picture"], theirs)
    best = max(grid, key=lambda tried: tried["samples_per_second"])["settings"]
    windows = {}
    for window, given in (WINDOWS | ({} if is_video else ONE_ACTION)).items():
        turns: dict[str, list[dict[str, float]]] = {"ours": [], "lerobot": []}
        for _ in range(rounds):
            turns["ours"].append(ours(path, common | OURS | given))
            turns["lerobot"].append(theirs(path, common | best | given))
        windows[window] = {key: compare(turns, key) for key in ("samples_per_second", "processor_ms")}
    return {"lerobot_best": best, "windows": windows, "lerobot_tried": grid}


def compare(turns: dict[str, list[dict[str, float]]], key: str) -> dict[str, Any]:
    """Give both loaders' medians of a quantity, how many times better ours is, and each turn's."""
    values = {name: [turn[key] for turn in turns[name]] for name in turns}
    middle = {name: statistics.median(values[name]) for name in values}
    times = middle["ours"] / middle["lerobot"] if key == "samples_per_second" else middle["lerobot"] / middle["ours"]
    return middle | {"times": times, "turns": values}


def try_settings(path: Path, backends: list[str], common: dict[str, Any], theirs: Speed) -> list[dict[str, Any]]:
    """Measure LeRobot's loader with each setting."""
    grid = []
    for backend, (workers, threads) in itertools.product(backends, READERS):
        settings = {"backend": backend, "workers": workers, "threads": threads}
        grid.append({"settings": settings} | theirs(path, common | settings))
    return grid


def table(results: dict[str, Any]) -> str:
    """Give the table that the README has."""
    lines = ["| stored as | window | samples/s, ours | LeRobot | times | processor ms, ours | LeRobot | times |"]
    lines += ["|" + "---|" * 8]
    for store, found in results.items():
        for window, speeds in found["windows"].items():
            cells = [f"{s['ours']:.3g} | {s['lerobot']:.3g} | {s['times']:.1f}" for s in speeds.values()]
            lines.append(f"| {store} | {window} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
