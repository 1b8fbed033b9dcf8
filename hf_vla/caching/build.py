"""Building a recipe's caches: its backbones, loaded one at a time, over all that its dataset holds.

Letters: B batch, V views, H W pixels, g grid side after pooling, L text tokens, D LLaMA width, C VGGT width.
"""

import dataclasses
import json
import logging
import shlex
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from hf_vla.assemble import build_config, build_model, build_processor
from hf_vla.caching.keys import BACKBONES, cache_keys, cacheable, token_ids
from hf_vla.caching.use import ROOT, cache_root, means_of, with_cache
from hf_vla.data.augmentation import AugmentedDataset
from hf_vla.data.feature_build import Pairs, Rank, ViewBuild, build_views, is_whole
from hf_vla.data.feature_cache import MANIFEST, Key, folder_name, read_manifest
from hf_vla.data.feature_text import build_texts
from hf_vla.data.mixture import build_datasets
from hf_vla.data.windows import WindowDataset
from hf_vla.memory.sizes import format_size, parse_size
from hf_vla.model.modeling_vla import VLAModel
from hf_vla.model.processing_vla import VLAProcessor
from hf_vla.recipe import Recipe, RecipeError
from hf_vla.recipe.consistency import check_consistency
from hf_vla.sample import view_name

AT_ONCE = 16
"""Pairs that fill a GPU beside nothing but VGGT."""

PATIENCE = timedelta(days=7)
"""How long a rank waits for the others: on shared GPUs one may take hours more for its share."""

logger = logging.getLogger(__name__)


def build_caches(recipe: Recipe, output: Path | None = None, batch_size: int | None = None) -> list[Path]:
    """Build the recipe's caches, or go on with them; on several ranks, each does its share.

    Args:
        recipe: the run; where `memory.cache` names nothing, all that can be cached is.
        output: folder that they are built in; None takes `memory.cache_dir`, or `cache/DATASET`.
        batch_size: observations that VGGT encodes at once; None takes the recipe's, or `AT_ONCE` if that is more.

    Returns:
        Their folders.

    Raises:
        RecipeError: if nothing can be cached, or not together with what else the recipe asks for.
        OSError: if the disk is full; what is written is kept.
        ValueError: if a cache would be larger than `memory.cache_budget`.
    """
    names = recipe.memory.cache or cacheable(recipe)
    if not names:
        raise RecipeError("Nothing can be cached: no backbone is frozen and reads nothing that trains.")
    check_consistency(with_cache(recipe, names))
    train_data, _ = build_datasets(recipe.data, recipe.model.chunk_size, recipe.training["seed"])
    means = means_of(recipe, train_data)
    root = output or cache_root(recipe, train_data)
    keys = cache_keys(recipe, train_data, means, names, root)
    folders = {name: root / folder_name(name, key) for name, key in keys.items()}
    there = [name for name, folder in folders.items() if is_whole(folder)]
    state = PartialState(cpu=recipe.training.get("use_cpu", False), timeout=PATIENCE)
    state.wait_for_everyone()  # or one could already see what another builds
    for name, folder in folders.items():
        if name in there:
            logger.info("%s: whole, as it was written.", folder)
        elif name == "vggt":
            build_view_tokens(recipe, train_data, means, folder, keys[name], batch_size, state)
        else:
            build_text_states(recipe, train_data, folder, keys[name], state)
    return list(folders.values())


def describe_use(recipe: Recipe, folders: list[Path]) -> str:
    """Say what was built, and what to add to the recipe for training to use it."""
    lines = []
    for folder in folders:
        manifest = read_manifest(folder / MANIFEST)
        size, error = format_size(manifest["bytes"]), manifest["relative_error"]
        lines.append(f"{folder}: {manifest['rows']:,} rows, {size}, {manifest['stored']}, off by {error:.2%} (RMS)")
    names = [folder.name.rpartition("-")[0] for folder in folders]
    asked = {"memory.cache": json.dumps(names)} if set(names) != set(recipe.memory.cache) else {}
    root = folders[0].parent
    default = Path(recipe.memory.cache_dir).expanduser() if recipe.memory.cache_dir else ROOT / root.name
    asked |= {"memory.cache_dir": str(root)} if root != default else {}
    if asked:
        lines.append(
            "Train with: " + " ".join(f"--set {shlex.quote(f'{key}={value}')}" for key, value in asked.items())
        )
    return "\n".join(lines)


