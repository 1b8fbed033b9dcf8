"""Does every fusion, head and way of training learn, what does each take, and which of them see?

    python -m benchmarks.fusions_and_heads --dataset datasets/metaworld_two

Two parts. The matrix: each fusion with each head, with backbones frozen, adapted, adapted on 4 bits, and fully trained, at a
size that trains in seconds on the committed sample; combinations that make no sense stand beside it with the reason that
they are refused with. The closed loop: five of them as `recipes/tiny.json` has them, on the same Meta-World data and seeds,
each beside its matched blind control. A fusion whose difference in success isn't above zero is reported as not seeing.
Record the data with

    python data_scripts/record_metaworld.py --out datasets/metaworld_two --task button-press-topdown-v3 --task reach-v3 \\
        --episodes 150 --image-size 84 --action-repeat 4 --field-of-view corner2=30

To see only that all of it runs: `--dataset tests/data/metaworld_sample --seeds 1 --starts 2 --steps 2 --cases 2
--folder runs/smoke --results runs/smoke`.
"""

import argparse
import functools
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import matrix
from benchmarks.closed_loop import (
    ROOT,
    SIGHT_TASKS,
    Training,
    compare,
    facts_of,
    pool,
    require_simulator,
    sight_on,
    sighted_and_blind,
    success_counts,
    to_evaluate,
    train_side_by_side,
)
from benchmarks.result import RESULTS, write_result
from hf_vla.evaluation import POLICY

IN_CLOSED_LOOP = (
    ("cross_attention", "l1"),
    ("gated", "l1"),
    ("prefix", "l1"),
    ("cross_attention", "flow"),
    ("cross_attention", "discrete"),
)
HEAD_LAYERS = 1
"""Of every head alike; without any, the noisy actions of a flow head couldn't see each other."""


def main() -> None:
    """Measure the matrix, then the closed loop, and write both."""
    arguments = parse()
    begun = time.perf_counter()
    rows = measure_matrix(matrix.ALL[: arguments.cases], arguments.folder, arguments.workers)
    results = {
        "matrix": {"steps": matrix.STEPS, "step_ms_on": "one thread", "rows": rows},
        "refused": {name: matrix.reason_of_refusal(sections) for name, sections in matrix.REFUSED.items()},
    }
    if arguments.seeds:
        require_simulator()
        results["closed_loop"] = measure_closed_loop(arguments)
    results["seconds_of_this_call"] = round(time.perf_counter() - begun)
    print(f"Written: {write_result('fusions_and_heads', results, arguments.results)}")
    stuck = ["-".join((row["fusion"], row["head"], row["mode"])) for row in rows if not row["loss"]["halved"]]
    if stuck:
        raise SystemExit(f"The loss didn't fall by half in {matrix.STEPS} steps: {', '.join(stuck)}.")


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes/tiny.json", help="of the closed loop")
    parser.add_argument("--dataset", default="datasets/metaworld_two", help="of the closed loop")
    parser.add_argument("--folder", type=Path, default=Path("runs/fusions_and_heads"), help="where runs are kept")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the result is written")
    parser.add_argument("--seeds", type=int, default=3, help="of the closed loop; 0 leaves it out")
    parser.add_argument("--steps", type=int, default=1500, help="of each training of the closed loop")
    parser.add_argument("--starts", type=int, default=30, help="rollouts a task and seed")
    parser.add_argument("--cases", type=int, default=None, help="first cells of the matrix only")
    parser.add_argument("--workers", type=int, default=2, help="processes at a time, one thread each")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE")
    return parser.parse_args()


def measure_matrix(cases: list[matrix.Case], folder: Path, workers: int) -> list[dict[str, Any]]:
    """Train every case, `workers` at a time."""
    weights = matrix.write_weights(folder / "weights")
    measure = functools.partial(matrix.measure_case, weights=weights, steps=matrix.STEPS, folder=folder / "matrix")
    rows = []
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as processes:
        for case, row in zip(cases, processes.map(measure, cases), strict=True):
            rows.append(row)
            fall = f"{row['loss']['first']:.2f} to {row['loss']['last']:.2f}"
            print(f"[{len(rows)}/{len(cases)}] {' '.join(case)}: loss {fall}, {row['step_ms']} ms", flush=True)
    return rows


def measure_closed_loop(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train each fusion and head with its blind control on every seed, roll them out, and compare."""
    runs = {
        f"{fusion}+{head}": {
            seed: sighted_and_blind(
                arguments.recipe,
                [
                    f"data.dataset={arguments.dataset}",
                    f"training.max_steps={arguments.steps}",
                    f"model.fusion.type={fusion}",
                    f"model.head.type={head}",
                    f"model.head.num_layers={HEAD_LAYERS}",
                    *arguments.overrides,
                ],
                arguments.folder,
                seed,
                f"{fusion}-{head}",
            )
            for seed in range(arguments.seeds)
        }
        for fusion, head in IN_CLOSED_LOOP
    }
    train_side_by_side([t for pairs in runs.values() for pair in pairs.values() for t in pair], arguments.workers)
    return {
        "dataset": Path(arguments.dataset).name,
        "steps": arguments.steps,
        "starts_a_task_and_seed": arguments.starts,
        "rows": {name: verdict(pairs, arguments.starts, arguments.workers) for name, pairs in runs.items()},
    }


def verdict(pairs: dict[int, tuple[Training, Training]], starts: int, workers: int) -> dict[str, Any]:
    """Roll one fusion and head out beside its blind control, and say whether it sees."""
    sighted, blind = (
        {
            seed: success_counts(pair[side], POLICY, to_evaluate(pair[side].recipe, SIGHT_TASKS, starts), workers)
            for seed, pair in pairs.items()
        }
        for side in (0, 1)
    )
    both = compare(*(pool(row for counts in side.values() for row in counts.values()) for side in (sighted, blind)))
    return {
        "verdict": "seeing" if both["sees"] else "not seeing",
        "all_tasks": both,
        "tasks": {task: sight_on(task, sighted, blind) for task in SIGHT_TASKS},
        "trainings": {training.name: facts_of(training) for pair in pairs.values() for training in pair},
    }


if __name__ == "__main__":
    main()
