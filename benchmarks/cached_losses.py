"""Does training from a cache give the losses of running the backbones in every step?

    python -m benchmarks.cached_losses

On a CPU, at the small sizes of `cache_cases.py`, on the committed sample, for runs in float32 and in bfloat16. Stored as the
run computes them (`auto`, the default), features are the same numbers; stored as less, the losses of single steps drift
apart, and two controls say why: `rounded` runs VGGT in every step and rounds its tokens to bfloat16 there, `nudged` trains
from pixels with weights that begin one float32 rounding away.
"""

import argparse
import functools
import itertools
import multiprocessing
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.cache_cases import BATCH, PRECISIONS, SIZES, WAYS, make_case
from benchmarks.result import RESULTS, write_result
from hf_vla.caching import build_caches, with_cache
from hf_vla.data.feature_cache import MANIFEST, read_manifest
from hf_vla.prepare import build_trainer
from hf_vla.recipe import Recipe
from hf_vla.trainer import VLATrainer

STORED = {"float32": ("auto", "bfloat16", "float8"), "bfloat16": ("auto", "float8")}
"""What features are stored as, for each precision of a run."""
TOLERANCE = {"auto": 1e-4, "bfloat16": 1e-2, "float8": 1e-1}
"""Largest difference of a loss, relative to it, that is called the same."""
STEPS = 100


def main() -> None:
    """Compare every way of training in every precision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--workers", type=int, default=2, help="trainings at a time")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the result is written")
    options = parser.parse_args()
    cases = list(itertools.product(WAYS, PRECISIONS))
    with tempfile.TemporaryDirectory() as folder:
        compare = functools.partial(compare_losses, steps=options.steps, folder=Path(folder))
        with ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn")) as processes:
            found = dict(zip(cases, processes.map(compare, cases), strict=True))
    results = {"sizes": SIZES, "batch_size": BATCH, "steps": options.steps}
    results |= {way: {name: found[way, name] for name in PRECISIONS} for way in WAYS}
    print(f"Written: {write_result('cached_losses', results, options.results)}")


def compare_losses(case: tuple[str, str], steps: int, folder: Path) -> dict[str, Any]:
    """Train without a cache, and from one of each kind; then the controls."""
    torch.set_num_threads(1)
    (way, precision), rows = case, {}
    folder = folder / way / precision
    make = functools.partial(make_case, way, folder, precision=precision)
    exact = losses(with_cache(make(), []), steps, folder / "uncached")
    for stored in STORED[precision]:
        recipe = make(stored)
        built = build_caches(recipe)
        found = difference(losses(recipe, steps, folder / f"run_{stored}"), exact)
        errors = {path.name.split("-")[0]: read_manifest(path / MANIFEST)["relative_error"] for path in built}
        same = found["largest_relative_difference"] <= TOLERANCE[stored]
        rows[stored] = {**found, "tolerance": TOLERANCE[stored], "same": same, "stored_error_rms": errors}
    controls = {
        name: difference(losses(with_cache(make(), []), steps, folder / name, change), exact)
        for name, change in (CONTROLS.items() if precision == "float32" else ())
    }
    return {"first_loss": exact[0], "last_loss": exact[-1], "stored_as": rows, "controls": controls}


def difference(found: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    """Say how far the losses of two runs lie apart."""
    apart = np.abs(found / exact - 1)
    names = ("largest", "mean", "last_ten_steps_mean")
    values = (np.max(apart), np.mean(apart), np.abs(found[-10:].mean() / exact[-10:].mean() - 1))
    return {f"{name}_relative_difference": float(value) for name, value in zip(names, values, strict=True)}


def losses(
    recipe: Recipe, steps: int, folder: Path, change: Callable[[VLATrainer], None] = lambda trainer: None
) -> np.ndarray:
    """Train, and give the loss of each step."""
    recipe.training["max_steps"] = steps
    trainer = build_trainer(recipe, folder)
    change(trainer)
    trainer.train()
    return np.array([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


def round_tokens(trainer: VLATrainer) -> None:
    """Let the model round VGGT's tokens to bfloat16, each time anew."""
    model = trainer.bare_model().model
    encode = model.encode_views
    model.encode_views = lambda pixels: encode(pixels).bfloat16()


def nudge(trainer: VLATrainer) -> None:
    """Move each weight that trains by one rounding."""
    with torch.no_grad():
        for parameter in trainer.bare_model().parameters():
            if parameter.requires_grad:
                parameter.nextafter_(torch.full_like(parameter, torch.inf))


CONTROLS = {"rounded": round_tokens, "nudged": nudge}

if __name__ == "__main__":
    main()
