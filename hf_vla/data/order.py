"""The order in which samples are seen: a pure function of (seed, epoch, position), so that going on with a run is a seek.

There is one sequence an epoch, whatever processes there are: they are dealt its batches in turn, and where a run stands in
its data is one number. So a run that goes on with other processes still sees each remaining sample once.

Letters: N samples of an epoch, L lanes, B samples of a batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Lanes(NamedTuple):
    """How an epoch's sequence is braided, so that each reader of a streamed dataset reads blocks of its own.

    Batches are taken from L strands in turn. With one strand for every worker of every rank, and batches dealt in turn too,
    each worker stays on its strand. Which samples an epoch holds doesn't depend on it.
    """

    count: int = 1
    batch_size: int = 1


@dataclass(frozen=True)
class Part:
    """One dataset, as the order sees it.

    Args:
        block_sizes: samples of each block (episode), in index order.
        window: blocks that are shuffled together, so that only these are read at a time; None shuffles all samples alike.
        weight: share of a mixture's draws, relative to the other parts' weights; None for as many as it has samples.
    """

    block_sizes: tuple[int, ...]
    window: int | None = None
    weight: float | None = None

    def __len__(self) -> int:
        return sum(self.block_sizes)

    def permutation(self, seed: Sequence[int]) -> np.ndarray:
        """Give all indices of this dataset, (n,), shuffled."""
        generator = np.random.default_rng(seed)
        if self.window is None:
            return generator.permutation(len(self))
        ends = np.cumsum(self.block_sizes)
        blocks = generator.permutation(len(ends))
        groups = [blocks[i : i + self.window] for i in range(0, len(blocks), self.window)]
        return np.concatenate([generator.permutation(_rows(group, ends, self.block_sizes)) for group in groups])


@dataclass(frozen=True)
class Order:
    """The order of one dataset, or of several that are drawn from by weight and indexed one behind the other.

    An epoch has as many draws as the datasets have samples together. Without weights it holds each sample exactly once. With
    weights a dataset of n samples goes through epochs of its own: its k-th draw is at position k % n of its epoch k // n.

    Raises:
        ValueError: for an empty dataset, weights given to some datasets only, or one that isn't above 0.
    """

    parts: tuple[Part, ...]
    seed: int = 0

    def __post_init__(self):
        weights = [part.weight for part in self.parts if part.weight is not None]
        if len(weights) not in (0, len(self.parts)) or any(weight <= 0 for weight in weights):
            raise ValueError(
                f"A mixture of {len(self.parts)} datasets needs a weight above 0 for each, or for none; it has {weights}."
            )
        if not self.parts or not all(map(len, self.parts)):
            raise ValueError("There is nothing to draw from: a dataset has no samples.")

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def sequence(self, epoch: int, lanes: Lanes | None = None) -> np.ndarray:
        """Give an epoch's samples, (N,) int64, in the order in which they are seen."""
        lanes = lanes or Lanes()
        sequence = np.empty(len(self), np.int64)
        lane = np.arange(len(self)) // lanes.batch_size % lanes.count
        first = 0
        for d, (part, count, slots) in enumerate(zip(self.parts, self._counts(), self._slots(epoch), strict=True)):
            # Each lane gets a stretch of the part's order: neighbours there lie in the same blocks.
            in_lanes = slots[np.argsort(lane[slots], kind="stable")]
            sequence[in_lanes] = first + self._draws(d, epoch * count, count)
            first += len(part)
        return sequence

    def _counts(self) -> list[int]:
        """Say how often each part is drawn from in an epoch."""
        if self.parts[0].weight is None:
            return [len(part) for part in self.parts]
        shares = np.cumsum([part.weight for part in self.parts])
        ends = np.rint(shares / shares[-1] * len(self)).astype(int)
        return np.diff(ends, prepend=0).tolist()

    def _slots(self, epoch: int) -> list[np.ndarray]:
        """Say at which positions of an epoch each part is drawn from."""
        if len(self.parts) == 1:
            return [np.arange(len(self))]
        turns = np.repeat(np.arange(len(self.parts)), self._counts())
        turns = np.random.default_rng((self.seed, epoch)).permutation(turns)
        return [np.flatnonzero(turns == d) for d in range(len(self.parts))]

    def _draws(self, d: int, start: int, count: int) -> np.ndarray:
        """Give part d's draws number `start` to `start + count`, counted over the whole run."""
        n, stop = len(self.parts[d]), start + count
        epochs = range(start // n, -(-stop // n))
        orders = [self.parts[d].permutation((self.seed, epoch, d)) for epoch in epochs]
        first = start // n * n
        return np.concatenate([np.empty(0, np.int64), *orders])[start - first : stop - first]


def _rows(blocks: np.ndarray, ends: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """List the indices of some blocks' samples."""
    return np.concatenate([np.arange(ends[block] - sizes[block], ends[block]) for block in blocks])
