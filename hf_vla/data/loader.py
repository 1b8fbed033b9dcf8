"""The training loader: a dataset's samples in the order of `order.py`, dealt to ranks and workers, from any position on.

A streamed dataset is read through `datasets`: its IterableDataset hands workers their shards, and where it stands is known
here, so that neither accelerate nor a buffer of its own deals anything out again.

Letters: N samples of an epoch, B of a batch, R ranks, W workers.
"""

import functools
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from datasets import IterableDataset
from torch.utils.data import DataLoader, Dataset, Sampler

from hf_vla.data.order import Lanes, Order
from hf_vla.sample import Batch, Draw, Sample

SKIPPED = "skipped"
"""Key of a loaded batch: what was wrong with each of its samples that were left out."""

_STAND_INS = 24
"""Samples tried in place of one that can't be read."""

logger = logging.getLogger(__name__)


class Turn(NamedTuple):
    """What a batch has in one of its places."""

    index: int
    epoch: int
    is_padding: bool = False
    """Whether it only fills the place: all of its actions are padding, so that it doesn't move the loss."""


class RankBatches(Sampler[list[Turn]]):
    """The batches of one rank: batch number k of rank r is batch k * R + r of the epoch's sequence.

    All ranks have equally many: one that has run out is given a sample that doesn't count.

    Args:
        order: of the samples.
        batch_size: B.
        rank: of this process.
        ranks: R.
        workers: W; 0 reads in the process itself.
    """

    def __init__(self, order: Order, batch_size: int, rank: int = 0, ranks: int = 1, workers: int = 0):
        self.order, self.batch_size = order, batch_size
        self.rank, self.ranks = rank, ranks
        self.readers = max(1, workers)
        self.is_streamed = any(part.window is not None for part in order.parts)
        self.own_lanes = Lanes(ranks * self.readers, batch_size) if self.is_streamed else Lanes()
        self.epoch = self.position = self._begun = 0
        self.lanes = self.own_lanes
        self._told_epoch = torch.zeros((), dtype=torch.long).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Stand at the start of an epoch, unless a position in it was sought."""
        self._told_epoch.fill_(epoch)
        if epoch != self.epoch:
            self.epoch, self.position, self.lanes, self._begun = epoch, 0, self.own_lanes, 0

    def of_reader(self, reader: int) -> Iterator[list[Turn]]:
        """Give what one of the workers reads: every W-th batch.

        A worker that is kept over epochs has a copy of this, and learns of the next epoch by the memory that they share.
        """
        self.set_epoch(int(self._told_epoch))
        return islice(self, reader, None, self.readers)

    def seek(self, epoch: int, position: int, lanes: Lanes, accumulation: int = 1) -> int:
        """Stand where a run stood, also if that had other ranks, workers or batches.

        Args:
            epoch: to go on in.
            position: samples of the epoch that have been seen, by all ranks together.
            lanes: by which the epoch's order was made.
            accumulation: batches of an optimizer step.

        Returns:
            The batches of this epoch that count as done, a multiple of `accumulation`; iterating begins behind them. What
            remains stands at the epoch's end, so that no optimizer step lacks samples that count.
        """
        self._told_epoch.fill_(epoch)
        self.epoch, self.position, self.lanes = epoch, position, lanes
        self._begun = (len(self) - self._remaining()) // accumulation * accumulation
        return self._begun

    def position_after(self, batches: int) -> int:
        """Say how many samples of the epoch all ranks have seen after so many batches of each, those begun with counted."""
        rounds = max(0, batches - (len(self) - self._remaining()))
        return min(len(self.order), self.position + rounds * self._stride)

    def __len__(self) -> int:
        return self._rounds(len(self.order))

    def __iter__(self) -> Iterator[list[Turn]]:
        sequence = self.order.sequence(self.epoch, self.lanes)[self.position :]
        fill = len(self) - self._begun - self._remaining()
        for _ in range(fill):
            yield [self._padding()]
        for start in range(
            self.rank * self.batch_size, self._remaining() * self.ranks * self.batch_size, self._stride
        ):
            indices = sequence[start : start + self.batch_size].tolist()
            yield [Turn(index, self.epoch) for index in indices] or [self._padding()]

    @property
    def _stride(self) -> int:
        return self.ranks * self.batch_size

    def _rounds(self, samples: int) -> int:
        return -(-samples // self._stride)

    def _remaining(self) -> int:
        return self._rounds(len(self.order) - self.position)

    def _padding(self) -> Turn:
        return Turn(0, self.epoch, is_padding=True)


class DrawnSamples(Dataset):
    """A dataset of samples, indexed by turns.

    Args:
        dataset: map-style; indexed with a `Draw` if it has `wants_epoch = True`, else with a number.
        on_error: `raise`, or `skip` to put another sample that doesn't count in the place of one that can't be read.
    """

    def __init__(self, dataset: Dataset, on_error: str = "raise"):
        self.dataset, self.on_error = dataset, on_error
        self._wants_epoch = getattr(dataset, "wants_epoch", False)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, turn: Turn | int) -> tuple[Sample, str | None]:
        """Read a sample.

        Returns:
            The sample, and what was wrong with the one that it stands in for, None as a rule.
        """
        turn = Turn(turn, 0) if isinstance(turn, int) else turn
        if self.on_error == "raise":
            return self._read(turn), None
        try:
            return self._read(turn), None
        except (ValueError, OSError) as error:
            return self._stand_in(turn), str(error)

    def _read(self, turn: Turn) -> Sample:
        sample = self.dataset[Draw(turn.index, turn.epoch) if self._wants_epoch else turn.index]
        if turn.is_padding:
            return sample._replace(action_is_pad=sample.action_is_pad | True)
        return sample

    def _stand_in(self, turn: Turn) -> Sample:
        """Read another sample in ever wider steps, since neighbours are likely to be broken too."""
        for k in range(_STAND_INS):
            try:
                return self._read(Turn((turn.index + 2**k) % len(self), turn.epoch, is_padding=True))
            except (ValueError, OSError):
                continue
        raise ValueError(
            f"data.on_error is 'skip', but sample {turn.index} and {_STAND_INS} others in its place can't be read: the "
            "dataset is broken as a whole, or out of reach. Set data.on_error to 'raise' to see what is wrong."
        )


def build_loader(
    dataset: Dataset,
    batches: RankBatches,
    collate: Callable[[list[Sample]], Batch],
    workers: int = 0,
    on_error: str = "raise",
    **options: Any,
) -> "EpochLoader":
    """Build the training loader.

    It draws nothing from torch's own generator, pins memory where there is a GPU, and keeps its workers over epochs.

    Args:
        dataset: map-style, of samples.
        batches: what this rank reads, in order.
        collate: samples to a batch.
        workers: processes that read; 0 reads in this one.
        on_error: `raise` or `skip`, see `DrawnSamples`.
        options: further arguments of `torch.utils.data.DataLoader`.
    """
    samples, collate = DrawnSamples(dataset, on_error), collate_drawn(collate)
    source = {"dataset": samples, "batch_sampler": batches, "collate_fn": collate}
    if batches.is_streamed:
        rows = stream_of_batches(samples, batches)
        source = {"dataset": rows, "batch_size": None, "collate_fn": functools.partial(_collate_row, collate)}
    return EpochLoader(
        batches,
        **source,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=step_aside,
        generator=torch.Generator().manual_seed(batches.order.seed),
        **options,
    )


def step_aside(worker: int) -> None:
    """Let a worker outlive the stop of its trainer, which needs it to the end of the step, and ends it then.

    torchrun and terminals signal a whole process group, so it makes one of its own. A scheduler may signal every process,
    and the batches that a worker has made would go with it: so it hears SIGTERM from its trainer alone.
    """
    os.setpgid(0, 0)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_when_the_trainer_says, daemon=True).start()


def _end_when_the_trainer_says() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


class EpochLoader(DataLoader):
    """A DataLoader whose epochs are told apart, as Trainer does where a loader has `set_epoch`."""

    def __init__(self, batches: RankBatches, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration goes through."""
        self.batches.set_epoch(epoch)


