"""What does every recipe take, and how long does its plan take?

    python -m benchmarks.plans

Each recipe is planned in a process of its own, as `hf-vla plan` does it, for 28 GiB of an RTX 6000 Ada. The results go to
benchmarks/results/plans.json, and each predicted peak into its recipe's `about`.
"""

import json
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.result import write_result

RECIPES = Path("recipes")
BUDGET, GPU = "28GiB", "RTX 6000 Ada"
KEPT = ("total", "tensor_peak", "peak_phase", "fits", "batch_size", "accumulation", "gpus", "samples_per_second")
PEAK = re.compile(r'"predicted_peak_bytes": (?:null|\d+)')


def plan_alone(recipe: Path) -> dict:
    """Plan a recipe, and give what it takes, and the seconds by the clock and of all processors together."""
    command = [sys.executable, "-m", "hf_vla.cli", "plan", str(recipe), "--budget", BUDGET, "--gpu", GPU, "--json"]
    began, used = time.perf_counter(), processor_seconds()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds, used = time.perf_counter() - began, processor_seconds() - used
    if done.returncode not in (0, 3):
        raise SystemExit(f"{recipe} can't be planned:\n{done.stderr}")
    plan = json.loads(done.stdout)
    facts = {key: plan[key] for key in KEPT}
    return {"recipe": str(recipe), **facts, "seconds": round(seconds, 1), "processor_seconds": round(used, 1)}


def processor_seconds() -> float:
    """Give what the processes that this one has waited for have taken of the processors."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def write_peak(recipe: Path, predicted: int) -> None:
    """Write the predicted peak into a recipe, and leave the rest of the file as it is."""
    text = recipe.read_text()
    recipe.write_text(PEAK.sub(f'"predicted_peak_bytes": {predicted}', text, count=1))


def main() -> None:
    """Plan every recipe, print and write what came out."""
    rows = []
    for recipe in sorted([*RECIPES.glob("*.json"), *RECIPES.glob("guide/*.yaml")]):
        rows.append(plan_alone(recipe))
        print(json.dumps(rows[-1]), flush=True)
    write_result("plans", {"budget": BUDGET, "gpu": GPU, "plans": rows})
    for row in rows:
        write_peak(Path(row["recipe"]), row["total"])


if __name__ == "__main__":
    main()
