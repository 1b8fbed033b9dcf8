"""Smaller pictures, fewer tokens, an earlier layer of VGGT: what does each save, and what does it cost in quality?

    python data_scripts/record_metaworld.py --out datasets/metaworld_button --task button-press-topdown-v3 --episodes 150 \\
        --image-size 126 --action-repeat 4 --field-of-view corner2=30 --noise 0.7
    python -m benchmarks.cost_and_quality --dataset datasets/metaworld_button

One table, in which one thing at a time is changed from the middle (518 pixels, g = 8, all of VGGT-1B). Cost is that of full
size: `recipes/lora.json` planned for one GPU, with VGGT run in each step, and with its tokens cached. Quality is that of a
policy small enough to be trained here, changed in proportion (`SMALL`): 37, 28, 24 and 16 patches a side become 9, 7, 6 and
4; grids of 4, 8 and 16 become 1, 2 and 4; layer 11 of 24 becomes the first of 2 (layer 17 has no counterpart, and is only
planned). It is `recipes/tiny.json` with LLaMA reading the views, as in `lora.json`. Pictures are recorded at the largest
size, so that the smaller ones show less.

What that can't tell: the small VGGT is trained from random weights, so an earlier layer is a shallower network here, and
an earlier stage of a pretrained one there; and the data are of one simulated task. Errors are of action chunks on held-out
episodes, others for each seed; a row is set beside the middle's of the same seed, hence of the same episodes. The blind
control, which is shown the mean picture only, says how much there was to be seen.
"""

import argparse
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.closed_loop import ROOT, Training, facts_of, train_in_turn
from benchmarks.result import RESULTS, write_result
from hf_vla.assemble import build_config
from hf_vla.data.feature_store import row_bytes
from hf_vla.evaluation import evaluate_offline
from hf_vla.memory.planner import Plan, plan_recipe
from hf_vla.memory.shapes import Shapes
from hf_vla.memory.sizes import format_size
from hf_vla.recipe import Recipe, load_recipe

FULL_RECIPE, SMALL_RECIPE = ROOT / "recipes/lora.json", ROOT / "recipes/tiny.json"
GPU, BUDGET = "RTX 6000 Ada", "28GiB"
COMMON = (
    "model.vggt.depth=2",
    "model.vggt.embed_dim=48",
    "model.fusion.type=prefix",
    "data.batch_size=16",
    "data.eval_fraction=0.1",
    "training.eval_strategy=no",
    "evaluation.simulator=none",
    "evaluation.tasks=[]",
    "evaluation.swapped={}",
)
MM = 10.0
"""Of an action of 1: Meta-World moves what the arm follows by 1 cm a simulator step."""


class Setting(NamedTuple):
    """What is varied, at full size."""

    image_size: int = 518
    pool_grid: int = 8
    layer: int = 23


MIDDLE = Setting()
SETTINGS = (
    MIDDLE,
    *(Setting(image_size=size) for size in (392, 336, 224)),
    *(Setting(pool_grid=grid) for grid in (4, 16)),
    *(Setting(layer=layer) for layer in (17, 11)),
)
SMALL = Setting({518: 126, 392: 98, 336: 84, 224: 56}, {4: 1, 8: 2, 16: 4}, {23: 1, 11: 0})
"""Full size to the size that is trained."""
BLIND, SMALLEST = "blind", Setting(image_size=224)
"""The blind control is trained at the smallest size: one picture, always the same, tells nothing at any."""
TRAINED = [setting for setting in SETTINGS if setting.layer in SMALL.layer]

Runs = dict[Setting | str, list[Training]]
"""The trainings of each setting, and of the blind control, one a seed."""


def main() -> None:
    """Train, plan, evaluate, write."""
    arguments = parse()
    runs: Runs = {setting: trainings_of(shrunk(setting), arguments) for setting in TRAINED}
    runs[BLIND] = trainings_of(shrunk(SMALLEST), arguments, "blind-", ["data.pictures=mean"])
    train_in_turn([own[seed] for seed in range(arguments.seeds) for own in runs.values()], arguments.workers)
    rows = rows_of(runs)
    results = {
        "cost_of": {"recipe": FULL_RECIPE.name, "gpu": GPU, "batch_size": load_recipe(FULL_RECIPE).data.batch_size},
        "quality_of": {"recipe": SMALL_RECIPE.name, "settings": list(COMMON), "steps": arguments.steps},
        "without_sight_mm": {"blind": quality_of(runs, BLIND), **baselines_of(runs[MIDDLE])},
        "rows": rows,
        "trainings": {training.name: facts_of(training) for own in runs.values() for training in own},
    }
    path = write_result("cost_and_quality", results, arguments.results)
    print(table(rows), json.dumps(results["without_sight_mm"]), f"Written: {path}", sep="\n\n")


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="demonstrations recorded at 126 pixels or more")
    parser.add_argument("--folder", type=Path, default=Path("runs/cost_and_quality"), help="where runs are kept")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the result is written")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600, help="of each training")
    parser.add_argument("--workers", type=int, default=2, help="processes at a time, one thread each")
    return parser.parse_args()


def rows_of(runs: Runs) -> list[dict[str, Any]]:
    """Set what each setting costs at full size beside its quality at small size."""
    rows = []
    for setting in SETTINGS:
        row = {"full": setting._asdict(), "cost": cost_of(setting), "small": None, "quality": None}
        if setting in runs:
            row |= {"small": shrunk(setting)._asdict(), "quality": quality_of(runs, setting)}
        rows.append(row)
    return rows