def stream_of_batches(samples: DrawnSamples, batches: RankBatches) -> IterableDataset:
    """Give what a rank reads as a stream of `datasets`: a row is what a batch is made of, a shard what a worker reads."""
    readers = list(range(batches.readers))
    return IterableDataset.from_generator(
        _rows, gen_kwargs={"samples": samples, "batches": batches, "readers": readers}
    )


def _rows(samples: DrawnSamples, batches: RankBatches, readers: Sequence[int]) -> Iterator[dict[str, list]]:
    for reader in readers:
        for turns in batches.of_reader(reader):
            yield {"read": [samples[turn] for turn in turns]}


def _collate_row(collate: Callable[[list], dict[str, Any]], row: dict[str, list]) -> dict[str, Any]:
    return collate(row["read"])


def collate_drawn(collate: Callable[[list[Sample]], Batch]) -> Callable[[list], dict[str, Any]]:
    """Let samples that come with what was wrong be collated: the batch holds the texts as `SKIPPED`."""
    return functools.partial(_collate, collate)


def _collate(collate: Callable[[list[Sample]], Batch], read: list[tuple[Sample, str | None]]) -> dict[str, Any]:
    """Make the batch, and tell what was skipped."""
    return {**collate([sample for sample, _ in read]), SKIPPED: [text for _, text in read if text is not None]}
