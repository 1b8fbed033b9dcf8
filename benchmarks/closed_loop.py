"""Trainings side by side, rollouts of what came out, and what their counts show; for benchmarks that need several of each.

Whatever is finished in the folder of runs is reused, so that a benchmark that was stopped goes on where it was.
"""

import dataclasses
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from hf_vla import run
from hf_vla.evaluation import RANDOM, count, roll_out
from hf_vla.recipe import Recipe, load_recipe
from hf_vla.rollout.metaworld_env import graphics_problem
from hf_vla.rollout.metrics import difference_interval, wilson_interval
from hf_vla.train import train

ROOT = Path(__file__).parent.parent
SIGHT_TASKS = ("button-press-topdown-v3", "reach-v3")
"""Tasks on which a policy without pictures stays far behind: what moves is seen only."""
BEYOND = 100_000
"""Added to a recipe's `evaluation.seed`: starts from there on were seen neither in training nor while it was tuned."""
TAIL = 3000
"""Characters of a failed training's output that are shown."""

Counts = dict[str, Any]
"""`successes`, `episodes`, and Wilson's 95 % `interval`."""


@dataclasses.dataclass(frozen=True)
class Training:
    """One policy to train, and where its run is kept."""

    name: str
    recipe_file: Path
    overrides: tuple[str, ...]
    directory: Path

    @property
    def recipe(self) -> Recipe:
        """Read the recipe with what is set over it."""
        return load_recipe(self.recipe_file, list(self.overrides))

    @property
    def is_finished(self) -> bool:
        """Whether the run is there and whole.

        Raises:
            SystemExit: if the directory holds a run of another recipe.
        """
        if not (self.directory / run.RECIPE).exists():
            return False
        recipe = self.recipe
        kept = load_recipe(self.directory / run.RECIPE)
        if dataclasses.replace(kept, about=recipe.about) != recipe:  # a plan recorded since changes nothing here
            raise SystemExit(f"{self.directory} holds a run of another recipe: remove it, or give another --folder.")
        return "finished" in run.read_info(self.directory)


def sighted_and_blind(
    recipe_file: Path, overrides: Sequence[str], folder: Path, seed: int, name: str = ""
) -> tuple[Training, Training]:
    """Describe a training and its matched blind control: the same data, seed and steps, every picture the mean one."""
    seeded = (*overrides, f"training.seed={seed}")
    prefix = f"{name}-" if name else ""
    sighted = Training(f"{prefix}sighted-{seed}", recipe_file, seeded, folder / f"{prefix}sighted-{seed}")
    blind = Training(
        f"{prefix}blind-{seed}", recipe_file, (*seeded, "data.pictures=mean"), folder / f"{prefix}blind-{seed}"
    )
    return sighted, blind


def train_side_by_side(trainings: Sequence[Training], workers: int) -> None:
    """Train what isn't there yet, `workers` at a time on one thread each: two on two cores outrun one on both.

    Raises:
        SystemExit: if a training fails, with the end of its output.
    """
    waiting = [training for training in trainings if not training.is_finished]
    print(f"{len(trainings) - len(waiting)} of {len(trainings)} trainings are there already.", flush=True)
    start = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        jobs = [pool.submit(_train, training) for training in waiting]
        try:
            for done, job in enumerate(as_completed(jobs), 1):
                print(f"[{done}/{len(jobs)}] {job.result()} ({time.perf_counter() - start:.0f} s so far)", flush=True)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def train_in_turn(trainings: Sequence[Training], workers: int) -> None:
    """Train what isn't there yet as `train_side_by_side` does, but each worker one after another in one process.

    For trainings of a minute, much of which would else go into starting.
    """
    waiting = [training for training in trainings if not training.is_finished]
    print(f"{len(trainings) - len(waiting)} of {len(trainings)} trainings are there already.", flush=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=torch.set_num_threads, initargs=(1,)) as processes:
        for done, name in enumerate(processes.map(_train_here, waiting), 1):
            print(f"[{done}/{len(waiting)}] {name}", flush=True)


def _train_here(training: Training) -> str:
    """Train in this process, going on with what was interrupted."""
    train(training.recipe, training.directory, resume=(training.directory / run.RECIPE).exists())
    return training.name


