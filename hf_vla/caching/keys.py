"""What a recipe's caches must be made of: whatever changes a stored number, and nothing else.

Letters: V views, H W pixels.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from hf_vla import weights
from hf_vla.assemble import load_tokenizer
from hf_vla.data.feature_cache import Key
from hf_vla.data.windows import WindowDataset
from hf_vla.fingerprint import FileDigests, digest_files, digest_of
from hf_vla.recipe import Recipe, RecipeError
from hf_vla.sample import view_name
from hf_vla.weights.listing import decoder_files, vggt_files

BACKBONES = ("vggt", "lang_encoder")
DIGESTS = "digests.json"
"""File beside the caches that spares reading weights and data again."""


def cache_keys(
    recipe: Recipe, dataset: WindowDataset, means: np.ndarray | None, names: list[str], root: Path
) -> dict[str, Key]:
    """Say what the cache of each named backbone must be made of.

    Args:
        recipe: the run.
        dataset: what it trains on.
        means: (V, H, W, 3) uint8, the mean training picture of each view; read only where VGGT sees it.
        names: of the backbones.
        root: folder of the caches.

    Raises:
        RecipeError: if one of them can't be cached.
    """
    digests = FileDigests(root / DIGESTS)
    keys: dict[str, Key] = {}
    for name in names:
        check_cacheable(recipe, name)
        own = view_key(recipe, dataset, means, digests) if name == "vggt" else text_key(recipe, dataset, digests)
        keys[name] = {**own, "precision": precision(recipe), "stored": recipe.stored_dtype}
    digests.keep()
    return keys


def cacheable(recipe: Recipe) -> list[str]:
    """Name the backbones whose outputs depend on nothing that trains."""
    model = recipe.model
    frozen = [n for n in BACKBONES if getattr(model, f"freeze_{n}") and n not in recipe.lora.apply_to]
    reads_views = model.fusion.type == "prefix"  # there LLaMA reads the views, through a projection that trains
    looks = model.fusion.align_weight > 0  # there the policy looks at the pictures themselves
    return [name for name in frozen if not (looks if name == "vggt" else reads_views)]


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
    check_embedded(dataset)
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
        **decoder_key(recipe, dataset),
        **copies_key(recipe),
    }


def decoder_key(recipe: Recipe, dataset: WindowDataset) -> Key:
    """Say what decodes videos, where there are any: another decoder may round colours otherwise."""
    has_videos = any(_videos(episode, dataset) for episode in dataset.info.episodes)
    return {"video_backend": recipe.data.video_backend} if has_videos else {}


def copies_key(recipe: Recipe) -> Key:
    """Say what augmented copies are made of."""
    copies = recipe.memory.cache_copies
    if not copies:
        return {"copies": 0}
    varied = {f"augmentation.{name}": value for name, value in dataclasses.asdict(recipe.data.augmentation).items()}
    return {"copies": copies, "augmentation_seed": recipe.training["seed"], **varied}


def check_embedded(dataset: WindowDataset) -> None:
    """Refuse pictures that lie in files of their own, whose content no digest here would cover.

    Raises:
        RecipeError: naming the camera.
    """
    videos = dataset.info.episodes[0].videos
    for camera in {view.camera for view in dataset.views} - set(videos):
        column = dataset.info.table.data.column(dataset.info.camera_keys[camera])
        if any(chunk.field("bytes").null_count for chunk in column.chunks):
            raise RecipeError(
                f"memory.cache: the pictures of camera {camera!r} lie in files of their own, which a cache can't vouch for. "
                "Take 'vggt' out of memory.cache, or convert the dataset to embedded pictures or video."
            )


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


def shows_means(recipe: Recipe) -> bool:
    """Whether what VGGT sees depends on the mean training pictures."""
    return recipe.data.center_images or recipe.data.pictures == "mean"


def precision(recipe: Recipe) -> str:
    """Name the number formats that a frozen backbone computes in."""
    half = next((name for name in ("bf16", "fp16") if recipe.training.get(name)), None)
    return f"{recipe.model.dtype} weights" + (f", {half} autocast" if half else "")
