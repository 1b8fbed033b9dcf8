"""A recipe's training section as Hugging Face's TrainingArguments."""

import torch
from transformers import TrainingArguments

from hf_vla.recipe import Recipe, RecipeError


def training_arguments(recipe: Recipe, output_dir: str) -> TrainingArguments:
    """Translate the recipe into TrainingArguments.

    Raises:
        RecipeError: for values that TrainingArguments refuses, and for fp16 where there is no GPU to run it.
    """
    values = dict(recipe.training)
    if values.get("eval_strategy", "no") != "no":
        values.setdefault("metric_for_best_model", "loss")  # so that the best checkpoint is kept
    if values.get("fsdp"):  # accelerate else lets every rank keep whole gradients until the last micro-step
        values.setdefault("accelerator_config", {"gradient_accumulation_kwargs": {"sync_each_batch": True}})
    values["average_tokens_across_devices"] = False  # the count already does, without another operation in each step
    values.pop("push_to_hub", None)  # Trainer would ask the Hub before the first step; train.py pushes after the last
    if values.get("fp16") and not torch.cuda.is_available():
        raise RecipeError(
            "training.fp16 is true, but there is no GPU, and CPUs train silently in float32 then: "
            "set it false (training.bf16 works on a CPU)."
        )
    for key in ("dataloader_drop_last", "ignore_data_skip", "enable_jit_checkpoint"):
        if values.get(key):
            raise RecipeError(
                f"training.{key} can't be true: every sample is seen once an epoch, also in a run that goes on."
            )
    try:
        arguments = TrainingArguments(
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
    # One process trains on one GPU. Of several that it sees, transformers would make one batch for all (nn.DataParallel).
    arguments._n_gpu = min(arguments.n_gpu, 1)
    # Where the recipe asks for neither, transformers would take what the user's own accelerate config says.
    arguments.mixed_precision = next((kind for kind in ("bf16", "fp16") if getattr(arguments, kind)), "no")
    return arguments
