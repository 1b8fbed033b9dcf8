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

import torch
from torch import Tensor, nn


class OptimizerInBackward:
    """Lets an optimizer update its parameters during backward; its own `step`, called later, then finds nothing to do.

    The optimizer stays one: its groups, learning rates, schedule, state and checkpoints are as ever.

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
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.register_post_accumulate_grad_hook(self._update)

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

    def _update(self, parameter: nn.Parameter) -> None:
        if not self._is_rehearsing:
            self._prepare(parameter)
            self._optimizer.step()  # all other gradients are gone already or yet to come
        parameter.grad = None


def _count_elements(batch: dict[str, Tensor]) -> int:
    return sum(value.numel() for value in batch.values() if isinstance(value, Tensor))
