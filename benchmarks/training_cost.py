"""What a way of training takes, counted alike for whoever's it is: it runs in both environments, and needs torch alone."""

import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

WARM_UP = 3
"""Steps before the clock starts: states come into being, kernels are chosen."""


def device() -> str:
    """Name the device that training will use."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def now() -> float:
    """Read the clock once the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_a_step(step: Callable[[], object], steps: int) -> float:
    """Take some steps and give the time of one, the first `WARM_UP` left out."""
    for _ in range(WARM_UP):
        step()
    began = now()
    for _ in range(steps - WARM_UP):
        step()
    return (now() - began) / (steps - WARM_UP)


class Memory:
    """Bytes of a GPU's tensors or, without one, those that this process holds resident (Linux).

    To be made once the libraries are imported and before there is a model: environments differ in what they import, which
    `library_bytes` says.
    """

    def __init__(self):
        self.start()
        self._libraries = self._peak()

    def start(self) -> None:
        """Forget the peak so far; see proc(5), clear_refs."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def taken(self) -> dict[str, int]:
        """Give the peak since `start`, and how much of it was there before the model."""
        return {"peak_bytes": self._peak(), "library_bytes": self._libraries}

    def _peak(self) -> int:
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(status["VmHWM"].split()[0]) * 1024


def cost(
    speed: float, memory: Memory, model: nn.Module, step: Callable[[], object], batch_size: int
) -> dict[str, float]:
    """Put together what training has taken: samples a second, bytes, parameters, and one more step's arithmetic."""
    taken = memory.taken()
    flops = count_flops(step) / batch_size
    return {"samples_per_second": speed, **taken, **parameters(model), "flops_a_sample": flops}


def parameters(model: nn.Module) -> dict[str, int]:
    """Count a model's parameters, and those that train."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return {"parameters": sum(n for n, _ in sizes), "trained_parameters": sum(n for n, trains in sizes if trains)}


def count_flops(step: Callable[[], object]) -> int:
    """Count the multiplications and additions that a step carries out, what checkpointing repeats included."""
    with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
        step()
    return counter.get_total_flops()


def _attention(query, key, value, *args, out_shape=None, **kwargs) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(grad_out, query, key, value, *args, out_shape=None, **kwargs) -> int:
    return sdpa_backward_flop_count(grad_out, query, key, value)


_CPU_ATTENTION = {  # torch's own counter knows the attention kernels of CUDA only
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
