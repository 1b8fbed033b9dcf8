"""What a recipe can't ask for: shapes that no model has, and two answers to one question."""

import re
from typing import Any

from hf_vla.recipe.sections import Recipe, RecipeError


def check_consistency(recipe: Recipe) -> None:
    """Refuse a recipe whose keys are each right and don't go together.

    Raises:
        RecipeError: naming the keys, and what to change.
    """
    _check_geometry(recipe)
    _check_one_answer(recipe)
    _check_counts(recipe.training)
    _check_fusion(recipe)
    _check_encode_ahead(recipe)
    _check_outputs(recipe)
    _check_hub(recipe)
    _check_augmentation(recipe)
    _check_data(recipe)
    _check_mixture(recipe)


def _check_geometry(recipe: Recipe) -> None:
    """Refuse shapes that no model can have."""
    size, prompt, grid = recipe.data.image_size, recipe.model.prompt, recipe.model.pool_grid
    if size % 14 or size < 14:
        low = max(14, size // 14 * 14)
        raise RecipeError(
            f"data.image_size is {size}, not a multiple of 14 (VGGT's patch). Nearest: {low} and {low + 14}."
        )
    if grid > size // 14:
        raise RecipeError(
            f"model.pool_grid is {grid}, and data.image_size {size} gives {size // 14} x {size // 14} patches, too few to "
            f"pool: lower pool_grid, or enlarge the pictures to {14 * grid}."
        )
    if prompt.count("{task}") != 1:
        raise RecipeError(f"model.prompt must hold {{task}} exactly once; it is {prompt!r}.")


def _check_one_answer(recipe: Recipe) -> None:
    """Refuse two answers to one question."""
    model, training = recipe.model, recipe.training
    for part in recipe.lora.apply_to:
        if not getattr(model, f"freeze_{part}"):
            raise RecipeError(
                f"lora.apply_to names {part!r}, but model.freeze_{part} is false: train the one or the other."
            )
    if model.quantization != "none" and not model.freeze_lang_encoder:
        raise RecipeError(
            f"model.quantization is {model.quantization!r}, and quantised weights can't be trained: set "
            "model.freeze_lang_encoder to true (with lora.apply_to for QLoRA), or model.quantization to none."
        )
    for part in recipe.memory.cache:
        if not getattr(model, f"freeze_{part}") or part in recipe.lora.apply_to:
            raise RecipeError(f"memory.cache names {part!r}, which trains: only what stays as it is can be cached.")
    if recipe.memory.optimizer_in_backward:
        _check_in_backward(training)
    if recipe.memory.embedding_state_bits == 8 and "8bit" not in str(training.get("optim", "")):
        raise RecipeError(
            f"memory.embedding_state_bits is 8, but training.optim is {str(training.get('optim', 'adamw_torch'))!r}, which "
            "keeps no state in 8 bits: choose one that does, as adamw_bnb_8bit, or leave it out."
        )
    if training.get("bf16") and training.get("fp16"):
        raise RecipeError("training.bf16 and training.fp16 are both true; bf16 is the default: set it false.")


def _check_counts(training: dict[str, Any]) -> None:
    """Refuse counts that TrainingArguments takes, and that end a training in its midst."""
    for key in (
        "gradient_accumulation_steps",
        "per_device_eval_batch_size",
        "save_steps",
        "eval_steps",
        "logging_steps",
    ):
        if training.get(key) is not None and training[key] <= 0:
            raise RecipeError(f"training.{key} is {training[key]}; it must be above 0.")
    if training["max_steps"] == 0:
        raise RecipeError("training.max_steps is 0: give how many, or -1 to count by training.num_train_epochs.")


def _check_fusion(recipe: Recipe) -> None:
    """Refuse parts that can't give each other what they read."""
    model, fusion, cached = recipe.model, recipe.model.fusion, recipe.memory.cache
    if fusion.type != "prefix" and fusion.hidden_size % fusion.num_heads:
        raise RecipeError(
            f"model.fusion.num_heads is {fusion.num_heads}, which doesn't divide its hidden_size {fusion.hidden_size}."
        )
    if fusion.align_weight and fusion.type != "prefix":
        raise RecipeError(
            "model.fusion.align_weight needs fusion.type prefix: there LLaMA has states at view positions."
        )
    if fusion.align_weight and (not model.freeze_vggt or "vggt" in recipe.lora.apply_to):
        raise RecipeError("model.fusion.align_weight takes VGGT for a fixed target: freeze it, without adapters.")
    if fusion.align_weight and "vggt" in cached:
        raise RecipeError(
            "memory.cache names 'vggt', but with model.fusion.align_weight the policy looks at the pictures themselves: "
            "take 'vggt' out of memory.cache, or set align_weight to 0."
        )
    if fusion.type == "prefix" and "lang_encoder" in cached:
        raise RecipeError(
            "memory.cache names 'lang_encoder', but in model.fusion.type prefix it reads the views too, and its outputs "
            "change as the fusion trains: take it out of memory.cache, or choose cross_attention or gated."
        )


def _check_encode_ahead(recipe: Recipe) -> None:
    """Refuse to run a VGGT ahead of a step that needs it in the step, or never runs it."""
    pairs, is_sharded = recipe.memory.encode_ahead, recipe.training.get("fsdp") or recipe.training.get("deepspeed")
    if recipe.memory.encode_overlap and not pairs:
        raise RecipeError(
            "memory.encode_overlap is true, but memory.encode_ahead is 0: say there how many pairs VGGT encodes at once, or "
            "set encode_overlap false."
        )
    reasons = {
        "VGGT trains, and is part of each micro-step": not recipe.model.freeze_vggt or "vggt" in recipe.lora.apply_to,
        "memory.cache names 'vggt', which then doesn't run": "vggt" in recipe.memory.cache,
        "with model.fusion.align_weight micro-steps look at the pictures themselves": recipe.model.fusion.align_weight,
        "sharded weights (training.fsdp, training.deepspeed) are gathered in micro-steps only": is_sharded,
    }
    for reason in (reason for reason, holds in reasons.items() if pairs and holds):
        raise RecipeError(f"memory.encode_ahead is {pairs}, but {reason}: set it to 0.")


def _check_outputs(recipe: Recipe) -> None:
    """Refuse to show what random heads see."""
    if recipe.model.outputs == "geometry" and isinstance(recipe.model.vggt, dict):
        raise RecipeError(
            "model.outputs is 'geometry', which shows what trained camera and depth heads see, but model.vggt holds config "
            "keys, so its weights are random: name trained weights such as facebook/VGGT-1B, or set outputs to 'actions'."
        )


def _check_data(recipe: Recipe) -> None:
    """Refuse two answers to which dataset, and what a cache can't be made of."""
    data = recipe.data
    weights = [mixed.weight for mixed in data.mixture]
    if data.mixture and data.dataset is not None:
        raise RecipeError(
            "data.dataset and data.mixture both name datasets: set data.dataset to null, or leave out the mixture."
        )
    if any(weight is None for weight in weights) and any(weight is not None for weight in weights):
        raise RecipeError(f"data.mixture: give a weight to each of the {len(weights)} datasets, or to none.")
    if any(weight is not None and weight <= 0 for weight in weights):
        raise RecipeError(f"data.mixture: weights must be above 0; they are {weights}.")
    if data.action_form == "relative" and recipe.model.head.type == "discrete":
        raise RecipeError(
            "data.action_form is 'relative', and model.head.type 'discrete' takes its levels from recorded actions: choose "
            "another head, or action_form recorded."
        )
    if recipe.memory.cache and (data.mixture or data.streaming):
        raise RecipeError(
            "memory.cache needs one dataset that lies here: set data.streaming false and data.dataset, or leave it empty."
        )


def _check_mixture(recipe: Recipe) -> None:
    """Refuse to act without a word on whose units the actions are in, and a word where there is nothing to choose."""
    data, evaluation = recipe.data, recipe.evaluation
    is_named = bool(data.mixture) and data.mixture_stats == "per_dataset"
    if evaluation.dataset is not None and not is_named:
        raise RecipeError(
            f"evaluation.dataset is {evaluation.dataset!r}, which chooses between the datasets of a data.mixture with "
            "mixture_stats per_dataset; here is one set of statistics: leave it out."
        )
    if is_named and evaluation.simulator != "none" and evaluation.dataset is None:
        raise RecipeError(
            f"evaluation.simulator is {evaluation.simulator!r}, and each dataset of data.mixture has units of its own: name "
            "the simulated robot's as evaluation.dataset, or set data.mixture_stats to merged."
        )


def _check_hub(recipe: Recipe) -> None:
    """Refuse a push that has nowhere to go, before days of training and not after."""
    repo_id = recipe.hub.repo_id
    if recipe.training.get("push_to_hub") and not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id or ""):
        raise RecipeError(
            f"training.push_to_hub is true, and hub.repo_id is {repo_id!r}: give it as user/name, or set push_to_hub false."
        )


