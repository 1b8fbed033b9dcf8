"""What data-parallel ranks tell each other once an optimizer step, so that one out of memory leaves none waiting.

DistributedDataParallel talks in the forward (buffers) and in the backward (gradients), so a rank that fails there leaves
the others in a collective for good. Here each rank finishes its micro-steps alone, recovering as it must; then all agree
and average. It costs the overlap of averaging with the backward, and saves DistributedDataParallel's copy of all gradients.
"""

import logging
import os
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import nn

from hf_vla.memory.microbatch import Fit

RESTART = 75
"""Exit code of a run that stopped to go on from its last checkpoint, smaller (EX_TEMPFAIL: try again)."""


def is_alone() -> bool:
    """Whether this process trains without others."""
    return not dist.is_initialized() or dist.get_world_size() == 1


def agree(fit: Fit, device: torch.device) -> Fit:
    """Settle on what fits every rank: the smallest size, the most rungs, exhausted if any is."""
    if is_alone():
        return fit  # without waiting for the GPU
    said = torch.tensor([-fit.size, fit.rungs, int(fit.is_exhausted)], device=device)
    dist.all_reduce(said, dist.ReduceOp.MAX)
    size, rungs, is_exhausted = said.tolist()
    return Fit(-size, rungs, bool(is_exhausted))


def any_of_them(is_so: bool, device: torch.device) -> bool:
    """Whether it is so on any rank."""
    if is_alone():
        return is_so
    said = torch.tensor(int(is_so), device=device)
    dist.all_reduce(said, dist.ReduceOp.MAX)
    return bool(said)


def average_gradients(model: nn.Module) -> None:
    """Average the gradients of all ranks, in place; a parameter that got none on any rank stays without."""
    if is_alone():
        return
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    pending = [average(parameter, async_op=True) for parameter in _used_anywhere(trained)]
    for work in pending:
        work.wait()


def average(parameter: nn.Parameter, async_op: bool = False) -> dist.Work | None:
    """Average one parameter's gradient over all ranks, in place; where a rank has none it counts as zero."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    parameter.grad /= dist.get_world_size()
    return dist.all_reduce(parameter.grad, async_op=async_op)


def _used_anywhere(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    has_gradient = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8)
    has_gradient = has_gradient.to(parameters[0].device)
    dist.all_reduce(has_gradient, dist.ReduceOp.MAX)
    return [p for p, is_used in zip(parameters, has_gradient.tolist(), strict=True) if is_used]


def copy_from_first(model: nn.Module) -> None:
    """Give every rank the first rank's trained weights and buffers, as DistributedDataParallel does at its start."""
    if not is_alone():
        for tensor in [*(p.data for p in model.parameters() if p.requires_grad), *model.buffers()]:
            dist.broadcast(tensor, src=0)


def stop_all_ranks(code: int) -> NoReturn:
    """Leave at once, so that the launcher ends the ranks that wait for this one in a collective.

    An ordinary exit would first wait for them in turn, while torch takes its process group down.
    """
    logging.shutdown()
    os._exit(code)
