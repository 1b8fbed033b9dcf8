"""Random weights, on the default device, for a model built on the meta device: memory and speed don't depend on them."""

import torch
from torch import Tensor, nn

from hf_vla.memory.materialize import fill, quantized_kind

STD = 0.02


def fill_with_random(model: nn.Module) -> None:
    """Give a model random weights, and its quantised layers quantised ones."""
    fill(model, _random)
    for module in model.modules():
        if quantized_kind(module) == "Linear4bit":
            _quantize_4bit(module)
        elif quantized_kind(module) == "Linear8bitLt":
            _quantize_8bit(module)


def _random(tensor: Tensor) -> Tensor:
    made = torch.empty(tensor.shape, dtype=tensor.dtype)
    return made.normal_(std=STD) if made.is_floating_point() else made.zero_()


def _quantize_4bit(linear: nn.Module) -> None:
    from bitsandbytes.nn import Params4bit

    weight = linear.weight.data.to(torch.bfloat16)
    options = {"requires_grad": False, "quant_type": "nf4", "compress_statistics": True}
    linear.weight = Params4bit(weight.cpu(), **options, module=linear).to(weight.device)


def _quantize_8bit(linear: nn.Module) -> None:
    from bitsandbytes.nn import Int8Params

    weight = torch.randn(linear.out_features, linear.in_features, dtype=torch.float16)
    linear.weight = Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False).to(weight.device)
    linear.init_8bit_state()
    linear.state.threshold = 0.0  # as in the trace: outlier columns depend on the numbers
