"""The optimizer's update where memory runs out in it: run again if nothing has moved yet; otherwise the run stops.

Gradients are whole by then, and averaged, so an update can begin anew as long as no weight and no state has changed. Whether
one has is seen from what grows with every update before the weight moves: the versions of tensors, and counts of steps.
"""

from collections.abc import Callable
from types import MethodType
from typing import NoReturn

import torch
from torch import Tensor

from hf_vla.memory.microbatch import Tell, free_cache


def guard_update(optimizer: torch.optim.Optimizer, tell: Tell, stop: Callable[[str], NoReturn]) -> None:
    """Let an optimizer's `step` survive running out of memory where that is safe, and end the run in words where it isn't.

    Args:
        optimizer: its `step` is replaced.
        tell: told when an update runs again.
        stop: ends the run, and says why.
    """
    update = optimizer.step

    def step(_, *args, **kwargs):
        known, changes = len(optimizer.state), count_changes(optimizer)
        if _fits(update, *args, **kwargs):
            return
        if count_changes(optimizer) == changes:
            _forget_new_states(optimizer, known)
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


def count_changes(optimizer: torch.optim.Optimizer) -> int:
    """Count what every update adds to: the versions of weights and of their states, and counts of steps.

    A state that is new counts from 0. One sum of what never shrinks, since it is taken before every update.
    """
    changes = sum(weight._version for group in optimizer.param_groups for weight in group["params"])
    for value in (value for states in optimizer.state.values() for value in states.values()):
        if isinstance(value, Tensor):
            changes += value._version
        elif isinstance(value, int):
            changes += value
    return changes


def _fits(update: Callable, *args, **kwargs) -> bool:
    try:
        update(*args, **kwargs)
    except torch.OutOfMemoryError:
        return False
    return True


def _forget_new_states(optimizer: torch.optim.Optimizer, known: int) -> None:
    """Drop states that came into being, perhaps by half: optimizers make them whole only where there are none."""
    for parameter in list(optimizer.state)[known:]:
        del optimizer.state[parameter]
