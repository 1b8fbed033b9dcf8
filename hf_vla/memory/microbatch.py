"""In-step recovery from out-of-memory: the same samples and random draws, in smaller pieces, at the same effective batch.

An optimizer step is a list of micro-steps (gradient accumulation). When one of them doesn't fit, what it left in the
gradients is worthless, so the whole optimizer step runs again from its first micro-step, each batch cut into pieces. The
loss is a sum over entries divided by the step's own count, so pieces add up to the batch; random numbers are drawn for
the whole batch and each piece takes its rows, so a piece sees what it would have seen.

Letters: R rows (samples) of a batch.
"""

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

logger = logging.getLogger(__name__)

Batch = dict[str, Any]
GROW_AFTER = 50
"""Clean optimizer steps before a larger size is tried again; doubled each time that fails."""


class MicroStep(NamedTuple):
    """One batch of an optimizer step, and the generators' states that it began with."""

    batch: Batch
    generators: list[Tensor]


@dataclass
class MicroBatcher:
    """Runs the micro-steps of an optimizer step, in the largest pieces that memory has allowed so far.

    Args:
        model: the model whose dropout must draw alike in pieces.
        batch_size: rows R of a whole batch.
        size: rows that go through at once; found by recovery, kept in checkpoints.
        rungs: what to try when a single row doesn't fit, in order: (name, action) pairs.
        on_event: told of everything that changes, as (kind, text).
        has_headroom: whether pieces of that many rows may be tried again.
    """

    model: nn.Module
    batch_size: int
    size: int | None = None
    rungs: list[tuple[str, Callable[[], None]]] = field(default_factory=list)
    on_event: Callable[[str, str], None] = lambda kind, text: None
    has_headroom: Callable[[int], bool] = lambda size: True
    grow_after: int = GROW_AFTER

    def __post_init__(self):
        self.size = self.size or self.batch_size
        self.exhausted = False
        self._history: list[MicroStep] = []
        self._clean_steps = 0

    def run(self, batch: Batch, step: Callable[[Batch], Tensor]) -> Tensor:
        """Run one micro-step; where it doesn't fit, run the optimizer step again so far, smaller.

        Args:
            batch: the micro-step's samples, with the head's draws for all of them.
            step: runs forward and backward of a piece and returns its loss, already divided by the step's count.

        Returns:
            The micro-step's loss. Once `exhausted`, zero: not even one row fits, and the caller ends the run.
        """
        self._history.append(MicroStep(batch, _generator_states()))
        loss = self._attempt(self._history[-1:], step)
        while loss is None and self._shrink():
            self._forget_attempt()
            loss = self._attempt(self._history, step)
        return batch["actions"].new_zeros(()) if loss is None else loss

    def finish_step(self) -> None:
        """Count a whole optimizer step, and grow back after enough of them with headroom."""
        self._history.clear()
        self._clean_steps += 1
        larger = _next_divisor(self.batch_size, self.size)
        if larger and self._clean_steps >= self.grow_after and self.has_headroom(larger):
            self._change_size(
                larger, "micro_batch_grown", f"{self._clean_steps} clean steps: trying pieces of {larger}."
            )

    def agree(self, size: int) -> None:
        """Take the size that all ranks agreed on."""
        if size != self.size:
            self._change_size(
                size, "micro_batch_agreed", f"Another rank ran out of memory: pieces of {size} here too."
            )

    def _attempt(self, micro_steps: list[MicroStep], step: Callable[[Batch], Tensor]) -> Tensor | None:
        """Run micro-steps and return the last one's loss; None if memory ran out.

        The handler is left before anything is freed or tried again: a traceback keeps the failed step's tensors alive.
        """
        try:
            for micro_step in micro_steps:
                loss = self._run_in_pieces(micro_step, step)
            return loss
        except torch.OutOfMemoryError:
            pass
        return None

    def _run_in_pieces(self, micro_step: MicroStep, step: Callable[[Batch], Tensor]) -> Tensor:
        rows = _count_rows(micro_step.batch)
        if rows <= self.size:
            _set_generator_states(micro_step.generators)
            return step(micro_step.batch)
        loss = micro_step.batch["actions"].new_zeros(())
        for start in range(0, rows, self.size):
            _set_generator_states(micro_step.generators)
            piece = slice(start, min(start + self.size, rows))
            with draws_of_whole_batch(self.model, piece, rows):
                loss = loss + step(_take_rows(micro_step.batch, piece, rows))
        return loss

    def _shrink(self) -> bool:
        """Go one size down, or one rung on; False when nothing is left to try."""
        smaller = _previous_divisor(self.batch_size, self.size)
        if smaller:
            self.grow_after *= 2 if self._clean_steps < self.grow_after else 1
            text = f"{self.size} samples at once don't fit: running the step again in pieces of {smaller}."
            self._change_size(smaller, "out_of_memory", text)
            return True
        if self.rungs:
            name, action = self.rungs.pop(0)
            action()
            self.on_event("out_of_memory", f"One sample doesn't fit: running the step again with {name}.")
            return True
        self.exhausted = True
        self.on_event("out_of_memory", "One sample doesn't fit, and nothing is left to try.")
        return False

    def _change_size(self, size: int, kind: str, text: str) -> None:
        self.size, self._clean_steps = size, 0
        self.on_event(kind, text)

    def _forget_attempt(self) -> None:
        """Free what the failed attempt holds: partial gradients, and blocks the allocator keeps."""
        self.model.zero_grad(set_to_none=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@contextmanager
def draws_of_whole_batch(model: nn.Module, piece: slice, rows: int) -> Iterator[None]:
    """Let every dropout draw its mask for the whole batch of `rows` and use the rows of `piece`.

    Modules are changed, not a mode set: activation checkpointing recomputes the forward on the autograd engine's own
    threads, where a mode of this thread isn't on.
    """
    dropouts = [module for module in model.modules() if isinstance(module, nn.Dropout) and module.p > 0]
    for module in dropouts:
        module.forward = partial(_dropout_rows, module, piece, rows)
    try:
        yield
    finally:
        for module in dropouts:
            del module.forward


def _dropout_rows(module: nn.Dropout, piece: slice, rows: int, x: Tensor) -> Tensor:
    if not module.training:
        return x
    per_row = x.shape[0] // (piece.stop - piece.start)  # VGGT's frame blocks see a row's views as rows of their own
    whole = F.dropout(x.new_ones(rows * per_row, *x.shape[1:]), module.p)
    return x * whole[piece.start * per_row : piece.stop * per_row]


def halves(step: Callable[[Batch], Tensor], batch: Batch) -> list[tuple[Tensor, Tensor]]:
    """Run `step` on a batch; where it doesn't fit, on its halves, and so on down to one sample.

    Returns:
        (result, count of valid action steps) of each part that ran.

    Raises:
        torch.OutOfMemoryError: if a single sample doesn't fit.
    """
    rows = _count_rows(batch)
    try:
        return [(step(batch), (~batch["action_is_pad"]).sum())]
    except torch.OutOfMemoryError:
        if rows == 1:
            raise
    return [
        result
        for part in (slice(0, rows // 2), slice(rows // 2, rows))
        for result in halves(step, _take_rows(batch, part, rows))
    ]


def _take_rows(batch: Batch, piece: slice, rows: int) -> Batch:
    """Cut every tensor that has a row a sample; dictionaries of tensors (the head's draws) likewise."""
    return {
        name: _take_rows(value, piece, rows)
        if isinstance(value, dict)
        else value[piece]
        if isinstance(value, Tensor) and value.ndim and value.shape[0] == rows
        else value
        for name, value in batch.items()
    }


def _count_rows(batch: Batch) -> int:
    return batch["actions"].shape[0]


def _next_divisor(batch_size: int, size: int) -> int | None:
    return next((n for n in range(size + 1, batch_size + 1) if batch_size % n == 0), None)


def _previous_divisor(batch_size: int, size: int) -> int | None:
    return next((n for n in range(size - 1, 0, -1) if batch_size % n == 0), None)


def _generator_states() -> list[Tensor]:
    cuda = [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []
    return [torch.get_rng_state(), *cuda]


def _set_generator_states(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1])
