"""Puts tensors into a model that was built on the meta device: fake ones, which have a size and no memory."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor, nn

QUANT_BLOCK, STATS_BLOCK = 64, 256
"""Weights that share a scale, and scales that share a scale: bitsandbytes' defaults with double quantisation."""


def fill_with_fake(model: nn.Module) -> None:
    """Replace a model's meta tensors by fake CPU ones; to be called under FakeTensorMode."""
    fill(model, lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))
    for module in model.modules():
        quantize = _QUANTIZED.get(quantized_kind(module))
        if quantize:
            quantize(module)


def quantized_kind(module: nn.Module) -> str | None:
    """Name the class of a layer that bitsandbytes quantises; PEFT's adapters around such layers bear the same name."""
    kind = type(module)
    return kind.__name__ if kind.__module__.startswith("bitsandbytes.") else None


def fill(model: nn.Module, make: Callable[[Tensor], Tensor]) -> None:
    """Replace every parameter and buffer by what `make` gives for it; a parameter that is shared stays shared."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(make(parameter), parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = make(buffer)


@contextmanager
def fake_tables() -> Iterator[None]:
    """Let bitsandbytes make its tables of code values without looking at numbers, and keep none of them afterwards."""
    try:
        from bitsandbytes import functional
    except ImportError:  # an optional package; without it nothing is quantised
        yield
        return
    # it says of each 8-bit layer anew that inputs are cast to float16
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    with (
        patch.object(functional, "create_dynamic_map", lambda *args, **kwargs: torch.empty(256)),
        patch.dict(functional.name2qmap, clear=True),
    ):
        yield


def _quantize_4bit(linear: nn.Module) -> None:
    """Give a 4-bit layer its packed weight and two levels of scales, as bitsandbytes lays them out.

    The weight is a plain parameter with a `quant_state`: a fake tensor can't become a Params4bit.
    """
    from bitsandbytes.functional import QuantState

    shape = torch.Size((linear.out_features, linear.in_features))
    blocks = -(-shape.numel() // QUANT_BLOCK)
    nested = QuantState(
        absmax=torch.empty(-(-blocks // STATS_BLOCK)),
        blocksize=STATS_BLOCK,
        code=torch.empty(256),
        dtype=torch.float32,
    )
    state = QuantState(
        absmax=torch.empty(blocks, dtype=torch.uint8),
        shape=shape,
        code=torch.empty(16),
        blocksize=QUANT_BLOCK,
        quant_type="nf4",
        dtype=torch.bfloat16,
        offset=torch.empty(()),
        state2=nested,
    )
    packed = torch.empty(-(-shape.numel() // 2), 1, dtype=torch.uint8)
    linear.weight = nn.Parameter(packed, requires_grad=False)
    linear.weight.quant_state = linear.quant_state = state


def _quantize_8bit(linear: nn.Module) -> None:
    """Give an 8-bit layer its weight and a scale a row.

    Without outlier columns: how many there are depends on the numbers, so the plan states a margin for them.
    """
    packed = torch.empty(linear.out_features, linear.in_features, dtype=torch.int8)
    linear.weight = nn.Parameter(packed, requires_grad=False)
    linear.weight.CB = linear.weight.SCB = None
    linear.state.CB, linear.state.SCB = packed, torch.empty(linear.out_features)
    linear.state.threshold = 0.0


_QUANTIZED = {"Linear4bit": _quantize_4bit, "Linear8bitLt": _quantize_8bit}
