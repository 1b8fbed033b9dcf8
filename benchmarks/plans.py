"""What is every full-size recipe planned to take? Writes the peaks into the recipes' `about`, and everything here."""

import json
import time
from pathlib import Path

from benchmarks.result import write_result
from hf_vla.memory.planner import plan_recipe
from hf_vla.memory.shapes import Shapes
from hf_vla.recipe import load_recipe

RECIPES = Path(__file__).parent.parent / "recipes"
NOT_FOR_GPUS = ("tiny",)


def main() -> None:
    """Plan recipe after recipe, with the stated default shapes, so that every machine gets the same."""
    plans = {}
    for path in sorted(RECIPES.glob("*.json")):
        if path.stem in NOT_FOR_GPUS:
            continue
        start = time.perf_counter()
        plan = plan_recipe(load_recipe(path), shapes=Shapes())
        plans[path.stem] = {
            "total": plan.total,
            "tensor_peak": plan.tensor_peak,
            "budget": plan.budget,
            "fits": plan.fits,
            "gpu": plan.gpu,
            "gpus": plan.gpus,
            "peak_phase": plan.peak_phase,
            "seconds_to_plan": round(time.perf_counter() - start, 1),
        }
        write_prediction(path, plan.total)
        print(f"{path.stem}: {plan.total / 2**30:.2f} GiB", flush=True)
    print(write_result("plans", {"recipes": plans}))


def write_prediction(path: Path, peak: int) -> None:
    """Put a planned peak into a recipe file and leave the rest of its text as it is."""
    recipe = json.loads(path.read_text())
    before = json.dumps(recipe["about"].get("predicted_peak_bytes"))
    key = '"predicted_peak_bytes": '
    path.write_text(path.read_text().replace(key + before, key + str(peak)))


if __name__ == "__main__":
    main()
