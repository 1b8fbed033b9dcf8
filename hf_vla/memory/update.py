"""The optimizer's update where memory runs out in it: run again if nothing has moved yet; otherwise the run stops.

Gradients are whole by then, and averaged, so an update can begin anew as long as no weight and no state has changed. Whether
one has is seen from what changes with every update before the weight does: the versions of tensors, and counts of steps.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from hf_vla.memory.microbatch import Tell, free_cache

Marks = dict[nn.Parameter, dict[str, Any]]


def guard_update(optimizer: torch.optim.Optimizer, tell: Tell, stop: Callable[[str], NoReturn]) -> None:
    """Let an optimizer's `step` survive running out of memory where that is safe, and end the run in words where it isn't.

    Args:
        optimizer: its `step` is replaced.
        tell: told when an update runs again.
        stop: ends the run, and says why.
    """
    update = optimizer.step

    def step(_, *args, **kwargs):
        before = marks(optimizer)
        if _fits(update, *args, **kwargs):
            return
        if not _has_changed(before, marks(optimizer)):
            _forget_new_states(optimizer, before)
            free_cache()
            tell(
                "out_of_memory",
                "The update didn't fit, and had changed nothing yet: all caches are freed for another.",
            )
            if _fits(update, *args, **kwargs):
                return
        stop(
            "The optimizer's update doesn't fit, and can't be run again: go on from the last checkpoint with --resume."
        )

    optimizer.step = MethodType(step, optimizer)  # a method: schedulers look for the function in it


def marks(optimizer: torch.optim.Optimizer) -> Marks:
    """Give, for each trained parameter, what an update changes: its version and those of its states, its count of steps."""
    found: Marks = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            states = {name: _mark(value) for name, value in optimizer.state.get(parameter, {}).items()}
            found[parameter] = {"weight": parameter._version, **states}
    return found


def _mark(value: Any) -> Any:
    return value._version if isinstance(value, Tensor) else value


def _fits(update: Callable, *args, **kwargs) -> bool:
    try:
        update(*args, **kwargs)
    except torch.OutOfMemoryError:
        return False
    return True


def _has_changed(before: Marks, after: Marks) -> bool:
    """Whether an update has begun; a state that is new counts from 0, since fused kernels give weights no new version."""
    return any(before[p].get(name, 0) != mark for p in after for name, mark in after[p].items())


def _forget_new_states(optimizer: torch.optim.Optimizer, before: Marks) -> None:
    """Drop states that came into being, perhaps by half: optimizers make them whole only where there are none."""
    for parameter, known in before.items():
        if len(known) == 1:
            optimizer.state.pop(parameter, None)
