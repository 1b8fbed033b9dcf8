"""Where a CUDA run differs from the CPU tensors that a trace runs on: autocast's list, kernels' workspaces, offloading.

Each rule names the source it is read from; none is measured here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.library import _scoped_library
from torch.utils._pytree import tree_map_only
from transformers import modeling_utils


@contextmanager
def cuda_autocast() -> Iterator[None]:
    """Let the CPU's autocast run in float32 whatever CUDA's autocast runs so; the CPU's own list is shorter.

    Otherwise a LayerNorm of bf16 states would be counted at half its bytes. The rules are kernels of autocast's own dispatch
    key, as CUDA's are, and not a mode of torch functions: autograd's engine runs hooks under an empty stack of such modes,
    and activation checkpointing would recompute by other rules than the forward went by.

    Source: the list "CUDA ops that can autocast to float32" of PyTorch's `torch.amp` page (ATen/autocast_mode.h).
    """
    with _scoped_library("aten", "IMPL", "AutocastCPU") as library:
        for name in FLOAT32:
            library.impl(name, partial(_run_in_float32, _overload(name)))
        yield


@contextmanager
def leaving_gpus_alone() -> Iterator[None]:
    """Keep a trace from the GPUs that are here: a CUDA context takes memory there, and none can be made where it is full.

    An optimizer asks, before each step, whether its stream is being captured into a CUDA graph.
    """
    with (
        patch.object(torch.accelerator, "current_accelerator", return_value=None),
        patch.object(torch.cuda, "is_current_stream_capturing", return_value=False),  # PyTorch 2.8 asks here
    ):
        yield


def _run_in_float32(operation: torch._ops.OpOverload, *args, **kwargs):
    """Run an operation below autocast, its 16-bit arguments in float32."""
    args, kwargs = tree_map_only(Tensor, _to_float32, (args, kwargs))
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)):
        return operation(*args, **kwargs)


def _to_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _overload(name: str) -> torch._ops.OpOverload:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


FLOAT32 = (
    "cosine_similarity",
    "cumprod",
    "cumsum",
    "exp",
    "expm1",
    "group_norm",
    "layer_norm",
    "linalg_vector_norm",
    "log",
    "log10",
    "log1p",
    "log2",
    "log_softmax.int",
    "logsumexp",
    "native_layer_norm",
    "norm.Scalar",
    "norm.ScalarOpt_dim",
    "pow.Scalar",
    "pow.Tensor_Scalar",
    "pow.Tensor_Tensor",
    "reciprocal",
    "rsqrt",
    "softmax.int",
    "softplus",
    "sum",
    "sum.dim_IntList",
)
"""What CUDA's autocast runs in float32 and the CPU's leaves as it is; losses are in both lists."""


def workspace_bytes(func, args: tuple) -> int:
    """Give what CUDA's kernel for an operation allocates beside its results, and frees before it returns."""
    rule = _WORKSPACES.get(str(func._overloadpacket))
    return rule(*args) if rule else 0


def no_workspace(func, args: tuple) -> int:
    """Count no workspaces, as for real tensors, whose allocator sees them."""
    return 0


def _attention_backward(grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *args) -> int:
    """FlashAttention-2 sums dq in float32, and keeps one number a row: flash_api.cpp, `dq_accum` and `softmax_d`."""
    batch, heads, tokens, width = query.shape
    tokens, width = _round_up(tokens, 128), _round_up(width, 32)
    return 4 * batch * heads * tokens * (width + 1)


def _gemm_4bit(x: Tensor, packed: Tensor, shape: list[int], absmax: Tensor, blocksize: int, *args) -> int:
    """Above a few rows the weight is first written out in 16 bits: bitsandbytes, backends/cuda/ops.py, `gemm_4bit`."""
    weights = shape[0] * shape[1]
    return weights * x.element_size() + 4 * weights // blocksize


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


_WORKSPACES = {
    "aten._scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
    "bitsandbytes.gemm_4bit": _gemm_4bit,
}


@contextmanager
def offloading(tracker) -> Iterator[None]:
    """Let transformers' activation offloading, which refuses a machine without an accelerator, move to a counted host.

    It wraps each checkpointed layer in torch's `save_on_cpu`; here that is a pair of hooks that copy as it would, and count
    the copies as the host's.
    """

    def save_on_host(pin_memory: bool = False, device_type: str = "cuda") -> saved_tensors_hooks:
        return saved_tensors_hooks(pack, torch.clone)

    def pack(tensor: Tensor) -> Tensor:
        with tracker.host():
            return tensor.clone()

    with patch.object(modeling_utils, "save_on_cpu", save_on_host):
        yield
