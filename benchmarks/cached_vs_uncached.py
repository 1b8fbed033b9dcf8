"""What does a cache save, and cost? Steps are faster, the build is repaid within an epoch, the loader keeps ahead.

    OMP_NUM_THREADS=1 python -m benchmarks.cached_vs_uncached

On a CPU, at sizes a seven-thousandth of the real ones in arithmetic, VGGT to LLaMA in about the real proportion; the data is
the committed sample, two dozen times over with its pictures shifted. Cached and uncached steps take turns in one run.

What the cache costs is a process of `hf-vla cache` from its start to its end, imports and all. What it saves in an epoch is
that of its steps, and of starting up, where VGGT isn't loaded. The same command run again, with all of it there, tells what
of the cost doesn't grow with the data, and so how many pairs there must be for one epoch to repay it. Arithmetic is counted:
encoding every pair once is an epoch's work of VGGT, so what repays a build is larger batches, and pairs that are the same.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cache_cases import BATCH, SIZES, WAYS, make_case
from benchmarks.clocks import Moment, clocked, step_lengths
from benchmarks.feature_formats import forget
from benchmarks.longer_sample import write_longer_sample
from benchmarks.result import RESULTS, write_result
from hf_vla.caching import caches_of, with_cache
from hf_vla.data.collator import VLACollator
from hf_vla.data.feature_cache import MANIFEST, read_manifest
from hf_vla.prepare import build_trainer
from hf_vla.recipe import Recipe
from hf_vla.trainer import VLATrainer

ROOT = Path(__file__).parent.parent
TIMES = 24
"""How often the sample's 165 observations are repeated."""
ROUND, ROUNDS = 6, 6
"""Steps at a time of each of the two, and how often they take turns; the first step of each round isn't counted."""


def main() -> None:
    """Measure way after way, each written as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=TIMES, help="that the sample is repeated")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of timed steps")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the result is written")
    options = parser.parse_args()
    results: dict[str, Any] = {"sizes": SIZES, "batch_size": BATCH, "seconds_of": Moment._fields}
    with tempfile.TemporaryDirectory() as name:
        dataset = write_longer_sample(Path(name) / "dataset", options.times)
        for way in WAYS:
            results[way] = measure(way, dataset, options.rounds, Path(name) / way)
            print(f"Written: {write_result('cached_vs_uncached', results, options.results)}", flush=True)


def measure(way: str, dataset: Path, rounds: int, folder: Path) -> dict[str, Any]:
    """Build the caches, time steps in turns, and time the loader alone."""
    recipe = make_case(way, folder, dataset=dataset)
    build, again = (build_in_a_process(recipe, folder) for _ in range(2))
    recipe.training["max_steps"] = ROUND
    start, trainers = {}, {}
    for name, each in {"uncached": with_cache(recipe, []), "cached": recipe}.items():
        start[name], trainers[name] = clocked(functools.partial(build_trainer, each, folder / name))
    moments: dict[str, list[Moment]] = {name: [] for name in trainers}
    for _ in range(rounds):
        for name, trainer in trainers.items():
            moments[name] += step_lengths(trainer)
    step = {name: Moment(*map(statistics.median, zip(*found, strict=True))) for name, found in moments.items()}
    flops = {name: step_flops(trainer) for name, trainer in trainers.items()}
    folders = [Path(place) for place in caches_of(trainers["cached"].train_dataset).values() if place]
    pairs = len(trainers["cached"].train_dataset)
    uncached_rate = BATCH / step["uncached"].wall
    reading = read_speed(trainers["cached"], folders)
    return {
        "pairs": pairs,
        "cache_bytes": sum(read_manifest(place / MANIFEST)["bytes"] for place in folders),
        "step_seconds": step,
        "speed_up": step["uncached"].wall / step["cached"].wall,
        "gflop_a_sample": {name: round(count / BATCH / 1e9, 3) for name, count in flops.items()},
        "less_arithmetic": flops["uncached"] / flops["cached"],
        "parameters_loaded": {n: sum(p.numel() for p in t.bare_model().parameters()) for n, t in trainers.items()},
        "build_seconds": build,
        "build_again_seconds": again,
        "start_seconds": start,
        "build_over_saved_in_one_epoch": repaid(build, start, step, pairs),
        "pairs_that_repay_it_in_one_epoch": pairs_that_repay(build, again, step, pairs),
        "step_samples_per_s": {name: round(BATCH / value.wall, 1) for name, value in step.items()},
        "reading_samples_per_s": {name: round(rate) for name, rate in reading.items()},
        "reading_over_ten_times_uncached": {name: rate / (10 * uncached_rate) for name, rate in reading.items()},
    }


def build_in_a_process(recipe: Recipe, folder: Path) -> Moment:
    """Build the caches as a user does, and give what all of that process took."""
    file = folder / "recipe.json"
    file.write_text(json.dumps(dataclasses.asdict(recipe)))
    begun, used = time.perf_counter(), children()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [sys.executable, "-m", "hf_vla.cli", "cache", str(file)], check=True, capture_output=True, env=environment
    )
    return Moment(children() - used, time.perf_counter() - begun)


def children() -> float:
    """Give the processor time of all processes that were started here and have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def repaid(build: Moment, start: dict[str, Moment], step: dict[str, Moment], pairs: int) -> dict[str, float]:
    """Set the build beside what an epoch saves, its start included, by each clock."""
    saved_a_step, saved_at_start = step["uncached"].since(step["cached"]), start["uncached"].since(start["cached"])
    saved = [a_step * pairs / BATCH + once for a_step, once in zip(saved_a_step, saved_at_start, strict=True)]
    return dict(zip(Moment._fields, np.divide(build, saved).tolist(), strict=True))


def pairs_that_repay(build: Moment, again: Moment, step: dict[str, Moment], pairs: int) -> dict[str, int | None]:
    """Say from how many pairs on an epoch's steps save what the build costs; None where encoding one costs what it saves."""
    saved = np.array(step["uncached"].since(step["cached"])) / BATCH
    gain = saved - np.array(build.since(again)) / pairs
    counts = [math.ceil(fixed / each) if each > 0 else None for fixed, each in zip(again, gain, strict=True)]
    return dict(zip(Moment._fields, counts, strict=True))


def step_flops(trainer: VLATrainer) -> int:
    """Count the arithmetic of one step, forward and backward."""
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(BATCH)])
    with FlopCounterMode(display=False) as counter:
        trainer.bare_model()(**batch).loss.backward()
    trainer.bare_model().zero_grad()
    return counter.get_total_flops()


def read_speed(trainer: VLATrainer, folders: list[Path]) -> dict[str, float]:
    """Read every sample in random order through the collator alone, and give samples/s."""
    order = np.random.default_rng(0).permutation(len(trainer.train_dataset)).tolist()
    collate = VLACollator(trainer.processing_class)
    found = {}
    for state in ("cold", "warm"):
        if state == "cold":
            for path in (path for folder in folders for path in folder.glob("*.safetensors")):
                forget(path)
        begun = time.perf_counter()
        for start in range(0, len(order), BATCH):
            collate([trainer.train_dataset[i] for i in order[start : start + BATCH]])
        found[state] = len(order) / (time.perf_counter() - begun)
    return found


if __name__ == "__main__":
    main()
