"""A batch cut into pieces that add up to it: rows of tensors, and random numbers drawn as for the whole batch.

A loss that is a sum over rows, divided by a count known beforehand, is the sum of its pieces' losses. What remains is
randomness: a piece must see the numbers that its rows would have seen in the whole batch.

Letters: R rows (samples) of a batch.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = dict[str, Any]


def count_rows(batch: Batch) -> int:
    """Count the samples of a batch."""
    return batch["actions"].shape[0]


def cut(rows: int, size: int) -> list[slice]:
    """Cut R rows into pieces of `size`; the last may be smaller."""
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def take_rows(batch: Batch, piece: slice) -> Batch:
    """Take a piece of every tensor that has a row a sample; of dictionaries of tensors (the head's draws) likewise."""
    return _take(batch, piece, count_rows(batch))


def _take(values: Batch, piece: slice, rows: int) -> Batch:
    return {
        name: _take(value, piece, rows)
        if isinstance(value, dict)
        else value[piece]
        if isinstance(value, Tensor) and value.ndim and value.shape[0] == rows
        else value
        for name, value in values.items()
    }


@contextmanager
def dropout_of_whole_batch(model: nn.Module, piece: slice, rows: int) -> Iterator[None]:
    """Let every dropout draw its mask for the whole batch of R rows and use the rows of `piece`.

    Modules are changed, not a mode set: activation checkpointing recomputes the forward on the autograd engine's own
    threads, where a mode of this thread isn't on. Dropout inside an attention kernel (`attention_dropout`, 0 in LLaMA) is
    out of reach: with it a piece is as random as the batch, but not the same.
    """
    dropouts = [module for module in model.modules() if isinstance(module, nn.Dropout) and 0 < module.p < 1]
    for module in dropouts:
        module.forward = partial(_drop_rows, module, piece, rows)
    try:
        yield
    finally:
        for module in dropouts:
            del module.forward


def _drop_rows(module: nn.Dropout, piece: slice, rows: int, x: Tensor) -> Tensor:
    if not module.training:
        return x
    per_row = x.shape[0] // (piece.stop - piece.start)  # VGGT's frame blocks see a row's views as rows of their own
    whole = F.dropout(x.new_ones(rows * per_row, *x.shape[1:]), module.p)
    is_kept = whole[piece.start * per_row : piece.stop * per_row] != 0  # a slice of `whole` would keep all of it alive
    return torch.where(is_kept, x / (1 - module.p), 0)


def generator_states() -> list[Tensor]:
    """Give the states of torch's own generators: the CPU's and, in use, the GPU's."""
    cuda = [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *cuda]


def set_generator_states(states: list[Tensor]) -> None:
    """Put back what `generator_states` gave."""
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state)
