"""What does every recipe take, and how long do its plan and a search take?

    python -m benchmarks.plans

Each is asked for in a process of its own, as a person does with `hf-vla plan`, for 28 GiB of an RTX 6000 Ada. The results go
to benchmarks/results/plans.json, and each predicted peak into its recipe's `about`.
"""

import json
import re
import resource
import shlex
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.result import write_result

RECIPES = Path("recipes")
BUDGET, GPU = "28GiB", "RTX 6000 Ada"
KEPT = ("total", "tensor_peak", "peak_phase", "fits", "batch_size", "accumulation", "gpus", "samples_per_second")
SEARCHES = {"language=lora,vggt=frozen": 64, "language=full,vggt=full": 4}
"""What is trained, and the effective batch: all of it in 28 GiB goes without accumulation, so that batch is small."""
PEAK = re.compile(r'"predicted_peak_bytes": (?:null|\d+)')


def plan_alone(recipe: Path) -> dict:
    """Plan a recipe, and give what it takes and how long that took."""
    plan, times = ask([str(recipe)])
    return {"recipe": str(recipe), **{key: plan[key] for key in KEPT}, **times}


def search_alone(train: str, batch: int) -> dict:
    """Search for a training that fits, and give how long that took and what is the fastest."""
    with TemporaryDirectory() as folder:
        output = str(Path(folder) / "planned.json")
        found, times = ask(["--train", train, "--effective-batch", str(batch), "--output", output])
    return {
        "train": train,
        "effective_batch": batch,
        "rungs": found[0]["rungs"],
        **{key: found[0][key] for key in KEPT},
        **times,
    }


def ask(arguments: list[str]) -> tuple[Any, dict[str, float]]:
    """Run `hf-vla plan`, and give its answer, and its seconds by the clock and of all processors together."""
    command = [sys.executable, "-m", "hf_vla.cli", "plan", *arguments, "--budget", BUDGET, "--gpu", GPU, "--json"]
    began, used = time.perf_counter(), processor_seconds()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds, used = time.perf_counter() - began, processor_seconds() - used
    if done.returncode not in (0, 3):
        raise SystemExit(f"{shlex.join(command)} fails:\n{done.stderr}")
    return json.loads(done.stdout), {"seconds": round(seconds, 1), "processor_seconds": round(used, 1)}


def processor_seconds() -> float:
    """Give what the processes that this one has waited for have taken of the processors."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def shown(row: dict) -> dict:
    """Print a row, and give it on."""
    print(json.dumps(row), flush=True)
    return row


def write_peak(recipe: Path, predicted: int) -> None:
    """Write the predicted peak into a recipe, and leave the rest of the file as it is."""
    text = recipe.read_text()
    recipe.write_text(PEAK.sub(f'"predicted_peak_bytes": {predicted}', text, count=1))


def main() -> None:
    """Plan every recipe, search, print and write what came out."""
    recipes = sorted([*RECIPES.glob("*.json"), *RECIPES.glob("guide/*.yaml")])
    plans = [shown(plan_alone(recipe)) for recipe in recipes]
    searches = [shown(search_alone(train, batch)) for train, batch in SEARCHES.items()]
    write_result("plans", {"budget": BUDGET, "gpu": GPU, "plans": plans, "searches": searches})
    for row in plans:
        write_peak(Path(row["recipe"]), row["total"])


if __name__ == "__main__":
    main()
