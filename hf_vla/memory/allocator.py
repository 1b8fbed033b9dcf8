"""PyTorch's caching allocator, replayed on a ledger: what it reserves of the GPU, which is more than what tensors hold.

It hands out pieces of segments that it never gives back: small blocks from segments of 2 MiB, others from segments of
20 MiB or of their own size. What lies free between pieces is fragmentation, and the order of events makes it.
Source: c10/cuda/CUDACachingAllocator.cpp (get_allocation_size, get_free_block, should_split, free_block); default settings.
"""

import bisect

import numpy as np

from hf_vla.memory.ledger import BLOCK, KINDS, Ledger

MIB = 2**20
SMALL = MIB
SMALL_SEGMENT, LARGE_SEGMENT, ROUND_LARGE = 2 * MIB, 20 * MIB, 2 * MIB
OWN_SEGMENT = 10 * MIB


class CachingAllocator:
    """Hands out and takes back pieces of segments as CUDA's caching allocator does for one stream."""

    def __init__(self):
        self.reserved = 0
        self._size: dict[int, int] = {}  # address -> size of the piece there, in use or free
        self._before: dict[int, int] = {}  # address -> that of the piece before it in its segment
        self._is_small: dict[int, bool] = {}
        self._free: dict[bool, list[tuple[int, int]]] = {True: [], False: []}  # (size, address), smallest first

    def take(self, size: int) -> int:
        """Take the smallest free piece that is large enough, or one of a new segment; returns its address."""
        size = -(-size // BLOCK) * BLOCK
        is_small = size <= SMALL
        free = self._free[is_small]
        place = bisect.bisect_left(free, (size, 0))
        address = free.pop(place)[1] if place < len(free) else self._new_segment(size)
        rest = self._size[address] - size
        if rest >= BLOCK if is_small else rest > SMALL:
            self._cut(address, size)
        return address

    def give_back(self, address: int) -> None:
        """Give a piece back; it joins its free neighbours."""
        free = self._free[self._is_small[address]]
        after = address + self._size[address]
        if self._take_if_free(free, after):
            self._join(address, after)
        before = self._before.get(address)
        if before is not None and self._take_if_free(free, before):
            self._join(before, address)
            address = before
        bisect.insort(free, (self._size[address], address))

    def _new_segment(self, size: int) -> int:
        is_small = size <= SMALL
        if is_small:
            segment = SMALL_SEGMENT
        elif size < OWN_SEGMENT:
            segment = LARGE_SEGMENT
        else:
            segment = -(-size // ROUND_LARGE) * ROUND_LARGE
        address = 2 * self.reserved  # far enough from the segment before that the two never join
        self.reserved += segment
        self._size[address], self._is_small[address] = segment, is_small
        return address

    def _cut(self, address: int, size: int) -> None:
        after, rest = address + size, self._size[address] - size
        end = after + rest
        if self._before.get(end) == address:
            self._before[end] = after
        self._size[address], self._size[after] = size, rest
        self._before[after], self._is_small[after] = address, self._is_small[address]
        bisect.insort(self._free[self._is_small[address]], (rest, after))

    def _join(self, address: int, after: int) -> None:
        self._size[address] += self._size.pop(after)
        del self._before[after], self._is_small[after]
        end = address + self._size[address]
        if self._before.get(end) == after:
            self._before[end] = address

    def _take_if_free(self, free: list[tuple[int, int]], address: int) -> bool:
        """Take a neighbour out of the list of free pieces, if it is there."""
        wanted = (self._size.get(address, 0), address)
        place = bisect.bisect_left(free, wanted)
        if place == len(free) or free[place] != wanted:
            return False
        del free[place]
        return True


def reserved_peak(ledger: Ledger) -> int:
    """Give the bytes that the allocator has reserved at the end of a ledger, and so at its most.

    What only passed through while loading is left out: the trace warms up there, as no run does.
    """
    allocator = CachingAllocator()
    loading = np.cumsum(ledger.phase) == 0  # afterwards 0 is also what lies between two phases
    passing = ledger.block[loading & (ledger.size < 0) & ~ledger.relabels]
    on_device = (ledger.slot % len(KINDS) != KINDS.index("host")) & ~ledger.relabels & (ledger.size != 0)
    on_device &= ~np.isin(ledger.block, passing)
    held: dict[int, int] = {}
    # The last word on a block's size: sharding divides it only once it is labelled.
    real = ledger.block >= 0
    known = np.zeros(ledger.block.max(initial=0) + 1, np.int64)
    known[ledger.block[real]] = np.abs(ledger.size[real])
    for size, block in zip(ledger.size[on_device].tolist(), ledger.block[on_device].tolist(), strict=True):
        if size > 0:
            held[block] = allocator.take(int(known[block]))
        else:
            allocator.give_back(held.pop(block))
    return allocator.reserved
