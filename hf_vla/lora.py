"""What trains: the freeze policy, low-rank adapters through PEFT, and the names of all that training changes."""

from collections.abc import Iterator
from contextlib import contextmanager

from peft import LoraConfig
from torch import nn

ADAPTER = "default"
QUANTIZED = {"Linear4bit": "is_loaded_in_4bit", "Linear8bitLt": "is_loaded_in_8bit"}
"""Kinds of quantised layers, and what PEFT looks for on the model before it wraps one in the adapter made for it."""


def freeze(model: nn.Module, backbones: list[str]) -> None:
    """Freeze the named backbones (`vggt`, `lang_encoder`) of a VLAForActionPrediction, and what is never read of VGGT."""
    for name in backbones:
        getattr(model.model, name).requires_grad_(False)
    for name in unread_blocks(model):
        model.get_submodule(name).requires_grad_(False)


def unread_blocks(model: nn.Module) -> list[str]:
    """Name VGGT's blocks above the layer whose tokens are used: they never run, so no gradient would reach them."""
    depth = model.config.vggt_config.depth
    above = range(model.config.vggt_layer % depth + 1, depth)
    return [f"model.vggt.{stack}.{i}" for stack in ("frame_blocks", "global_blocks") for i in above]


def lora_config(model: nn.Module, lora) -> LoraConfig:
    """Translate the recipe's `lora` section into PEFT's config, with the layers it names inside its backbones only.

    Raises:
        ValueError: if no linear layer of a named backbone matches `target_modules`.
    """
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        target_modules=[name for backbone in lora.apply_to for name in _targets(model, backbone, lora.target_modules)],
    )


def add_adapters(model: nn.Module, config: LoraConfig) -> None:
    """Add adapters to the model and undo PEFT's freezing of what the recipe trains beside them."""
    trainable = trained_names(model)
    with _said_to_be_quantized(model):
        model.add_adapter(config, ADAPTER)
    for name, parameter in model.named_parameters():
        if name in trainable:
            parameter.requires_grad_(True)


@contextmanager
def _said_to_be_quantized(model: nn.Module) -> Iterator[None]:
    """Let PEFT see on the whole model what transformers notes on its quantised backbone alone.

    Otherwise PEFT wraps quantised layers in the adapters of plain ones, whose merging takes packed weights for numbers. The
    mark is taken off again: to transformers and accelerate it would mean that the whole model is quantised.
    """
    kinds = {type(module).__name__ for module in model.modules()}
    marks = [mark for kind, mark in QUANTIZED.items() if kind in kinds]
    for mark in marks:
        setattr(model, mark, True)
    try:
        yield
    finally:
        for mark in marks:
            delattr(model, mark)


def upcast_trained(model: nn.Module) -> None:
    """Hold fusion, head and adapters in float32: AdamW's small updates vanish in bf16 weights.

    A backbone that trains in full keeps the recipe's dtype; its copies in float32 would cost what the plan can't give.
    """
    backbones = ("model.vggt.", "model.lang_encoder.")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ("lora_" in name or not name.startswith(backbones)):
            parameter.data = parameter.data.float()


def trained_names(model: nn.Module) -> set[str]:
    """Names of the parameters that training changes."""
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Count trained and frozen parameters; a quantised weight counts what it stands for, not how it is packed."""
    counts = {"trained": 0, "frozen": 0}
    for parameter in model.parameters():
        counts["trained" if parameter.requires_grad else "frozen"] += _logical_size(parameter)
    return counts


def _logical_size(parameter: nn.Parameter) -> int:
    state = getattr(parameter, "quant_state", None)  # bitsandbytes packs two 4-bit weights into one byte
    return state.shape.numel() if state is not None else parameter.numel()


def _targets(model: nn.Module, backbone: str, wanted: str | list[str]) -> list[str]:
    prefix, unread = f"model.{backbone}.", tuple(f"{block}." for block in unread_blocks(model))
    linear = {
        prefix + name: name.rpartition(".")[2]
        for name, module in getattr(model.model, backbone).named_modules()
        if isinstance(module, nn.Linear) and not (prefix + name).startswith(unread)
    }
    if wanted == "all-linear":
        return list(linear)
    names = [wanted] if isinstance(wanted, str) else wanted
    unknown = set(names) - set(linear.values())
    if unknown:
        raise ValueError(
            f"lora.target_modules names {', '.join(sorted(unknown))}, which {backbone} has not; "
            f"its linear layers are {', '.join(sorted(set(linear.values())))}."
        )
    return [full for full, leaf in linear.items() if leaf in names]
