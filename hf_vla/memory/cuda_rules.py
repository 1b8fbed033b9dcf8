"""Where a CUDA run differs from the CPU tensors that a trace runs on: autocast's list, kernels' workspaces, offloading.

Each rule names the source it is read from; none is measured here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only
from transformers import modeling_utils


class CudaAutocast(TorchFunctionMode):
    """Run in float32, under the CPU's autocast, what only CUDA's autocast runs so.

    Source: the list "CUDA ops that can autocast to float32" of PyTorch's `torch.amp` page; the CPU's own list is shorter,
    so that a LayerNorm of bf16 states would otherwise be counted at half its bytes.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Call a function, its 16-bit arguments in float32 where CUDA would have them so."""
        kwargs = kwargs or {}
        if func in _FLOAT32 and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map_only(Tensor, _to_float32, (args, kwargs))
            with torch.autocast("cpu", enabled=False):
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def _to_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


_FLOAT32 = {
    F.layer_norm,
    F.group_norm,
    F.softmax,
    F.log_softmax,
    F.cross_entropy,
    F.nll_loss,
    F.l1_loss,
    F.smooth_l1_loss,
    F.mse_loss,
    F.cosine_similarity,
    F.normalize,
    torch.layer_norm,
    torch.softmax,
    torch.log_softmax,
    torch.cosine_similarity,
    torch.cumsum,
    torch.exp,
    torch.log,
    torch.norm,
    torch.pow,
    torch.prod,
    torch.rsqrt,
    torch.sum,
    Tensor.cumsum,
    Tensor.exp,
    Tensor.log,
    Tensor.norm,
    Tensor.pow,
    Tensor.prod,
    Tensor.rsqrt,
    Tensor.softmax,
    Tensor.sum,
}


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
