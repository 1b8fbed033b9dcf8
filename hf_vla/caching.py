"""The caches of a recipe: what each must be made of, whether it is there, and how it is built.

`memory.cache` names the backbones that may be read from a cache. Where a cache of just this recipe is there, it is used and
the backbone isn't loaded; where there is none, training runs the backbone and says how to build one; where there are only
caches of something else, that is an error.

Letters: B batch, V views, H W pixels, g grid side after pooling, L text tokens, D LLaMA width, C VGGT width.
"""

import dataclasses
import json
import logging
import shlex
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from rich.progress import Progress
from torch import Tensor
from torch.utils.data import Dataset

from hf_vla import weights
from hf_vla.assemble import build_config, build_model, build_processor, load_tokenizer
from hf_vla.data.feature_build import Pairs, Rank, ViewBuild, build_views, is_whole
from hf_vla.data.feature_cache import (
    MANIFEST,
    CachedDataset,
    Found,
    Key,
    TextCache,
    ViewCache,
    find_cache,
    folder_name,
    read_manifest,
)
from hf_vla.data.feature_text import build_texts
from hf_vla.data.mixture import build_datasets, mean_pictures
from hf_vla.data.windows import WindowDataset
from hf_vla.fingerprint import FileDigests, digest_files, digest_of
from hf_vla.memory.sizes import format_size, parse_size
from hf_vla.model.image_processing_vla import resize_view, stack_views
from hf_vla.model.modeling_vla import VLAModel
from hf_vla.model.processing_vla import VLAProcessor
from hf_vla.recipe import Recipe, RecipeError
from hf_vla.sample import view_name
from hf_vla.weights.listing import decoder_files, vggt_files

ROOT = Path("cache")
"""Folder of all caches, where `memory.cache_dir` names none."""
DIGESTS = "digests.json"
BACKBONES = ("vggt", "lang_encoder")

logger = logging.getLogger(__name__)


def cacheable(recipe: Recipe) -> list[str]:
    """Name the backbones whose outputs depend on nothing that trains."""
    model = recipe.model
    frozen = [n for n in BACKBONES if getattr(model, f"freeze_{n}") and n not in recipe.lora.apply_to]
    reads_views = model.fusion.type == "prefix"  # there LLaMA reads the views, through a projection that trains
    looks = model.fusion.align_weight > 0  # there the policy looks at the pictures themselves
    return [name for name in frozen if not (looks if name == "vggt" else reads_views)]


def settle_caches(recipe: Recipe) -> Recipe:
    """Keep in `memory.cache` only what would be read from a cache here: the recipe that is really run.

    Raises:
        RecipeError: if what is named can't be cached.
        ValueError: if there are only caches made of something else.
    """
    if not recipe.memory.cache:
        return recipe
    train_data, _ = build_datasets(recipe.data, recipe.model.chunk_size, recipe.training["seed"])
    return with_cache(recipe, list(find_caches(recipe, train_data, means_of(recipe, train_data))))


def with_cache(recipe: Recipe, names: list[str]) -> Recipe:
    """Give the recipe with just these backbones in `memory.cache`."""
    return dataclasses.replace(recipe, memory=dataclasses.replace(recipe.memory, cache=names))


def means_of(recipe: Recipe, train_data: WindowDataset) -> np.ndarray | None:
    """Average the training pictures, where what VGGT sees depends on them."""
    return mean_pictures(train_data, partial(fit_views, recipe)) if shows_means(recipe) else None


def shows_means(recipe: Recipe) -> bool:
    """Whether what VGGT sees depends on the mean training pictures."""
    return recipe.data.center_images or recipe.data.pictures == "mean"


def fit_views(recipe: Recipe, images: list[np.ndarray]) -> np.ndarray:
    """Stack an observation's pictures at the recipe's size, as the processor does."""
    return stack_views([resize_view(image, recipe.data.image_size, recipe.data.resize) for image in images])


def find_caches(recipe: Recipe, train_data: WindowDataset, means: np.ndarray | None) -> dict[str, Found]:
    """Find the recipe's caches by backbone; what isn't there isn't in it.

    Args:
        recipe: the run.
        train_data: what it trains on.
        means: (V, H, W, 3) uint8, the mean training picture of each view; read only where VGGT sees it.

    Raises:
        RecipeError: if what is named can't be cached.
        ValueError: if there are only caches made of something else; names what differs.
    """
    root = cache_root(recipe, train_data)
    keys = cache_keys(recipe, train_data, means, recipe.memory.cache, root)
    found = {name: find_cache(root, name, key) for name, key in keys.items()}
    return {name: cache for name, cache in found.items() if cache is not None}


