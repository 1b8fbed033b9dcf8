"""Hugging Face's Trainer, with what a VLA needs changed: how the loss is counted, and what a checkpoint holds."""

import logging

import torch
from transformers import Trainer, TrainingArguments

from hf_vla.checkpoint import load_trained, save_checkpoint
from hf_vla.model.processing_vla import VLAProcessor
from hf_vla.recipe import Recipe, RecipeError

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

    def _get_num_items_in_batch(self, batch_samples: list[dict], device: torch.device) -> torch.Tensor:
        """Count the valid entries of all micro-batches of this step, on all ranks; Trainer itself knows only `labels`."""
        count = sum((~batch["action_is_pad"]).sum() * batch["actions"].shape[-1] for batch in batch_samples).to(device)
        return self.accelerator.gather(count).sum() if self.args.world_size > 1 else count

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        save_checkpoint(self.bare_model(), self.processing_class, self.recipe, output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        load_trained(self.bare_model(), self.recipe, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        load_trained(self.bare_model(), self.recipe, self.state.best_model_checkpoint)

    def bare_model(self) -> torch.nn.Module:
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