def build_text_states(recipe: Recipe, train_data: WindowDataset, folder: Path, key: Key, state: PartialState) -> None:
    """Build the cache of LLaMA's states; few as instructions are, the first rank encodes them all."""
    if state.is_main_process:
        encode = partial(encode_text, recipe, _load(recipe, train_data, "lang_encoder", state))
        build_texts(folder, key, token_ids(recipe, train_data), encode, recipe.stored_dtype)
    state.wait_for_everyone()


def build_view_tokens(
    recipe: Recipe,
    train_data: WindowDataset,
    means: np.ndarray | None,
    folder: Path,
    key: Key,
    batch_size: int | None,
    state: PartialState,
) -> None:
    """Build the cache of VGGT's pooled tokens, every rank its share of the shards."""
    model = _load(recipe, train_data, "vggt", state)
    whole = WindowDataset(train_data.info, train_data.views, recipe.model.chunk_size)
    augmented = AugmentedDataset(whole, recipe.data.augmentation, recipe.training["seed"])
    prepare = partial(prepare_pictures, _processor(recipe, train_data, means))
    with Progress(console=Console(stderr=True), disable=not state.is_main_process) as progress:
        build = ViewBuild(
            folder=folder,
            key=key,
            episodes=[(episode.index, episode.length) for episode in whole.episodes],
            pairs=Pairs(whole, prepare, looks_of(recipe, whole), recipe.memory.cache_copies, augmented),
            encode=partial(encode_views, recipe, model),
            row_shape=(model.config.num_views, model.config.pool_grid**2, 2 * model.config.vggt_config.embed_dim),
            stored=recipe.stored_dtype,
            batch_size=batch_size or max(recipe.data.batch_size, AT_ONCE),
            workers=recipe.data.num_workers,
            max_bytes=recipe.memory.cache_budget and parse_size(recipe.memory.cache_budget),
            tick=Ticker(progress),
        )
        logger.info("%s: %d pairs, %s at most.", folder, len(build.pairs), format_size(build.bytes_at_most))
        build_views(build, Rank(state.process_index, state.num_processes, state.wait_for_everyone))


def _load(recipe: Recipe, train_data: WindowDataset, name: str, state: PartialState) -> VLAModel:
    """Load one backbone alone; what is cached has no adapters, and those of others aren't needed."""
    info, others = train_data.info, [other for other in BACKBONES if other != name]
    config = build_config(recipe, len(train_data.views), info.state_dim, info.action_dim)
    alone = dataclasses.replace(recipe, lora=dataclasses.replace(recipe.lora, apply_to=[]))
    return build_model(alone, config, without=others).model.to(state.device).eval()


def looks_of(recipe: Recipe, dataset: WindowDataset) -> Callable[[int], bytes]:
    """Give what tells samples apart: their pictures, and nothing where all are shown the mean one."""
    return dataset.look if recipe.data.pictures == "seen" else _all_alike


def _all_alike(index: int) -> bytes:
    return b""


def _processor(recipe: Recipe, train_data: WindowDataset, means: np.ndarray | None) -> VLAProcessor:
    views = [view_name(view.camera, view.offset) for view in train_data.views]
    return build_processor(recipe, views, train_data.info.stats, means, train_data.tasks)


class Ticker:
    """One bar of progress for each kind of work."""

    def __init__(self, progress: Progress):
        self._progress = progress
        self._bars: dict[str, Any] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        """Move a bar on."""
        if what not in self._bars:
            self._bars[what] = self._progress.add_task(what, total=total)
        self._progress.advance(self._bars[what], done)


def encode_views(recipe: Recipe, model: VLAModel, pixels: Tensor) -> Tensor:
    """Encode pixels (B, V, 3, H, W) to (B, V, g², 2C), in the precision that training has."""
    with _autocast(recipe, model.vggt.device.type):
        return model.encode_views(pixels.to(model.vggt.device))


@torch.no_grad()
def encode_text(recipe: Recipe, model: VLAModel, ids: list[int]) -> Tensor:
    """Encode one prompt to (L, D), in the precision that training has."""
    device = model.lang_encoder.device
    with _autocast(recipe, device.type):
        return model.encode_text(torch.tensor([ids], device=device))[0].cpu()


def _autocast(recipe: Recipe, device: str) -> AbstractContextManager:
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}
    dtype = next((half[name] for name in half if recipe.training.get(name)), None)
    return nullcontext() if dtype is None else torch.autocast(device, dtype)


def prepare_pictures(processor: VLAProcessor, images: list[list[np.ndarray]]) -> Tensor:
    """Turn B lists of V pictures into (B, V, 3, H, W), as training does."""
    return processor(images=images)["pixel_values"]
