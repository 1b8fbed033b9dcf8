"""Work that may run out of memory, told by more than PyTorch's own allocator.

Libraries ask the driver for what the allocator doesn't give them (a cuBLAS handle, a kernel's code), and on a GPU that
others fill up meanwhile that fails with errors of other kinds. None of them leaves CUDA in a state that can't go on.
"""

import gc
from types import TracebackType
from typing import Self

import torch

SAID = (
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator: can't allocate memory",  # of the host, to which activations may be offloaded
)
"""What errors say that aren't `torch.OutOfMemoryError`, and mean it."""


class Attempt:
    """A block of work; whether it ran out of memory is known behind it, when no traceback holds its tensors any more.

    Example:
        >>> with Attempt() as attempt:
        ...     loss = step(batch)
        >>> if attempt.failed:
        ...     free_cache()
    """

    def __init__(self):
        self.failed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> bool:
        self.failed = error is not None and is_out_of_memory(error)
        return self.failed


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is for want of memory, and smaller work may go through."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in SAID)


def free_cache() -> None:
    """Free what nobody holds: cycles of Python objects, and blocks that the allocator keeps."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
