"""Does the tiny policy see, and does it listen?

    python -m benchmarks.sight_and_language --dataset datasets/metaworld_tiny

Sight: `recipes/tiny.json` and a matched blind control (same data, seeds and steps, every picture replaced by the mean one)
are trained on three seeds, and act from starts that neither training nor tuning has seen. The claim is that the 95 %
interval of the difference in success lies above zero on both tasks. Language: on the faucets' shared scene each policy is
told to turn the faucet the other way; counted is how often it then does. `make train-tiny` records the dataset.

To see only that all of it runs: `--dataset tests/data/metaworld_sample --seeds 1 --starts 2 --set training.max_steps=2
--folder runs/smoke --results runs/smoke`.
"""

import argparse
import time
from pathlib import Path
from typing import Any

from benchmarks.closed_loop import (
    ROOT,
    SIGHT_TASKS,
    Training,
    facts_of,
    pool,
    random_counts,
    require_simulator,
    sight_on,
    sighted_and_blind,
    success_counts,
    to_evaluate,
    train_side_by_side,
)
from benchmarks.result import RESULTS, write_result
from hf_vla.evaluation import POLICY, SWAPPED

OTHER_WAY = {"faucet-open-v3": "faucet-close-v3", "faucet-close-v3": "faucet-open-v3"}
LISTENS = 0.9
"""Share of starts in which the other instruction must turn the faucet the other way."""

Runs = dict[int, tuple[Training, Training]]
"""Seed to the sighted training and its blind control."""


def main() -> None:
    """Train, roll out, compare, write."""
    arguments = parse()
    require_simulator()
    begun = time.perf_counter()
    overrides = [f"data.dataset={arguments.dataset}", *arguments.overrides]
    runs = {
        seed: sighted_and_blind(arguments.recipe, overrides, arguments.folder, seed) for seed in range(arguments.seeds)
    }
    train_side_by_side([training for pair in runs.values() for training in pair], arguments.workers)
    results = {
        **measure(runs, arguments.starts, arguments.workers),
        "trainings": {training.name: facts_of(training) for pair in runs.values() for training in pair},
        "dataset": Path(arguments.dataset).name,
        "seconds_of_this_call": round(time.perf_counter() - begun),
    }
    path = write_result("sight_and_language", results, arguments.results)
    print(f"\n{summary(results)}\nWritten: {path}")


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes/tiny.json")
    parser.add_argument("--dataset", default="datasets/metaworld_tiny", help="demonstrations of the recipe's tasks")
    parser.add_argument("--folder", type=Path, default=Path("runs/sight_and_language"), help="where runs are kept")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the result is written")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--starts", type=int, default=60, help="rollouts a task and seed")
    parser.add_argument("--workers", type=int, default=2, help="processes at a time, one thread each")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE")
    return parser.parse_args()


def measure(runs: Runs, starts: int, workers: int) -> dict[str, Any]:
    """Roll every run out, each seed from starts of its own, and compare."""
    sighted, blind, swapped = {}, {}, {}
    for seed, (policy, control) in runs.items():
        all_tasks = to_evaluate(policy.recipe, [*SIGHT_TASKS, *OTHER_WAY], starts, OTHER_WAY)
        sighted[seed] = success_counts(policy, POLICY, all_tasks, workers)
        swapped[seed] = success_counts(policy, SWAPPED, all_tasks, workers)
        blind[seed] = success_counts(control, POLICY, to_evaluate(control.recipe, SIGHT_TASKS, starts), workers)
    recipe = to_evaluate(runs[0][0].recipe, [*SIGHT_TASKS, *OTHER_WAY], starts)
    return {
        "starts": {"first": recipe.evaluation.seed, "a_task_and_seed": starts},
        "sight": {task: sight_on(task, sighted, blind) for task in SIGHT_TASKS},
        "language": {task: language_on(task, sighted, swapped) for task in OTHER_WAY},
        "random": random_counts(recipe, workers),
    }


def language_on(task: str, own: dict[int, dict], swapped: dict[int, dict]) -> dict[str, Any]:
    """Count how often the other instruction turned the faucet the other way, beside success under its own."""
    told_other = pool(counts[task] for counts in swapped.values())
    return {
        "told": OTHER_WAY[task],
        "seeds": {str(seed): counts[task] for seed, counts in swapped.items()},
        "turned_the_other_way": told_other,
        "own_instruction": pool(counts[task] for counts in own.values()),
        "listens": told_other["successes"] >= LISTENS * told_other["episodes"],
    }


def summary(results: dict[str, Any]) -> str:
    """Say in a line a task what came out."""
    lines = []
    for task, rows in results["sight"].items():
        both = rows["pooled"]
        counts = " against ".join(
            f"{both[side]['successes']}/{both[side]['episodes']}" for side in ("sighted", "blind")
        )
        low, high = both["interval"]
        lines.append(
            f"{task}: {counts} blind, difference {low:+.2f} to {high:+.2f}: {'sees' if both['sees'] else 'not shown'}"
        )
    for task, rows in results["language"].items():
        turned = rows["turned_the_other_way"]
        lines.append(
            f"{task} told {rows['told']}: turned the other way in {turned['successes']}/{turned['episodes']}: "
            f"{'listens' if rows['listens'] else 'not shown'}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
