"""Memory that runs out when more rows than fit go through a chosen place of the model."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class Shortage:
    """Raises OutOfMemoryError where more than `rows` go through.

    Args:
        rows: as many as fit.
        when: which of the calls with more rows fail, counted from 0.
    """

    rows: int
    when: Callable[[int], bool] = lambda call: True
    calls: int = 0
    failures: int = 0

    def check(self, tensor: Tensor) -> None:
        if tensor.shape[0] <= self.rows:
            return
        self.calls += 1
        if self.when(self.calls - 1):
            self.failures += 1
            raise torch.OutOfMemoryError("injected")


def in_forward(model: nn.Module, shortage: Shortage) -> None:
    """Fail as the fusion begins, in training."""
    model.model.fusion.register_forward_pre_hook(
        lambda module, args: shortage.check(args[0]) if module.training else None
    )


def in_evaluation(model: nn.Module, shortage: Shortage) -> None:
    """Fail as the fusion begins, in evaluation."""
    model.model.fusion.register_forward_pre_hook(
        lambda module, args: None if module.training else shortage.check(args[0])
    )


def in_backward(model: nn.Module, shortage: Shortage) -> None:
    """Fail as the backward has passed the head, whose gradients are there already."""

    def watch(module: nn.Module, args: tuple, context: Tensor) -> None:
        if context.requires_grad:
            context.register_hook(shortage.check)

    model.model.fusion.register_forward_hook(watch)


def in_recomputation(model: nn.Module, shortage: Shortage) -> None:
    """Fail in LLaMA's last layer when activation checkpointing runs it again, inside the backward."""
    seen = []

    def watch(module: nn.Module, args: tuple) -> None:
        seen.append(module)
        if len(seen) % 2 == 0:
            shortage.check(args[0])

    model.model.lang_encoder.layers[-1].mlp.register_forward_pre_hook(watch)


PLACES = {"forward": in_forward, "backward": in_backward, "recomputation": in_recomputation}