def read_from_caches(
    recipe: Recipe, found: dict[str, Found], train_data: WindowDataset, eval_data: WindowDataset | None
) -> tuple[CachedDataset, CachedDataset | None]:
    """Put stored features in place of pictures and instructions; say what is used, and what could be.

    Raises:
        ValueError: naming a shard that is missing or cut short.
    """
    for name in recipe.memory.cache:
        if name in found:
            logger.info("%s isn't loaded: its outputs are read from %s.", name, found[name].folder)
        else:
            logger.warning("%s has no cache yet, so each step runs it; `hf-vla cache RECIPE` builds one.", name)
    if not found:
        return train_data, eval_data
    views = ViewCache(found["vggt"]) if "vggt" in found else None
    texts = TextCache(found["lang_encoder"]) if "lang_encoder" in found else None
    augments = views is not None and views.copies > 0
    train_data = CachedDataset(train_data, views, texts, augments, recipe.training["seed"])
    return train_data, eval_data and CachedDataset(eval_data, views, texts)


def caches_of(dataset: Dataset) -> dict[str, str | None]:
    """Say which cache each backbone's outputs are read from, for the run's record; None where it runs itself."""
    read = dict.fromkeys(BACKBONES)
    if isinstance(dataset, CachedDataset):
        caches = {"vggt": dataset.view_cache, "lang_encoder": dataset.text_cache}
        read |= {name: str(cache.folder) for name, cache in caches.items() if cache is not None}
    return read


def cache_root(recipe: Recipe, dataset: WindowDataset) -> Path:
    """Say where the caches of a recipe's dataset lie."""
    if recipe.memory.cache_dir:
        return Path(recipe.memory.cache_dir).expanduser()
    return ROOT / dataset.info.name.replace("/", "--")


def cache_keys(
    recipe: Recipe, dataset: WindowDataset, means: np.ndarray | None, names: list[str], root: Path
) -> dict[str, Key]:
    """Say what the cache of each named backbone must be made of.

    Raises:
        RecipeError: if one of them can't be cached.
    """
    digests = FileDigests(root / DIGESTS)
    keys: dict[str, Key] = {}
    for name in names:
        check_cacheable(recipe, name)
        own = view_key(recipe, dataset, means, digests) if name == "vggt" else text_key(recipe, dataset, digests)
        keys[name] = {**own, "precision": precision(recipe), "stored": recipe.memory.cache_dtype}
    digests.keep()
    return keys


def check_cacheable(recipe: Recipe, name: str) -> None:
    """Refuse to cache what changes, or what couldn't be had again.

    Raises:
        RecipeError: saying why.
    """
    if name not in cacheable(recipe):
        raise RecipeError(f"{name} can't be cached: its outputs change as this recipe trains.")
    if isinstance(getattr(recipe.model, name), dict):
        raise RecipeError(
            f"memory.cache names {name!r}, whose weights model.{name} makes at random: training from a cache doesn't load "
            "them, so its checkpoints couldn't hold them. Name a file or folder of weights, or leave it out."
        )


def view_key(recipe: Recipe, dataset: WindowDataset, means: np.ndarray | None, digests: FileDigests) -> Key:
    """Say what pooled view tokens are made of."""
    model, data = recipe.model, recipe.data
    files = {episode.file for episode in dataset.info.episodes}
    files |= {span.file for episode in dataset.info.episodes for span in _videos(episode, dataset)}
    return {
        "weights": {path.name: digests.of(path) for path in vggt_files(model.vggt)},
        "config": digest_of(weights.vggt_config(model.vggt).to_dict()),
        "vggt_layer": model.vggt_layer,
        "pool_grid": model.pool_grid,
        "image_size": data.image_size,
        "resize": data.resize,
        "views": [view_name(view.camera, view.offset) for view in dataset.views],
        "pictures": data.pictures,
        "center_images": data.center_images,
        "mean_pictures": digest_of(means.tolist()) if shows_means(recipe) else None,
        "revision": data.revision,
        "frames": digest_files(digests, dataset.info.root, files),
        "episodes": digest_of([[e.index, e.length, e.first_row] for e in dataset.info.episodes]),
        "copies": recipe.memory.cache_copies,
    }


def _videos(episode: Any, dataset: WindowDataset) -> list[Any]:
    return [episode.videos[view.camera] for view in dataset.views if view.camera in episode.videos]


def text_key(recipe: Recipe, dataset: WindowDataset, digests: FileDigests) -> Key:
    """Say what text states are made of."""
    model = recipe.model
    return {
        "weights": {path.name: digests.of(path) for path in decoder_files(model.lang_encoder)},
        "quantization": model.quantization,
        "prompt": model.prompt,
        "instructions": {task: digest_of(ids) for task, ids in token_ids(recipe, dataset).items()},
    }


