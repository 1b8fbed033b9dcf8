"""The recipe's data section to the datasets of a run: what is trained on, and what is held out."""

import logging
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np

from hf_vla.data.episode_faults import leave_out_faulty
from hf_vla.data.lerobot_format import DatasetInfo, Episode, open_dataset
from hf_vla.data.loader import DrawnSamples
from hf_vla.data.mixed import MixedDataset
from hf_vla.data.order import Order
from hf_vla.data.streaming import StreamedDataset, open_stream
from hf_vla.data.windows import ViewLike, WindowDataset

Samples = WindowDataset | StreamedDataset | MixedDataset

_STREAMED_PICTURES = 32

logger = logging.getLogger(__name__)


class CameraView(NamedTuple):
    """A view where the recipe names none: what a camera sees now."""

    camera: str
    offset: int | Literal["goal"] = 0


def build_datasets(data: Any, chunk_size: int, seed: int, cache_bytes: int = 0) -> tuple[Samples, Samples | None]:
    """Open what a recipe's data section names, and hold episodes out of it.

    Args:
        data: `hf_vla.recipe.Data`: which datasets, `views`, `eval_fraction` and whether to stream are read.
        chunk_size: actions of a sample, T.
        seed: chooses the episodes held out.
        cache_bytes: memory for decoded training pictures, in each process that reads; 0 decodes each anew.

    Returns:
        The training set, and the held-out set, None where nothing is held out.

    Raises:
        FileNotFoundError: for a dataset that isn't there.
        ValueError: for one that can't be read, or views that it doesn't have.
    """
    if data.mixture:
        pairs = [
            _build_pair(data, mixed, chunk_size, seed, cache_bytes // len(data.mixture)) for mixed in data.mixture
        ]
        held_out = [pair[1] for pair in pairs if pair[1] is not None]
        weights = [mixed.weight for mixed in data.mixture]
        train = MixedDataset([pair[0] for pair in pairs], weights)
        return train, MixedDataset(held_out, [None] * len(held_out)) if held_out else None
    if data.dataset is None:
        raise ValueError(
            "data.dataset isn't set: give the folder or Hub id of a LeRobot dataset, or record one with "
            "data_scripts/record_metaworld.py."
        )
    return _build_pair(data, data, chunk_size, seed, cache_bytes)


def _build_pair(
    data: Any, source: Any, chunk_size: int, seed: int, cache_bytes: int
) -> tuple[WindowDataset | StreamedDataset, WindowDataset | StreamedDataset | None]:
    info = _open(data, source)
    views = _views(source.views or data.views, info)
    train, held_out = split_episodes(info.episodes, data.eval_fraction, seed)
    if data.eval_fraction > 0 and not held_out:
        logger.warning("%s: nothing is held out, since it has one episode.", info.name)
    if data.streaming:
        build = partial(StreamedDataset, info, views, chunk_size, kept_episodes=data.shuffle_episodes)
        return build(train), build(held_out) if held_out else None
    eval_dataset = WindowDataset(info, views, chunk_size, held_out) if held_out else None
    return WindowDataset(info, views, chunk_size, train, cache_bytes), eval_dataset


def _open(data: Any, source: Any) -> DatasetInfo:
    info = (open_stream if data.streaming else open_dataset)(source.dataset, source.revision, data.on_error)
    info = replace(info, video_backend=data.video_backend)
    if data.on_error == "skip" and not data.streaming:  # streamed, an episode's faults show when it is read
        info = leave_out_faulty(info)
    if info.left_out:
        logger.warning(
            "%s: %d episodes are left out (data.on_error), the first: %s",
            info.name,
            len(info.left_out),
            info.left_out[0],
        )
    return info


def order_of(dataset: Samples, seed: int) -> Order:
    """Give the order in which a training goes through a dataset."""
    return Order(dataset.parts if isinstance(dataset, MixedDataset) else (dataset.part,), seed)


def stats_of(dataset: Samples, mixture_stats: str) -> dict[str, dict]:
    """Give the statistics that a policy of this dataset normalises with; of several, each one's own by name, or merged."""
    if isinstance(dataset, MixedDataset) and mixture_stats == "per_dataset":
        return dataset.info.stats_by_name
    return dataset.info.stats


def split_episodes(episodes: tuple[Episode, ...], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Choose the episodes that are held out: `fraction` of each task's, at least one of every task that has two.

    Where no task has two episodes, the tasks are taken together.

    Returns:
        Indices of the episodes to train on, and of those held out, each in ascending order.
    """
    if fraction <= 0:
        return [episode.index for episode in episodes], []
    by_task = defaultdict(list)
    for episode in episodes:
        by_task[episode.tasks].append(episode.index)
    groups = [group for group in by_task.values() if len(group) > 1] or [[episode.index for episode in episodes]]
    generator = np.random.default_rng(seed)
    held_out = {index for group in groups for index in _draw(group, fraction, generator)}
    return [e.index for e in episodes if e.index not in held_out], sorted(held_out)


def mean_pictures(
    dataset: Samples,
    prepare: Callable[[list[np.ndarray]], np.ndarray] = np.stack,
    max_samples: int = 512,
    on_error: str = "raise",
) -> np.ndarray:
    """Average the pictures of each view over training samples spread evenly over the dataset.

    Args:
        dataset: what is trained on.
        prepare: V pictures (H, W, 3) uint8 to one array (V, H', W', 3), as the processor resizes them. Pictures of one size
            need none.
        max_samples: samples that the mean is taken over, at most; of a streamed dataset fewer, each of which takes the
            fetching of an episode.
        on_error: `skip` to take other samples in place of those that can't be read.

    Returns:
        (V, H', W', 3) uint8.
    """
    if not isinstance(dataset, WindowDataset):
        max_samples = min(max_samples, _STREAMED_PICTURES)
    indices = np.linspace(0, len(dataset) - 1, min(max_samples, len(dataset))).round().astype(int)
    samples = DrawnSamples(dataset, on_error)
    total = sum(np.asarray(prepare(samples[int(i)][0].images), np.float64) for i in indices)
    return np.rint(total / len(indices)).astype(np.uint8)


def _views(views: list[ViewLike] | None, info: DatasetInfo) -> list[ViewLike]:
    if not info.cameras:
        raise ValueError(f"{info.name}: has no camera; a policy that looks needs at least one.")
    return [CameraView(name) for name in info.cameras[:2]] if views is None else views


def _draw(indices: list[int], fraction: float, generator: np.random.Generator) -> list[int]:
    """Draw a share of the indices, at least one and never all of them."""
    count = min(max(1, round(fraction * len(indices))), len(indices) - 1)
    return generator.permutation(indices)[:count].tolist()
