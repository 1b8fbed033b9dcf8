"""Arithmetic and traffic of a traced run, operation by operation, and the time a GPU needs for them.

The time is a roofline over every kernel: the larger of arithmetic over the tensor cores' rate and bytes over the memory's,
and never less than what launching it takes. It ranks recipes; it is no promise in seconds.

Letters: K kernels (operations that do work; views don't).
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from hf_vla.memory.gpus import GPU
from hf_vla.memory.ledger import COMPONENTS, PHASES, TELLING

_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Work:
    """What each kernel computes and moves."""

    flops: np.ndarray
    """(K,) float: multiplications and additions."""
    traffic: np.ndarray
    """(K,) float: bytes read and written."""
    fixed_traffic: np.ndarray
    """(K,) float: those of tensors that don't grow with the micro-batch, in a trace of `TELLING` samples."""
    is_half: np.ndarray
    """(K,) bool: whether it computes in 16 bits, on tensor cores."""
    component: np.ndarray
    """(K,) int: index into `COMPONENTS`."""
    phase: np.ndarray
    """(K,) int: index into `PHASES`."""
    batch_size: int = 1

    def at_batch(self, batch_size: int) -> "Work":
        """Give the work of another micro-batch.

        Raises:
            ValueError: unless this is the work of `TELLING` samples.
        """
        if batch_size == self.batch_size:
            return self
        if self.batch_size != TELLING:
            raise ValueError(
                f"The work on {self.batch_size} samples tells that on no other micro-batch; trace {TELLING}."
            )
        flops = np.where(self.flops % TELLING, self.flops, self.flops / TELLING * batch_size)
        traffic = self.fixed_traffic + (self.traffic - self.fixed_traffic) / TELLING * batch_size
        return replace(self, flops=flops, traffic=traffic, batch_size=batch_size)

    def flops_of(self, phases: tuple[str, ...] = ("forward", "backward")) -> dict[str, float]:
        """Sum the arithmetic by component over some phases."""
        inside = np.isin(self.phase, [PHASES.index(phase) for phase in phases])
        sums = np.bincount(self.component[inside], self.flops[inside], len(COMPONENTS))
        return {name: float(total) for name, total in zip(COMPONENTS, sums, strict=True) if total}

    def seconds(self, gpu: GPU, phases: tuple[str, ...]) -> float:
        """Predict the time of some phases on a GPU."""
        inside = np.isin(self.phase, [PHASES.index(phase) for phase in phases])
        rate = np.where(self.is_half, gpu.half_flops, gpu.single_flops) * gpu.compute_efficiency
        bound = np.maximum(self.flops / rate, self.traffic / (gpu.bandwidth * gpu.bandwidth_efficiency))
        return float(np.maximum(bound, gpu.launch_seconds)[inside].sum())


class WorkLog:
    """Counts operations as they are dispatched."""

    def __init__(self):
        self._rows: list[tuple[float, int, int, bool, int, int]] = []

    def count(self, func, args: tuple, kwargs: dict, result, made: list[Tensor], component: str, phase: str) -> None:
        """Count one operation, unless it only gives a view or makes room."""
        if func.is_view or func in _FREE:
            return
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        moved = [tensor.nbytes for tensor in (*read, *made)]
        fixed = sum(size for size in moved if size % TELLING)
        formula = _FLOPS.get(func._overloadpacket)
        flops = formula(*args, **kwargs, out_val=result) if formula else 0
        is_half = bool(read) and read[0].dtype in _HALF
        self._rows.append((flops, sum(moved), fixed, is_half, COMPONENTS.index(component), PHASES.index(phase)))

    def result(self, batch_size: int = 1) -> Work:
        """Give what was counted so far."""
        flops, traffic, fixed, is_half, component, phase = zip(*self._rows, strict=True)
        return Work(
            np.array(flops, float),
            np.array(traffic, float),
            np.array(fixed, float),
            np.array(is_half, bool),
            np.array(component, np.int8),
            np.array(phase, np.int8),
            batch_size,
        )


def _cpu_attention(query, key, value, *args, out_val=None, **kwargs) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _cpu_attention_backward(grad_out, query, key, value, *args, out_val=None, **kwargs) -> int:
    return sdpa_backward_flop_count(grad_out.shape, query.shape, key.shape, value.shape)


aten = torch.ops.aten
_FLOPS = {
    **flop_registry,
    # torch's own counter knows the attention kernels of CUDA only
    aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward,
}
_FREE = {aten.empty.memory_format, aten.empty_like.default, aten.detach.default, aten.empty_strided.default}
