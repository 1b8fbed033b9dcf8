"""The ledger of a traced run: every block of memory that came and went, and the questions one asks of it.

A block's size is either a multiple of the micro-batch or has nothing to do with it, and the order of events doesn't depend
on it. So the ledger of one micro-batch, a large prime, gives that of any other, event by event: what the prime divides
grows with it. `Ledger.at_batch` is exact, where a line through two peaks would not be (a larger batch may peak elsewhere).

Letters: E events of the ledger.
"""

from dataclasses import dataclass, replace

import numpy as np

COMPONENTS = ("vggt", "language", "fusion", "head", "batch", "other")
KINDS = ("weights", "gradients", "optimizer", "activations", "temporaries", "host")
PHASES = ("loading", "encoding", "forward", "backward", "step", "evaluation", "saving")

TELLING = 104_729
"""A micro-batch that tells what grows with it. Tensors of any size are as quick to trace, having no memory; that this prime
divides a size by chance happens to one in a hundred thousand."""

BLOCK = 512
"""Bytes that CUDA's caching allocator rounds each block up to (c10/cuda/CUDACachingAllocator.cpp, kMinBlockSize)."""


@dataclass(frozen=True)
class Ledger:
    """Signed events in the order in which they happened; a relabelling is two events of one block."""

    size: np.ndarray
    """(E,) int64: bytes asked for, positive where a block comes, negative where it goes."""
    slot: np.ndarray
    """(E,) int: `slot_of` the block's component and kind."""
    block: np.ndarray
    """(E,) int: which block."""
    phase: np.ndarray
    """(E,) int: index into `PHASES`."""
    relabels: np.ndarray
    """(E,) bool: True where only the label of a block changes, not its memory."""
    batch_size: int = 1
    """The micro-batch that `size` is for."""

    def at_batch(self, batch_size: int) -> "Ledger":
        """Give the ledger of another micro-batch.

        Raises:
            ValueError: unless this is the ledger of `TELLING` samples.
        """
        if batch_size == self.batch_size:
            return self
        if self.batch_size != TELLING:
            raise ValueError(f"A ledger of {self.batch_size} samples knows no other micro-batch; trace {TELLING}.")
        per_sample, rest = np.divmod(self.size, TELLING)
        return replace(self, size=np.where(rest, self.size, per_sample * batch_size), batch_size=batch_size)

    def sharded(self, gpus: int) -> "Ledger":
        """Divide weights, gradients and optimizer states over GPUs, as full sharding does."""
        if gpus == 1:
            return self
        divisor = np.where(np.isin(self.slot % len(KINDS), [0, 1, 2]), gpus, 1)
        shares = -(-np.abs(self.size) // divisor) * np.sign(self.size)
        return replace(self, size=shares)

    def with_states(self, share: float, paged: bool) -> "Ledger":
        """Put an optimizer's states in place of another's: their size over the traced one's, and whether they are paged."""
        states = np.isin(self.block, self.block[self.slot % len(KINDS) == KINDS.index("optimizer")]) & (
            self.block >= 0
        )
        size = np.where(states, np.round(self.size * share).astype(np.int64), self.size)
        on_host = self.slot - self.slot % len(KINDS) + KINDS.index("host")
        return replace(self, size=size, slot=np.where(states & paged, on_host, self.slot))

    def made_in(self, phase: str) -> "Ledger":
        """Give the blocks that come in a phase; all others are of no size."""
        comes = (self.size > 0) & ~self.relabels & (self.phase == PHASES.index(phase))
        return replace(self, size=np.where(np.isin(self.block, self.block[comes]), self.size, 0))

    def totals(self) -> np.ndarray:
        """Give the device's bytes after each event, each block rounded as CUDA rounds it."""
        return np.cumsum(np.where(self.slot % len(KINDS) == KINDS.index("host"), 0, self.rounded()))

    def rounded(self) -> np.ndarray:
        """Give each event's size rounded up to whole blocks."""
        return -(-np.abs(self.size) // BLOCK) * BLOCK * np.sign(self.size)

    def peak(self, phase: str | None = None) -> tuple[int, int]:
        """Find the most bytes on the device, in one phase or in all after loading, and the event that reaches them.

        The last such event counts: labels of gradients and states are complete by then.
        """
        inside = self.phase > 0 if phase is None else self.phase == PHASES.index(phase)
        totals = np.where(inside, self.totals(), -1)
        event = len(totals) - 1 - int(np.argmax(totals[::-1]))
        return max(int(totals[event]), 0), event

    def held(self, kind: str) -> int:
        """Give the bytes of a kind that are held at the end."""
        return int(self.rounded()[self.slot % len(KINDS) == KINDS.index(kind)].sum())

    def host_peak(self) -> int:
        """Give the most bytes held in the host's memory instead of the device's."""
        on_host = self.slot % len(KINDS) == KINDS.index("host")
        return int(np.cumsum(np.where(on_host, self.size, 0)).max(initial=0))

    def host_traffic(self, phases: tuple[str, ...]) -> int:
        """Sum the bytes that come to the host's memory in some phases."""
        inside = np.isin(self.phase, [PHASES.index(phase) for phase in phases])
        on_host = self.slot % len(KINDS) == KINDS.index("host")
        return int(self.size[inside & on_host & (self.size > 0)].sum())

    def breakdown(self, event: int) -> dict[str, dict[str, int]]:
        """Split the device's bytes just after an event by component, then by kind; empty ones left out."""
        sums = np.bincount(self.slot[: event + 1], self.rounded()[: event + 1], len(COMPONENTS) * len(KINDS))
        table = sums.astype(np.int64).reshape(len(COMPONENTS), len(KINDS))[:, :-1]
        return {
            component: {kind: int(table[i, j]) for j, kind in enumerate(KINDS[:-1]) if table[i, j]}
            for i, component in enumerate(COMPONENTS)
            if table[i].any()
        }


def slot_of(component: str, kind: str) -> int:
    """Number a component and kind."""
    return COMPONENTS.index(component) * len(KINDS) + KINDS.index(kind)


def sort_frees(size: np.ndarray, block: np.ndarray, relabels: np.ndarray) -> np.ndarray:
    """Give the order of events in which blocks that go one right after another go by number.

    They go at one moment, and in no order of their own: autocast empties its cache in the order of a hash table.
    """
    goes = (size < 0) & ~relabels
    moment = np.cumsum(~goes | ~np.r_[False, goes[:-1]])
    return np.lexsort((np.where(goes, block, 0), moment))