def _train(training: Training) -> str:
    """Run one training as a user would, with its output beside its directory; return what it came to."""
    training.directory.parent.mkdir(parents=True, exist_ok=True)
    log = training.directory.with_name(training.directory.name + ".log")
    words = [word for override in training.overrides for word in ("--set", override)]
    resume = ["--resume"] if (training.directory / run.RECIPE).exists() else []
    command = [sys.executable, ROOT / "hf_vla/train.py", training.recipe_file, *words, *resume]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("w") as output:
        done = subprocess.run(
            [*map(str, command), "--output", str(training.directory)],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if done.returncode:
        raise SystemExit(f"{training.name} failed:\n{log.read_text()[-TAIL:]}")
    info = run.read_info(training.directory)
    return f"{training.name}: {info['steps']} steps in {info['seconds']:.0f} s"


def facts_of(training: Training) -> dict[str, Any]:
    """Say what a run was: steps, time, size, final training loss."""
    info = run.read_info(training.directory)
    facts = {key: info[key] for key in ("steps", "seconds", "samples_per_second", "parameters")}
    return {**facts, "loss": info["train"]["loss"]}


def to_evaluate(recipe: Recipe, tasks: Sequence[str], starts: int, swapped: dict | None = None) -> Recipe:
    """Give the recipe with other rollouts: `starts` of each task, and others for each `training.seed`."""
    first = recipe.evaluation.seed + BEYOND + recipe.training["seed"] * starts
    evaluation = dataclasses.replace(
        recipe.evaluation, tasks=list(tasks), episodes=starts, seed=first, swapped=swapped or {}
    )
    return dataclasses.replace(recipe, evaluation=evaluation)


def success_counts(training: Training, condition: str, recipe: Recipe, workers: int) -> dict[str, Counts]:
    """Roll a run's policy out under one condition, or read what came of it before; one row a task."""
    known = run.read_info(training.directory).get("benchmark_rollouts", {})
    asked = dataclasses.asdict(recipe.evaluation)
    if known.get(condition, {}).get("asked") != asked:
        start = time.perf_counter()
        counts = count(condition, roll_out(condition, training.directory, recipe, workers))
        counts.pop("mean_success")
        known[condition] = {"asked": asked, "counts": counts, "seconds": round(time.perf_counter() - start, 1)}
        run.update_info(training.directory, {"benchmark_rollouts": known})
        told = ", ".join(f"{task} {row['successes']}/{row['episodes']}" for task, row in counts.items())
        print(f"{training.name}, {condition}: {told} ({known[condition]['seconds']:.0f} s)", flush=True)
    return known[condition]["counts"]


def random_counts(recipe: Recipe, workers: int) -> dict[str, Counts]:
    """Roll random actions out from the same starts."""
    counts = count(RANDOM, roll_out(RANDOM, Path(), recipe, workers))
    counts.pop("mean_success")
    return counts


def pool(rows: Iterable[Counts]) -> Counts:
    """Add counts up, as if each rollout were a draw of its own."""
    rows = list(rows)
    successes, episodes = (sum(row[key] for row in rows) for key in ("successes", "episodes"))
    return {"successes": successes, "episodes": episodes, "interval": wilson_interval(successes, episodes)}


def compare(sighted: Counts, blind: Counts) -> dict[str, Any]:
    """Set a policy beside its blind control: the difference in success, with Newcombe's 95 % interval."""
    interval = difference_interval(sighted["successes"], sighted["episodes"], blind["successes"], blind["episodes"])
    difference = sighted["successes"] / sighted["episodes"] - blind["successes"] / blind["episodes"]
    sees = interval[0] > 0
    return {"sighted": sighted, "blind": blind, "difference": difference, "interval": interval, "sees": sees}


def sight_on(task: str, sighted: dict[int, dict], blind: dict[int, dict]) -> dict[str, Any]:
    """Compare on one task, each seed alone and all together; the arguments are each seed's counts by task."""
    return {
        "seeds": {str(seed): compare(sighted[seed][task], blind[seed][task]) for seed in sighted},
        "pooled": compare(*(pool(counts[task] for counts in side.values()) for side in (sighted, blind))),
    }


def require_simulator() -> None:
    """Stop where nothing can be drawn.

    Raises:
        SystemExit: saying what is missing.
    """
    if problem := graphics_problem():
        raise SystemExit(f"There is no closed loop without pictures: {problem}")
