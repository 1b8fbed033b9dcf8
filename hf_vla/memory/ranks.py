"""What data-parallel ranks tell each other once an optimizer step, so that one out of memory leaves none waiting.

DistributedDataParallel averages gradients while the backward still runs, so a rank that fails there leaves the others in
a collective for good. Here each rank finishes its micro-steps alone, recovering as it must; then all agree and average.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn


class Agreement(NamedTuple):
    """What all ranks go on with."""

    size: int
    """Samples at once: the smallest of any rank."""
    exhausted: bool
    """Whether some rank can't fit a single sample, so that all stop."""


def agree(size: int, exhausted: bool, device: torch.device) -> Agreement:
    """Exchange sizes and failures; alone, a process agrees with itself without waiting for its GPU."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return Agreement(size, exhausted)
    said = torch.tensor([size, 0 if exhausted else 1], device=device)
    dist.all_reduce(said, dist.ReduceOp.MIN)
    return Agreement(int(said[0]), not said[1])


def average_gradients(model: nn.Module) -> None:
    """Average the gradients of all ranks, in place; where a rank has none for a parameter, they count as zero."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    pending = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad /= dist.get_world_size()
            pending.append(dist.all_reduce(parameter.grad, async_op=True))
    for work in pending:
        work.wait()
