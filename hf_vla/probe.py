"""Real training for the probe: a recipe's own trainer, at any micro-batch, on the samples with the longest prompts."""

import dataclasses
import tempfile
from pathlib import Path

from torch.utils.data import Dataset, Subset

from hf_vla.arguments import training_arguments
from hf_vla.data.collator import VLACollator
from hf_vla.data.windows import WindowDataset
from hf_vla.memory.budget import MemoryBudgetError
from hf_vla.memory.meter import GPUMeter, Meter
from hf_vla.memory.out_of_memory import free_cache
from hf_vla.memory.probe import ProbeResult, calibrate, probe
from hf_vla.prepare import build_trainer
from hf_vla.recipe import Recipe
from hf_vla.trainer import VLATrainer

MICRO_STEPS = 2
"""Of an optimizer step that has more: later ones do what the second does, beside the first one's gradients."""


def probe_recipe(recipe: Recipe, budget: int, meter: Meter | None = None) -> ProbeResult:
    """Find the largest micro-batch of a recipe that fits a budget on this machine, by training.

    Args:
        recipe: the run; its effective batch is the largest micro-batch that is tried.
        budget: bytes that the process may use.
        meter: None measures the first GPU, and stores its constants for the next plan.

    Raises:
        ValueError: if there is no GPU to measure.
    """
    uses_gpu = meter is None
    meter = meter or GPUMeter()
    effective = recipe.data.batch_size * recipe.training["gradient_accumulation_steps"]
    with tempfile.TemporaryDirectory() as folder:
        result = probe(TrainingRuns(recipe, Path(folder)), meter, budget, effective)
    if uses_gpu:
        calibrate(result)
    return result


class TrainingRuns:
    """Trains a recipe for a few steps at any micro-batch, each time with an optimizer of its own, on one model.

    Args:
        recipe: the run.
        folder: for the checkpoints that it writes.
    """

    def __init__(self, recipe: Recipe, folder: Path):
        self.recipe, self.folder = recipe, folder
        first = build_trainer(recipe, folder / "first")
        self.model, self.processor = first.bare_model(), first.processing_class
        self.train_dataset, self.eval_dataset = first.train_dataset, first.eval_dataset

    def __call__(self, batch_size: int, steps: int) -> bool:
        """Train, evaluate one batch and write a checkpoint; whether all of it went through as it is, uncut."""
        recipe = self._recipe(batch_size, steps)
        evaluated = None if self.eval_dataset is None else longest(self.eval_dataset, batch_size)
        trainer = VLATrainer(
            recipe=recipe,
            processor=self.processor,
            model=self.model,
            args=training_arguments(recipe, str(self.folder / f"{batch_size}x{steps}")),
            train_dataset=longest(self.train_dataset, MICRO_STEPS * batch_size),
            eval_dataset=evaluated,
            data_collator=VLACollator(self.processor),
        )
        trainer.batcher.rungs.clear()  # whether it fits as it is, is the question
        try:
            trainer.train()
            fits = trainer.is_uncut and trainer.evaluation_batcher.sizes[-1:] == [batch_size]
        except (MemoryBudgetError, SystemExit):  # nothing fits; a step that can't be run again
            fits = False
        self.model.zero_grad(set_to_none=True)
        del trainer
        free_cache()
        return fits

    def _recipe(self, batch_size: int, steps: int) -> Recipe:
        """Give the same run, short."""
        effective = self.recipe.data.batch_size * self.recipe.training["gradient_accumulation_steps"]
        is_accumulated = effective > batch_size and not self.recipe.memory.optimizer_in_backward
        training = {
            **self.recipe.training,
            "max_steps": steps,
            "gradient_accumulation_steps": MICRO_STEPS if is_accumulated else 1,
            "per_device_eval_batch_size": batch_size,
            "eval_strategy": "no" if self.eval_dataset is None else "steps",
            "eval_steps": steps,
            "save_strategy": "steps",
            "save_steps": steps,
            "save_total_limit": 1,
            "report_to": [],
            "disable_tqdm": True,
        }
        data = dataclasses.replace(self.recipe.data, batch_size=batch_size)
        return dataclasses.replace(self.recipe, data=data, training=training)


def longest(dataset: WindowDataset, count: int) -> Dataset:
    """Take as many samples as are asked for, those with the longest instructions first, over and over if need be."""
    order = sorted(range(len(dataset)), key=lambda i: -len(dataset.tasks[i]))
    return Subset(dataset, [order[i % len(order)] for i in range(count)])