def token_ids(recipe: Recipe, dataset: WindowDataset) -> dict[str, list[int]]:
    """Tokenize the prompt of every instruction of the whole dataset, as training does."""
    tasks = sorted({*dataset.info.tasks.values(), *(task for e in dataset.info.episodes for task in e.tasks)})
    tokenizer = load_tokenizer(recipe, dataset.tasks)
    prompts = [recipe.model.prompt.replace("{task}", task) for task in tasks]
    return dict(zip(tasks, tokenizer(prompts)["input_ids"], strict=True))


def precision(recipe: Recipe) -> str:
    """Name the number formats that a frozen backbone computes in."""
    half = next((name for name in ("bf16", "fp16") if recipe.training.get(name)), None)
    return f"{recipe.model.dtype} weights" + (f", {half} autocast" if half else "")


def build_caches(recipe: Recipe, output: Path | None = None, batch_size: int | None = None) -> list[Path]:
    """Build the recipe's caches, or go on with them; on several ranks, each does its share.

    Args:
        recipe: the run; where `memory.cache` names nothing, all that can be cached is.
        output: folder that they are built in; None takes `memory.cache_dir`, or `cache/DATASET`.
        batch_size: observations that VGGT encodes at once; None takes the recipe's.

    Returns:
        Their folders.

    Raises:
        RecipeError: if nothing can be cached.
        OSError: if the disk is full; what is written is kept.
        ValueError: if a cache would be larger than `memory.cache_budget`.
    """
    names = recipe.memory.cache or cacheable(recipe)
    if not names:
        raise RecipeError("Nothing can be cached: no backbone is frozen and reads nothing that trains.")
    train_data, _ = build_datasets(recipe.data, recipe.model.chunk_size, recipe.training["seed"])
    means = means_of(recipe, train_data)
    root = output or cache_root(recipe, train_data)
    keys = cache_keys(recipe, train_data, means, names, root)
    folders = []
    for name, key in keys.items():
        folders.append(root / folder_name(name, key))
        if is_whole(folders[-1]):
            logger.info("%s: whole, as it was written.", folders[-1])
        else:
            _build(name, recipe, train_data, means, folders[-1], key, batch_size)
    return folders


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


def _build(
    name: str,
    recipe: Recipe,
    train_data: WindowDataset,
    means: np.ndarray | None,
    folder: Path,
    key: Key,
    batch_size: int | None,
) -> None:
    state = PartialState(cpu=recipe.training.get("use_cpu", False))
    processor = _processor(recipe, train_data, means)
    info = train_data.info
    config = build_config(recipe, len(train_data.views), info.state_dim, info.action_dim)
    others = [other for other in BACKBONES if other != name]
    model = build_model(recipe, config, without=others).model.to(state.device).eval()
    if name == "lang_encoder":
        if state.is_main_process:
            states = partial(encode_text, recipe, model)
            build_texts(folder, key, token_ids(recipe, train_data), states, recipe.memory.cache_dtype)
        state.wait_for_everyone()
        return
    whole = WindowDataset(info, train_data.views, recipe.model.chunk_size)
    with Progress(disable=not state.is_main_process) as progress:
        build = ViewBuild(
            folder=folder,
            key=key,
            episodes=[(episode.index, episode.length) for episode in whole.episodes],
            pairs=Pairs(whole, partial(prepare_pictures, processor)),
            encode=partial(encode_views, recipe, model),
            row_shape=(config.num_views, config.pool_grid**2, 2 * config.vggt_config.embed_dim),
            stored=recipe.memory.cache_dtype,
            batch_size=batch_size or recipe.data.batch_size,
            workers=recipe.data.num_workers,
            max_bytes=recipe.memory.cache_budget and parse_size(recipe.memory.cache_budget),
            tick=Ticker(progress),
        )
        logger.info("%s: %d pairs, %s at most.", folder, len(build.pairs), format_size(build.bytes_at_most))
        build_views(build, Rank(state.process_index, state.num_processes, state.wait_for_everyone))


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


def _processor(recipe: Recipe, train_data: WindowDataset, means: np.ndarray | None) -> VLAProcessor:
    views = [view_name(view.camera, view.offset) for view in train_data.views]
    return build_processor(recipe, views, train_data.info.stats, means, train_data.tasks)


def prepare_pictures(processor: VLAProcessor, images: list[list[np.ndarray]]) -> Tensor:
    """Turn B lists of V pictures into (B, V, 3, H, W), as training does."""
    return processor(images=images)["pixel_values"]


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