def _check_augmentation(recipe: Recipe) -> None:
    """Refuse variations that leave nothing of a picture, and those that a cache wouldn't show."""
    limits = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.5, "blur": 0.1, "crop": 0.5}
    chosen = {name: getattr(recipe.data.augmentation, name) for name in limits}
    for name, value in chosen.items():
        if not 0 <= value <= limits[name]:
            raise RecipeError(f"data.augmentation.{name} is {value}; it must be 0 to {limits[name]:g}.")
    if any(chosen.values()) and "vggt" in recipe.memory.cache and not recipe.memory.cache_copies:
        raise RecipeError(
            "data.augmentation varies the pictures, and memory.cache names 'vggt', whose stored features show none of it: "
            "set memory.cache_copies to a number of augmented copies, or take the one or the other out."
        )
    if recipe.memory.cache_copies and not any(chosen.values()):
        raise RecipeError(
            f"memory.cache_copies is {recipe.memory.cache_copies}, but data.augmentation varies nothing: set it to 0, or "
            "say what to vary."
        )


def _check_in_backward(training: dict[str, Any]) -> None:
    for key, needed in (("gradient_accumulation_steps", 1), ("max_grad_norm", 0)):
        if training[key] != needed:
            raise RecipeError(
                f"memory.optimizer_in_backward keeps no gradients to accumulate or clip: set training.{key} to {needed}, "
                f"not {training[key]}."
            )
    if training.get("fp16"):
        raise RecipeError(
            "training.fp16 scales gradients, and memory.optimizer_in_backward would use them so: take training.bf16."
        )
