"""Does training from a cache give the losses of running the backbones in every step?

    python -m benchmarks.cached_losses

On a CPU, at the small sizes of `cache_cases.py`, on the committed sample four times over, for float32 and bfloat16 runs;
ends with an error where a tolerance is exceeded:

- `auto`, the default, stores what the run computes. In float32 every loss is the same to 1e-4 of it.
- In bfloat16 the losses of any two runs drift apart once a single number differs; how far, `nudged` says, which trains from
  pixels with weights that begin one rounding away. On average over the steps a run from a cache may differ twice as much.
- Features stored as less than the run computes in are other features. On average over the steps the losses may differ by
  1e-2 (bfloat16) and 1e-1 (float8); `rounded` runs VGGT in every step and rounds its tokens to bfloat16 there.

Where LLaMA is cached, what differs is its attention: kernels add up a prompt's keys in another order where a batch pads it
to a length that isn't its own, which a cache can't foresee. `alone` shows that it is nothing else: there LLaMA reads each
prompt by itself in every step, and the losses must be those of the cache to the last bit.
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
from benchmarks.longer_sample import write_longer_sample
from benchmarks.result import RESULTS, write_result
from hf_vla.caching import build_caches, with_cache
from hf_vla.data.feature_cache import MANIFEST, pad_texts, read_manifest
from hf_vla.prepare import build_trainer
from hf_vla.recipe import Recipe
from hf_vla.trainer import VLATrainer

STORED = {"float32": ("auto", "bfloat16", "float8"), "bfloat16": ("auto", "float8")}
"""What features are stored as, for each precision of a run."""
EXACT = 1e-4
"""Largest difference of a loss, relative to it, between float32 runs whose features are the same."""
STORED_AS_LESS = {"bfloat16": 1e-2, "float8": 1e-1}
"""Mean difference that storing features as less may make."""
OF_CONTROL = 2
"""Mean difference of bfloat16 runs whose features are the same but for roundings, as a multiple of the control's."""
STEPS = 100
TIMES = 4
"""How often the sample's 165 observations are repeated: their number must be a multiple of the batch."""


def main() -> None:
    """Compare every way of training in every precision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--workers", type=int, default=2, help="trainings at a time")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the result is written")
    options = parser.parse_args()
    cases = list(itertools.product(WAYS, PRECISIONS))
    with tempfile.TemporaryDirectory() as folder:
        dataset = write_longer_sample(Path(folder) / "dataset", TIMES)
        compare = functools.partial(compare_losses, dataset=dataset, steps=options.steps, folder=Path(folder))
        with ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn")) as processes:
            found = dict(zip(cases, processes.map(compare, cases), strict=True))
    results = {"sizes": SIZES, "batch_size": BATCH, "steps": options.steps}
    results |= {way: {name: found[way, name] for name in PRECISIONS} for way in WAYS}
    print(f"Written: {write_result('cached_losses', results, options.results)}")
    if apart := [name for case in found for name in not_the_same(found[case], *case)]:
        raise SystemExit(f"Not the same losses: {', '.join(apart)}.")


def not_the_same(found: dict[str, Any], way: str, precision: str) -> list[str]:
    """Name what exceeds its tolerance, of one way in one precision."""
    return [f"{way} {precision} {stored}" for stored, row in found["stored_as"].items() if not row["same"]]


def compare_losses(case: tuple[str, str], dataset: Path, steps: int, folder: Path) -> dict[str, Any]:
    """Train without a cache, and the controls; then from a cache of each kind."""
    torch.set_num_threads(1)
    (way, precision), rows = case, {}
    folder = folder / way / precision
    make = functools.partial(make_case, way, folder, precision=precision, dataset=dataset)
    uncached = {
        name: losses(with_cache(make(), []), steps, folder / name, change)
        for name, change in {"exact": leave, "alone": read_alone, **CONTROLS[precision]}.items()
    }
    exact = uncached["exact"]
    controls = {name: difference(uncached[name], exact) for name in ("alone", *CONTROLS[precision])}
    for stored in STORED[precision]:
        recipe = make(stored)
        built = build_caches(recipe)
        cached = losses(recipe, steps, folder / f"run_{stored}")
        errors = {path.name.split("-")[0]: read_manifest(path / MANIFEST)["relative_error"] for path in built}
        rows[stored] = {**judge(stored, precision, difference(cached, exact), controls), "stored_error_rms": errors}
        if stored == "auto":
            rows[stored]["equals_alone"] = np.array_equal(cached, uncached["alone"])
            rows[stored]["same"] &= rows[stored]["equals_alone"]
    return {"first_loss": exact[0], "last_loss": exact[-1], "stored_as": rows, "controls": controls}


def judge(
    stored: str, precision: str, found: dict[str, float], controls: dict[str, dict[str, float]]
) -> dict[str, Any]:
    """Say which difference counts and how large it may be, and whether it is no larger."""
    measure = "mean_relative_difference"
    if stored != "auto":
        allowed = STORED_AS_LESS[stored]
    elif precision == "float32":
        measure, allowed = "largest_relative_difference", EXACT
    else:
        allowed = OF_CONTROL * controls["nudged"][measure]
    return {**found, "tolerance": {measure: allowed}, "same": found[measure] <= allowed}


def leave(trainer: VLATrainer) -> None:
    """Change nothing."""


def difference(found: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    """Say how far the losses of two runs lie apart."""
    apart = np.abs(found / exact - 1)
    names = ("largest", "mean", "last_ten_steps_mean")
    values = (np.max(apart), np.mean(apart), np.abs(found[-10:].mean() / exact[-10:].mean() - 1))
    return {f"{name}_relative_difference": float(value) for name, value in zip(names, values, strict=True)}


def losses(recipe: Recipe, steps: int, folder: Path, change: Callable[[VLATrainer], None] = leave) -> np.ndarray:
    """Train, and give the loss of each step."""
    recipe.training["max_steps"] = steps
    trainer = build_trainer(recipe, folder)
    change(trainer)
    trainer.train()
    return np.array([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


def read_alone(trainer: VLATrainer) -> None:
    """Let LLaMA read each prompt by itself, in every step, as it does for a cache."""
    model, padding = trainer.bare_model().model, trainer.processing_class.tokenizer.pad_token_id
    encode = model.encode_text
    model.encode_text = lambda input_ids: pad_texts([encode(ids[ids != padding][None])[0] for ids in input_ids])[0]


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


CONTROLS = {"float32": {"rounded": round_tokens, "nudged": nudge}, "bfloat16": {"nudged": nudge}}

if __name__ == "__main__":
    main()
