"""Hugging Face's Trainer, with what a VLA inside a budget needs changed: how the loss is counted, what happens when a
step doesn't fit, and what a checkpoint holds.
"""

import json
import logging
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from hf_vla.checkpoint import load_trained, save_checkpoint
from hf_vla.memory.microbatch import MicroBatcher, halves
from hf_vla.memory.budget import MemoryBudgetError
from hf_vla.memory.ranks import agree, average_gradients
from hf_vla.model.processing_vla import VLAProcessor
from hf_vla.recipe import Recipe, RecipeError
from hf_vla.run import add_event

MICRO_BATCH = "micro_batch.json"

logger = logging.getLogger(__name__)


class VLATrainer(Trainer):
    """Trainer whose loss is a mean over every valid action entry of an optimizer step, however the step is cut up.

    Args:
        recipe: the run, written into each checkpoint.
        processor: the processor that the collator uses, written into each checkpoint.
        kwargs: arguments of `transformers.Trainer`.
    """

    def __init__(self, recipe: Recipe, processor: VLAProcessor, **kwargs):
        super().__init__(processing_class=processor, **kwargs)
        self.recipe = recipe
        self.batcher = MicroBatcher(
            model=self.model,
            batch_size=recipe.data.batch_size,
            rungs=self._rungs(),
            on_event=self._tell,
            has_headroom=self._has_headroom,
        )

    def training_step(self, model: nn.Module, inputs: dict, num_items_in_batch: Tensor | None = None) -> Tensor:
        """Run one micro-step; after the last of an optimizer step, agree with the other ranks and average gradients."""
        step = partial(super().training_step, model, num_items_in_batch=num_items_in_batch)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # a sharded forward is itself a collective
            return step(inputs)
        inputs = self._prepare_inputs(inputs)
        inputs["draws"] = self.bare_model().draws(inputs["actions"])  # before any cut, so that pieces share them
        with self.accelerator.no_sync(model):
            loss = self.batcher.run(inputs, step)
        if self.accelerator.sync_gradients:
            self._finish_step(model)
        return loss

    def _finish_step(self, model: nn.Module) -> None:
        agreed = agree(self.batcher.size, self.batcher.exhausted, self.args.device)
        if agreed.exhausted:
            self._give_up(model)
        self.batcher.agree(agreed.size)
        average_gradients(model)
        self.batcher.finish_step()

    def _give_up(self, model: nn.Module) -> None:
        """End the run with nothing lost: the weights are those of the last whole step."""
        model.zero_grad(set_to_none=True)
        self._save_checkpoint(model, trial=None)
        raise MemoryBudgetError(
            f"Not even one sample fits, with {self.args.gradient_accumulation_steps} micro-steps a step. Step "
            f"{self.state.global_step} is saved in {self.args.output_dir}. See what would fit with `hf-vla plan`, "
            "and go on from there with --resume."
        )

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Evaluate one batch; where it doesn't fit, in halves, weighted by what counts in each."""
        step = partial(super().prediction_step, model, prediction_loss_only=True)
        losses, counts = zip(*halves(lambda part: step(part)[0], self._prepare_inputs(inputs)), strict=True)
        weights = torch.stack(counts) / sum(counts)
        return (torch.stack(losses) * weights).sum(), None, None

    def _rungs(self) -> list:
        """What is tried when one sample doesn't fit; recomputing activations costs time, and changes no number."""
        if self.args.activation_checkpointing:
            return []
        return [("activation checkpointing", self.model.activation_checkpointing_enable)]

    def _has_headroom(self, size: int) -> bool:
        """Whether the last peak, its activations scaled to pieces of `size`, stays under what the process may use."""
        if not torch.cuda.is_available():
            return True
        peak, resting = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
        free, _ = torch.cuda.mem_get_info()
        return resting + (peak - resting) * size / self.batcher.size < 0.9 * (torch.cuda.memory_reserved() + free)

    def _tell(self, kind: str, text: str) -> None:
        logger.warning(text)
        if self.is_world_process_zero():
            add_event(self.args.output_dir, self.state.global_step, kind, text)

    def _get_num_items_in_batch(self, batch_samples: list[dict], device: torch.device) -> Tensor:
        """Count valid action entries of all this step's micro-batches, on all ranks; Trainer only knows `labels`."""
        count = sum((~batch["action_is_pad"]).sum() * batch["actions"].shape[-1] for batch in batch_samples).to(device)
        return self.accelerator.gather(count).sum() if self.args.world_size > 1 else count

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        directory = Path(output_dir or self.args.output_dir)
        save_checkpoint(self.bare_model(), self.processing_class, self.recipe, directory)
        (directory / MICRO_BATCH).write_text(json.dumps({"size": self.batcher.size}) + "\n")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_trained(self.bare_model(), self.recipe, resume_from_checkpoint)
        self.batcher.size = json.loads((Path(resume_from_checkpoint) / MICRO_BATCH).read_text())["size"]

    def _load_best_model(self) -> None:
        load_trained(self.bare_model(), self.recipe, self.state.best_model_checkpoint)

    def bare_model(self) -> nn.Module:
        """Give the model without the wrappers that accelerate puts around it."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)


def training_arguments(recipe: Recipe, output_dir: str) -> TrainingArguments:
    """Translate the recipe into TrainingArguments.

    Raises:
        RecipeError: for values that TrainingArguments refuses, and for fp16 where there is no GPU to run it.
    """
    values = dict(recipe.training)
    if values.get("fp16") and not torch.cuda.is_available():
        raise RecipeError(
            "training.fp16 is true, but there is no GPU, and CPUs train silently in float32 then: "
            "set it false (training.bf16 works on a CPU)."
        )
    try:
        return TrainingArguments(
            output_dir=output_dir,
            per_device_train_batch_size=recipe.data.batch_size,
            per_device_eval_batch_size=values.pop("per_device_eval_batch_size", recipe.data.batch_size),
            dataloader_num_workers=values.pop("dataloader_num_workers", recipe.data.num_workers),
            remove_unused_columns=False,  # Trainer would look for the names of forward's arguments in our samples
            label_names=["actions"],  # or eval_loss vanishes
            **values,
        )
    except ValueError as error:
        raise RecipeError(f"training: {error}") from None
