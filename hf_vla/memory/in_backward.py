"""The optimizer inside the backward pass: each weight is updated as soon as its gradient is there, and the gradient freed.

Only one gradient is alive at a time. What it costs:

- Gradients can't be clipped by their global norm, nor accumulated over micro-batches, and a batch can't be cut into pieces.
- A step that runs out of memory midway has moved some weights, and can't be run again. So a step whose batch is larger
  than any before is first rehearsed: forward and backward, each gradient dropped instead of used. What fails there costs
  nothing. If memory runs out in a step all the same, because another process has taken some, the run stops, and goes on
  from its last checkpoint with --resume.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from weakref import WeakMethod

import torch
from torch import Tensor, nn


class OptimizerInBackward:
    """Lets an optimizer update its parameters during backward; its own `step`, called later, then finds nothing to do.

    The optimizer stays one: its groups, learning rates, schedule, state and checkpoints are as ever. It works while this is
    held; a model that outlives it, as the probe's does, can be trained by another.

    Args:
        optimizer: any whose `step` leaves parameters without a gradient alone.
        prepare: called with each parameter before its update; where several ranks train, it averages the gradient.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, prepare: Callable[[nn.Parameter], object] = lambda parameter: None
    ):
        self._optimizer, self._prepare = optimizer, prepare
        self._is_rehearsing = False
        self._proven, self._has_states = 0, False
        _forget_places(optimizer)
        for k, group in enumerate(optimizer.param_groups):
            for parameter in group["params"]:
                parameter.register_post_accumulate_grad_hook(partial(_call_if_alive, WeakMethod(self._update), k))

    def is_proven(self, batch: dict[str, Tensor]) -> bool:
        """Whether a batch of this size has gone through before, beside all of the optimizer's states."""
        return self._has_states and _count_elements(batch) <= self._proven

    @contextmanager
    def rehearsal(self, batch: dict[str, Tensor]) -> Iterator[None]:
        """Let the backward within leave every weight, state and gradient as it is; if it passes, the batch is proven."""
        self._is_rehearsing = True
        try:
            yield
        finally:
            self._is_rehearsing = False
        self._proven = max(self._proven, _count_elements(batch))
        self._has_states = bool(self._optimizer.state)

    def _update(self, group: int, parameter: nn.Parameter) -> None:
        if not self._is_rehearsing:
            self._prepare(parameter)
            with _alone(self._optimizer, group, parameter):
                self._optimizer.step()
        parameter.grad = None


def _call_if_alive(update: WeakMethod, group: int, parameter: nn.Parameter) -> None:
    if method := update():
        method(group, parameter)


@contextmanager
def _alone(optimizer: torch.optim.Optimizer, group: int, parameter: nn.Parameter) -> Iterator[None]:
    """Let an optimizer see one parameter: looking for a gradient at each of 1,500, 1,500 times a step, takes seconds."""
    groups = optimizer.param_groups
    everything = [g["params"] for g in groups]
    for k, g in enumerate(groups):
        g["params"] = [parameter] if k == group else []
    try:
        yield
    finally:
        for g, parameters in zip(groups, everything, strict=True):
            g["params"] = parameters


def _forget_places(optimizer: torch.optim.Optimizer) -> None:
    """Let bitsandbytes know exceptions (embeddings in 32 bits) by parameter alone: in `_alone` each has the first place."""
    if hasattr(optimizer, "check_overrides"):
        optimizer.check_overrides()  # what the first step would do
        optimizer.initialized = True
        optimizer.mng.index2config.clear()


def _count_elements(batch: dict[str, Tensor]) -> int:
    return sum(value.numel() for value in batch.values() if isinstance(value, Tensor))
