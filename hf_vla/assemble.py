"""Recipe to processor and model: train, trace, probe and cache build them here, so that they build them alike.

Letters: V views, S state dims, A action dims.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from transformers import set_seed

from hf_vla import weights
from hf_vla.lora import add_adapters, freeze, lora_config, upcast_trained
from hf_vla.model.action_heads import HEADS
from hf_vla.model.configuration_vla import VGGTConfig, VLAConfig
from hf_vla.model.fusion import FUSIONS
from hf_vla.model.modeling_vla import VLAForActionPrediction
from hf_vla.model.processing_vla import VLAProcessor
from hf_vla.recipe import Recipe, RecipeError


def build_processor(
    recipe: Recipe,
    views: list[str],
    stats: Mapping,
    mean_pictures: np.ndarray | None = None,
    tasks: Iterable[str] = (),
) -> VLAProcessor:
    """Build the processor that training and acting share.

    Args:
        recipe: the run.
        views: name of each view, in the order in which samples hold them.
        stats: the dataset's statistics of `observation.state` and `action`.
        mean_pictures: (V, H, W, 3) uint8; wanted by `data.center_images` and by every blind control.
        tasks: the dataset's instructions.
    """
    data = recipe.data
    return VLAProcessor(
        tokenizer=load_tokenizer(recipe, tasks),
        views=views,
        stats=stats,
        image_size=data.image_size,
        resize=data.resize,
        normalization=data.normalization,
        prompt=recipe.model.prompt,
        view_means=mean_pictures,
        center_images=data.center_images,
        pictures=data.pictures,
        action_form=data.action_form,
    )


def load_tokenizer(recipe: Recipe, tasks: Iterable[str] = ()):
    """Load the tokenizer that the recipe names, or the language encoder's own; random weights get a byte-level one.

    Args:
        recipe: the run.
        tasks: the dataset's instructions; a byte-level tokenizer takes up their words.
    """
    source = recipe.model.tokenizer or recipe.model.lang_encoder
    if not isinstance(source, dict):
        return weights.load_tokenizer(source)
    prompts = [recipe.model.prompt.replace("{task}", task) for task in tasks]
    return weights.byte_tokenizer(prompts, source.get("vocab_size", 0))


def build_config(recipe: Recipe, num_views: int, state_dim: int, action_dim: int) -> VLAConfig:
    """Build the model's config without reading any weights: the shapes of the recipe's parts and of its data."""
    model = recipe.model
    vggt, layer = read_depth(recipe)
    return VLAConfig(
        vggt_config=vggt,
        text_config=weights.lang_encoder_config(model.lang_encoder),
        view_fusion_config=dataclasses.asdict(model.fusion),
        head_config=dataclasses.asdict(model.head),
        num_views=num_views,
        state_dim=state_dim,
        action_dim=action_dim,
        chunk_size=model.chunk_size,
        vggt_layer=layer,
        pool_grid=model.pool_grid,
    )


def read_depth(recipe: Recipe) -> tuple[VGGTConfig, int]:
    """Give VGGT's config as deep as it is read, and the layer read: blocks above would take memory, and never run.

    Raises:
        RecipeError: for a layer that isn't there.
    """
    config, layer = weights.vggt_config(recipe.model.vggt), recipe.model.vggt_layer
    if not -config.depth <= layer < config.depth:
        raise RecipeError(
            f"model.vggt_layer is {layer}; this VGGT has layers 0 to {config.depth - 1} (or -{config.depth} to -1)."
        )
    if recipe.model.outputs == "geometry":  # whose heads read the last layer too
        return config, layer
    config.depth = layer % config.depth + 1
    return config, -1


def build_model(recipe: Recipe, config: VLAConfig, without: Sequence[str] = ()) -> VLAForActionPrediction:
    """Build the model with its weights: backbones loaded, the rest new from the recipe's seed, frozen and adapted.

    Args:
        recipe: the run.
        config: the model's shapes.
        without: backbones (`vggt`, `lang_encoder`) that are left out: their outputs come from a cache.
    """
    model = empty_model(config)
    dtype = getattr(torch, recipe.model.dtype)
    set_seed(recipe.training["seed"])
    if "vggt" not in without:
        model.model.vggt = weights.load_vggt(recipe.model.vggt, dtype, config.vggt_config.depth)
    if "lang_encoder" not in without:
        model.model.lang_encoder = weights.load_lang_encoder(
            recipe.model.lang_encoder, dtype, recipe.model.quantization
        )
    model.model.fusion = FUSIONS[config.view_fusion_config.type](config)
    model.head = HEADS[config.head_config.type](config)
    for part in (model.model.fusion, model.head):
        part.apply(model._init_weights)
    make_trainable(model, recipe)
    leave_out(model, without)
    for name in recipe.model.compile:
        # In place, so that weights keep their names.
        part = model.head if name == "head" else getattr(model.model, name)
        if part is not None:
            part.compile()
    return model


def build_on_meta(recipe: Recipe, config: VLAConfig) -> VLAForActionPrediction:
    """Build what `build_model` builds, on the meta device: every shape, dtype, quantised layer and adapter, no weights."""
    model = empty_model(config)
    dtype = getattr(torch, recipe.model.dtype)
    for backbone in (model.model.vggt, model.model.lang_encoder):
        backbone.to(dtype)
    weights.quantize_skeleton(model.model.lang_encoder, recipe.model.quantization)
    weights.attend_without_asking(model.model.lang_encoder)
    make_trainable(model, recipe)
    return model


def leave_out(model: VLAForActionPrediction, backbones: Iterable[str]) -> None:
    """Drop the backbones whose outputs come from a cache."""
    for name in backbones:
        setattr(model.model, name, None)


def empty_model(config: VLAConfig) -> VLAForActionPrediction:
    """Build the model's tree on the meta device, where a 7B costs nothing."""
    with torch.device("meta"):
        return VLAForActionPrediction(config)


def make_trainable(model: VLAForActionPrediction, recipe: Recipe) -> None:
    """Freeze what the recipe freezes, add its adapters, and hold what trains in the dtype it needs."""
    frozen = [name for name in ("vggt", "lang_encoder") if getattr(recipe.model, f"freeze_{name}")]
    freeze(model, frozen)
    if recipe.lora.apply_to:
        try:
            add_adapters(model, lora_config(model, recipe.lora))
        except ValueError as error:
            raise RecipeError(str(error)) from None
    upcast_trained(model)
