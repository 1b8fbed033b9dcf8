"""Merge a run's adapters into full-precision weights: one checkpoint that opens alone and needs no PEFT.

Where fusion and head alone were trained there are no adapters, and the backbones are only put beside them.

A quantised base can't take an adapter without loss, so the base is read again, unquantised.
"""

import dataclasses
import logging
from pathlib import Path

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from hf_vla.assemble import build_model
from hf_vla.checkpoint import WHOLE, load_checkpoint, load_trained, save_checkpoint
from hf_vla.model.modeling_vla import VLAForActionPrediction
from hf_vla.model.processing_vla import STATE, VLAProcessor
from hf_vla.recipe import Recipe

OBSERVATIONS = 8
TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2}
"""Largest difference of a normalised action before and after merging: rounding of the merged weights, by their dtype."""

logger = logging.getLogger(__name__)


def merge(checkpoint: Path, output: Path) -> float:
    """Merge a checkpoint's adapters on the CPU, check that actions stay as they were, and write the result.

    Args:
        checkpoint: `model/` of a run, or one of its `checkpoint-N/`.
        output: directory to write; it must not hold anything yet.

    Returns:
        The largest difference of a normalised action between adapters beside and within the weights.

    Raises:
        FileExistsError: if `output` holds something.
        ValueError: if the checkpoint is whole already, or actions differ by more than the dtype's tolerance; nothing is
            written.
    """
    if output.exists() and any(output.iterdir()):
        raise FileExistsError(f"{output} isn't empty: choose another place for the merged checkpoint.")
    if (checkpoint / WHOLE).is_file():
        raise ValueError(f"{checkpoint} has no adapters to merge: its {WHOLE} is the whole model.")
    adapted, processor, recipe = load_checkpoint(checkpoint)
    if recipe.model.quantization != "none":
        adapted = build_model(unquantized(recipe), adapted.config)
        load_trained(adapted, recipe, checkpoint)
        recipe = unquantized(recipe)
    before = sample_actions(adapted, processor)
    merge_layers(adapted)
    difference = float((sample_actions(adapted, processor) - before).abs().max())
    if difference > TOLERANCES[recipe.model.dtype]:
        raise ValueError(
            f"Merged actions differ by {difference:.2g}, more than {TOLERANCES[recipe.model.dtype]} "
            f"({recipe.model.dtype}): nothing was written. Merge with model.dtype float32."
        )
    save_checkpoint(adapted.requires_grad_(True), processor, without_adapters(recipe), output)
    logger.info("Merged into %s; normalised actions differ by at most %.2g.", output, difference)
    return difference


def unquantized(recipe: Recipe) -> Recipe:
    """The same recipe on full-precision weights."""
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, quantization="none"))


def without_adapters(recipe: Recipe) -> Recipe:
    """The same recipe, its weights holding what its adapters learnt."""
    return dataclasses.replace(recipe, lora=dataclasses.replace(recipe.lora, apply_to=[]))


def merge_layers(model: nn.Module) -> None:
    """Add every adapter to the layer it adapts, and put that layer in its place."""
    adapted = [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    for name, module in adapted:
        module.merge(safe_merge=True)
        model.set_submodule(name, module.get_base_layer())
    model._hf_peft_config_loaded = False  # transformers' mark that save_pretrained is to write adapters only


def sample_actions(model: VLAForActionPrediction, processor: VLAProcessor) -> torch.Tensor:
    """Predict normalised actions of made-up observations, the same ones each time."""
    generator = np.random.default_rng(0)
    size, views = processor.image_size, len(processor.views)
    images = generator.integers(0, 256, (OBSERVATIONS, views, size, size, 3), dtype=np.uint8)
    dataset = next(iter(processor.datasets), None)
    state = processor.stats_of(dataset)[STATE].mean.repeat(OBSERVATIONS, 1)
    batch = processor(images=list(images), task=["pick up the cup"] * OBSERVATIONS, state=state, dataset=dataset)
    return model.eval().predict_action(**batch, generator=torch.Generator().manual_seed(0))
