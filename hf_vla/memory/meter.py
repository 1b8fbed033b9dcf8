"""What a process takes at the most: of a GPU or, where there is none, of the host's memory."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from hf_vla.memory.nvml import read_gpus


@dataclass(frozen=True)
class Usage:
    """Bytes at a peak."""

    allocated: int
    """Of tensors."""
    reserved: int
    """That the allocator held for them."""
    outside: int = 0
    """That the process takes beside its allocator: CUDA context, loaded kernels, libraries."""

    @property
    def total(self) -> int:
        """All that the process takes."""
        return self.reserved + self.outside


class Meter(Protocol):
    """Measures peaks."""

    name: str
    """Of what is measured."""

    def cap(self, budget: int) -> None:
        """Let the process run out of memory once it takes more than `budget` bytes."""

    def start(self) -> None:
        """Forget the peak so far."""

    def peak(self) -> Usage:
        """Give the peak since `start`."""


class GPUMeter:
    """Reads the allocator's counters and the device's; to be made before the process first uses CUDA.

    What is outside the allocator is what the whole GPU holds more than before: other processes that come or go meanwhile
    are mistaken for it. NVML is asked both times, since it counts what the driver keeps to itself (half a GiB of an RTX 6000
    Ada) and CUDA doesn't.
    """

    def __init__(self):
        gpus = read_gpus().gpus
        if not gpus or not torch.cuda.is_available():
            raise ValueError(
                "There is no GPU to measure on this machine: `hf-vla plan` predicts what a run would take."
            )
        self.name = gpus[0].name
        self._held_before = gpus[0].used or 0

    def cap(self, budget: int) -> None:
        """Let allocations beyond the budget fail as on a smaller GPU."""
        torch.cuda.init()
        _, total = torch.cuda.mem_get_info()
        torch.cuda.set_per_process_memory_fraction(min(1.0, (budget - self._outside()) / total))

    def start(self) -> None:
        """Give cached blocks back, and forget the peak so far."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def peak(self) -> Usage:
        """Give the peak since `start`."""
        return Usage(torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved(), self._outside())

    def _outside(self) -> int:
        held = read_gpus().gpus[0].used or 0
        return max(0, held - self._held_before - torch.cuda.memory_reserved())


class HostMeter:
    """Reads the process's own resident memory on Linux; it can't be capped, only measured."""

    name = "host"

    def cap(self, budget: int) -> None:
        """Do nothing: the host swaps or kills, and says nothing before."""

    def start(self) -> None:
        """Reset the kernel's high-water mark; see proc(5), clear_refs."""
        Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> Usage:
        """Give the high-water mark since `start`."""
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        peak = int(status["VmHWM"].split()[0]) * 1024
        return Usage(peak, peak)
