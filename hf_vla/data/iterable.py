"""A dataset's samples as a `datasets.IterableDataset`, for training loops that aren't ours.

An IterableDataset that shuffles by itself can't go on exactly (`streaming.py` says how much it loses). Here the order is
made before, by `order.py`, and handed over as shards: what `state_dict` then knows is a place in that order, and
`load_state_dict` seeks it. `split_dataset_by_node` and torch's DataLoader deal the shards to ranks and workers.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from datasets import IterableDataset
from torch.utils.data import Dataset

from hf_vla.data.order import Lanes, Order

SHARD = 32
"""Samples of a shard: going on reads those of the last one again that had been seen."""


def iterable_dataset(dataset: Dataset, order: Order, epoch: int = 0, readers: int = 1) -> IterableDataset:
    """Give an epoch of a dataset as a stream of rows, one a sample, named as the fields of `Sample`.

    Args:
        dataset: map-style, of samples: a `StreamedDataset`, `WindowDataset`, or several as one.
        order: of its samples; `mixture.order_of` makes it.
        epoch: whose order it is.
        readers: ranks times workers, so that each reads episodes of its own; any number sees each sample once.
    """
    sequence = order.sequence(epoch, Lanes(readers, SHARD)).tolist()
    shards = [sequence[start : start + SHARD] for start in range(0, len(sequence), SHARD)]
    return IterableDataset.from_generator(_rows, gen_kwargs={"dataset": dataset, "shards": shards})


def _rows(dataset: Dataset, shards: Sequence[Sequence[int]]) -> Iterator[dict[str, Any]]:
    """Read the samples of some shards."""
    for index in (index for shard in shards for index in shard):
        yield {name: value for name, value in dataset[index]._asdict().items() if value is not None}