def cost_of(setting: Setting) -> dict[str, Any]:
    """Plan the full-size recipe at a setting, with VGGT run in each step and with its tokens cached."""
    recipe = load_recipe(FULL_RECIPE, overrides_of(setting))
    each_step, cached = plan(recipe), plan_cached(setting.pool_grid)
    return {
        "tflop_a_pair": each_step.flops["vggt"] / 1e12,
        "vggt_bytes": each_step.components["vggt"]["weights"],
        "peak_bytes": each_step.total,
        "samples_per_second": each_step.samples_per_second,
        "cached_peak_bytes": cached.total,
        "cached_samples_per_second": cached.samples_per_second,
        "cache_bytes_a_sample": cache_bytes(recipe),
    }


def plan(recipe: Recipe) -> Plan:
    """Plan for one GPU and for a sample's default sizes, whatever lies on this machine."""
    return plan_recipe(recipe, BUDGET, gpus=1, gpu=GPU, shapes=Shapes())


@functools.cache
def plan_cached(pool_grid: int) -> Plan:
    """Plan the full-size recipe with cached tokens, whose number is all that training then knows of VGGT."""
    return plan(load_recipe(FULL_RECIPE, [f"model.pool_grid={pool_grid}", 'memory.cache=["vggt"]']))


def cache_bytes(recipe: Recipe) -> int:
    """Count what a pair's cached tokens take."""
    shapes = Shapes()
    config = build_config(recipe, shapes.num_views, shapes.state_dim, shapes.action_dim)
    shape = (shapes.num_views, config.pool_grid**2, 2 * config.vggt_config.embed_dim)
    return row_bytes(shape, recipe.stored_dtype)


def overrides_of(setting: Setting) -> list[str]:
    """Give a setting as a recipe's overrides."""
    size, grid, layer = setting
    return [f"data.image_size={size}", f"model.pool_grid={grid}", f"model.vggt_layer={layer}"]


def shrunk(setting: Setting) -> Setting:
    """Give a setting in the proportions of what is trained."""
    return Setting(*(small[full] for small, full in zip(SMALL, setting, strict=True)))


def trainings_of(
    small: Setting, arguments: argparse.Namespace, prefix: str = "", overrides: Sequence[str] = ()
) -> list[Training]:
    """Describe the trainings at a small setting, one a seed."""
    trainings = []
    for seed in range(arguments.seeds):
        all_overrides = (
            f"data.dataset={arguments.dataset}",
            *COMMON,
            *overrides_of(small),
            f"model.vggt.img_size={small.image_size}",
            f"training.max_steps={arguments.steps}",
            f"training.seed={seed}",
            *overrides,
        )
        name = prefix + "-".join(map(str, (*small, seed)))
        trainings.append(Training(name, SMALL_RECIPE, all_overrides, arguments.folder / name))
    return trainings


def quality_of(runs: Runs, setting: Setting | str) -> dict[str, Any]:
    """Give the errors of each seed, their mean and spread, and how far they are from the middle's of the same seed."""
    own, middle = (np.array([error_of(training) for training in runs[which]]) for which in (setting, MIDDLE))
    return {
        "movement_mm": own.tolist(),
        "mean_mm": float(own.mean()),
        "std_mm": float(own.std(ddof=1)) if len(own) > 1 else 0.0,
        "more_than_middle_mm": (own - middle).tolist(),
    }


@functools.cache
def error_of(training: Training) -> float:
    """Measure a run on its held-out episodes: mean error of the three directions of movement, in mm."""
    return movement_mm(evaluate_offline(training.directory)["policy"])


def baselines_of(trainings: list[Training]) -> dict[str, float]:
    """Average what needs no learning over the seeds' held-out episodes, in mm."""
    reports = [evaluate_offline(training.directory) for training in trainings]
    names = ("mean_action", "hold_still", "nearest_state")
    return {name: float(np.mean([movement_mm(report[name]) for report in reports])) for name in names}


def movement_mm(errors: dict[str, Any]) -> float:
    """Average the error of the three directions of movement, in mm a simulator step."""
    return MM * float(np.mean(errors["mae"][:3]))


def table(rows: list[dict[str, Any]]) -> str:
    """Lay cost against quality, a line a setting."""
    lines = [
        "| pixels | g | layer | TFLOP a pair | VGGT | peak | samples/s | cached: peak | samples/s | a sample's cache | "
        "error at small scale, mm | more than the middle, by seed |",
        "|" + "---|" * 12,
    ]
    lines += [f"| {' | '.join(cells(row))} |" for row in rows]
    return "\n".join(lines)


def cells(row: dict[str, Any]) -> list[str]:
    """Write one line of the table."""
    cost, quality = row["cost"], row["quality"]
    error = "not trained" if quality is None else f"{quality['mean_mm']:.3f} ± {quality['std_mm']:.3f}"
    more = "" if quality is None else " ".join(f"{x:+.3f}" for x in quality["more_than_middle_mm"])
    return [
        *map(str, row["full"].values()),
        f"{cost['tflop_a_pair']:.2f}",
        format_size(cost["vggt_bytes"]),
        format_size(cost["peak_bytes"]),
        f"{cost['samples_per_second']:.1f}",
        format_size(cost["cached_peak_bytes"]),
        f"{cost['cached_samples_per_second']:.1f}",
        f"{cost['cache_bytes_a_sample'] / 2**10:.0f} KiB",
        error,
        more,
    ]


if __name__ == "__main__":
    main()
