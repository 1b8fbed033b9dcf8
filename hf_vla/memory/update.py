"""The optimizer's update where memory runs out in it: run again if nothing has moved yet; otherwise the run stops.

Gradients are whole by then, and averaged, so an update can begin anew as long as no weight and no state has changed. Whether
one has is seen from what grows with every update: the versions of tensors, and counts of steps. It is enough to look at
those that it comes to first, which takes less time in every step than to look at all.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from types import MethodType
from typing import NoReturn

import torch
from torch import Tensor

from hf_vla.memory.microbatch import Tell
from hf_vla.memory.out_of_memory import Attempt, free_cache


def guard_update(optimizer: torch.optim.Optimizer, tell: Tell, stop: Callable[[str], NoReturn]) -> None:
    """Let an optimizer's `step` survive running out of memory where that is safe, and end the run in words where it isn't.

    Args:
        optimizer: its `step` is replaced.
        tell: told when an update runs again.
        stop: ends the run, and says why.
    """
    update, alike = optimizer.step, []

    def step(_, *args, **kwargs):
        if (
            not alike
        ):  # not before: sharding puts its own weights in the place of those that the optimizer was made with
            alike.extend(weights_alike(optimizer))
        known, first = len(optimizer.state), first_updated(alike)
        changes = count_changes(optimizer, first)
        if _fits(update, *args, **kwargs):
            return
        if first and count_changes(optimizer, first) == changes:
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


def weights_alike(optimizer: torch.optim.Optimizer) -> list[list[Tensor]]:
    """Sort weights into those that one call updates: of a group, a device and a dtype.

    An update goes through such weights in their order, one at a time or all at once.
    """
    alike = defaultdict(list)
    for number, group in enumerate(optimizer.param_groups):
        for weight in group["params"]:
            alike[number, weight.device, weight.dtype].append(weight)
    return list(alike.values())


def first_updated(alike: list[list[Tensor]]) -> list[Tensor]:
    """Give of each kind the weight that the next update comes to first: one without a gradient is passed over."""
    firsts = (next((weight for weight in weights if weight.grad is not None), None) for weights in alike)
    return [weight for weight in firsts if weight is not None]


def count_changes(optimizer: torch.optim.Optimizer, weights: Iterable[Tensor]) -> int:
    """Count what every update adds to: the versions of these weights and of their states, and counts of steps.

    A state that is new counts from 0. One sum of what never shrinks, since it is taken before every update.
    """
    changes = 0
    for weight in weights:
        changes += weight._version
        for value in optimizer.state.get(weight, {}).values():
            if isinstance(value, Tensor):
                changes += value._version
            elif isinstance(value, int):
                changes += value
    return changes


def _fits(update: Callable, *args, **kwargs) -> bool:
    with Attempt() as attempt:
        update(*args, **kwargs)
    return not attempt.failed


def _forget_new_states(optimizer: torch.optim.Optimizer, known: int) -> None:
    """Drop states that came into being, perhaps by half: optimizers make them whole only where there are none."""
    for parameter in list(optimizer.state)[known:]:
        del optimizer.state[parameter]
