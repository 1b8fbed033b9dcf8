"""Training from caches: which of a recipe's are there, and a run's datasets with stored features in them.

Letters: V views, H W pixels.
"""

import dataclasses
import logging
from functools import partial
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from hf_vla.caching.keys import BACKBONES, cache_keys, shows_means
from hf_vla.data.feature_cache import CachedDataset, Found, TextCache, ViewCache, find_cache
from hf_vla.data.mixture import build_datasets, mean_pictures
from hf_vla.data.windows import WindowDataset
from hf_vla.model.image_processing_vla import resize_view, stack_views
from hf_vla.recipe import Recipe

ROOT = Path("cache")
"""Folder of all caches, where `memory.cache_dir` names none."""

logger = logging.getLogger(__name__)


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


def means_of(recipe: Recipe, train_data: WindowDataset) -> np.ndarray | None:
    """Average the training pictures, where what VGGT sees depends on them."""
    return mean_pictures(train_data, partial(fit_views, recipe)) if shows_means(recipe) else None


def fit_views(recipe: Recipe, images: list[np.ndarray]) -> np.ndarray:
    """Stack an observation's pictures at the recipe's size, as the processor does."""
    return stack_views([resize_view(image, recipe.data.image_size, recipe.data.resize) for image in images])
