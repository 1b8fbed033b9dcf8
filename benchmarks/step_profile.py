"""Where does a step's time go?

    python -m benchmarks.step_profile                         # full size, on a GPU
    python -m benchmarks.step_profile --scale proportional    # a thousandth of the arithmetic, on a CPU

The project's own trainer on random weights and noise; the device is waited for at every boundary, so the sum is a little
more than an undisturbed step, which is timed beside it. Utilisation counts the model's arithmetic, without what
checkpointing computes twice, against the rate of a large matrix product on the same device.
"""

import argparse
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import TrainerCallback

from benchmarks.full_size import SCALES, WARM_UP, Case, make_trainer, model_flops, now, train
from benchmarks.gpu_suite import gpu_name, matrix_rate, this_meter
from benchmarks.result import RESULTS, write_result

STEPS = 10


class Boundaries(TrainerCallback):
    """Reads the clock at each boundary of a step and books the time since the last one."""

    def __init__(self, model: nn.Module):
        self.seconds: dict[str, float] = defaultdict(float)
        self._last, self._is_warm = now(), False
        self._follow(model, "fusion, head")
        for name, part in (("VGGT", model.model.vggt), ("LLaMA forward", model.model.lang_encoder)):
            if part is not None:
                self._follow(part, name, outer="fusion, head")

    def _follow(self, module: nn.Module, name: str, outer: str = "other") -> None:
        module.register_forward_pre_hook(lambda *_: self._book(outer))
        module.register_forward_hook(lambda *_: self._book(name))

    def _book(self, name: str) -> None:
        """Give the time since the last boundary to a name."""
        time = now()
        if self._is_warm:
            self.seconds[name] += time - self._last
        self._last = time

    def on_step_begin(self, args, state, control, **kwargs):
        """Count what lies before as fetching data."""
        self._book("data")
        self._is_warm = state.global_step >= WARM_UP

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        """Count what follows the forward as backward; clipping is in it."""
        self._book("backward")

    def on_optimizer_step(self, args, state, control, **kwargs):
        """Count the update."""
        self._book("optimizer")

    def on_step_end(self, args, state, control, **kwargs):
        """Count what is left: schedule, logging, moving the batch."""
        self._book("other")
        self._is_warm = self._is_warm and state.global_step < state.max_steps  # what follows is evaluation


def main() -> None:
    """Profile each recipe, print the tables, write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=["lora.json", "safe.json"], help="files in recipes/")
    parser.add_argument("--scale", choices=SCALES, default="full")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.scale == "full" and not torch.cuda.is_available():
        raise SystemExit("There is no GPU here: nothing is measured at full size. Try --scale proportional.")
    results = {"scale": options.scale}
    for recipe in options.recipes:
        results[recipe] = profile(Case(recipe, {"memory": {"cache": []}}), options.scale)
        Console().print(table(recipe, results[recipe]))
    write_result("step_profile", results, options.results)


def profile(case: Case, scale: str) -> dict[str, Any]:
    """Train twice, undisturbed and with the clock at every boundary."""
    meter, recipe = this_meter(), case.load(scale)
    with tempfile.TemporaryDirectory() as folder:
        undisturbed = train(make_trainer(recipe, case.shapes, Path(folder) / "undisturbed", STEPS))
        trainer = make_trainer(recipe, case.shapes, Path(folder) / "profiled", STEPS)
        boundaries = Boundaries(trainer.bare_model())
        trainer.add_callback(boundaries)
        train(trainer)
    flops = model_flops(case, recipe, gpu_name(meter))
    rate = matrix_rate(is_small=scale != "full")
    return {
        "measured_on": meter.name,
        "micro_batch": recipe.data.batch_size,
        "seconds_a_step": undisturbed["seconds_a_step"],
        "samples_per_second": undisturbed["samples_per_second"],
        "utilisation": flops * undisturbed["samples_per_second"] / rate,
        "parts": {name: seconds / (STEPS - WARM_UP) for name, seconds in boundaries.seconds.items()},
    }


def table(recipe: str, results: dict[str, Any]) -> Table:
    """Lay the parts out, the longest first."""
    total = sum(results["parts"].values())
    made = Table(title=f"{recipe} on {results['measured_on']}: {results['seconds_a_step'] * 1e3:.1f} ms a step")
    for name in ("part", "ms", "share"):
        made.add_column(name, justify="left" if name == "part" else "right")
    for name, seconds in sorted(results["parts"].items(), key=lambda item: -item[1]):
        made.add_row(name, f"{seconds * 1e3:.1f}", f"{seconds / total:.0%}")
    made.caption = f"utilisation {results['utilisation']:.0%}, {results['samples_per_second']:.1f} samples/s"
    return made


if __name__ == "__main__":
    main()
