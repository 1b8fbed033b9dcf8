"""VGGT from the files of its release: names and shapes checked, one tensor in memory at a time."""

import inspect
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_vla.model.configuration_vla import VGGTConfig
from hf_vla.model.modeling_vggt import VGGTModel

from .checks import Shapes, check_keys, check_shapes
from .files import TensorFile, is_hub_id, open_tensors, read_config, require_file

FILES = ("model.safetensors", "model.pt", "vggt_1B_commercial.pt")
AGGREGATOR = "aggregator."
STACKS = ("frame_blocks", "global_blocks")
HEADS = ("camera_head.", "point_head.", "depth_head.", "track_head.")
"""What a checkpoint may hold beside the aggregator; nothing else is ignored."""

OMEGA = ("aggregator.inter_frame_blocks.", "dense_head.", "text_alignment_head.", "alignment_head.")
"""Names that only VGGT-Omega's weights have. Source: facebookresearch/vggt-omega, docs/checkpoint_key_renames.md."""

DINOV2_WIDTHS = (384, 768, 1024, 1536)
"""Widths of the released encoders, all with heads of 64 channels. Source: DINOv2, arXiv 2304.07193."""

PUBLISHED = ("facebook/VGGT-1B", "facebook/VGGT-1B-Commercial")
"""Repositories whose shapes are the defaults of VGGTConfig, so that planning needs no network."""


def vggt_config(source: str | dict[str, Any]) -> VGGTConfig:
    """Find VGGT's shapes without reading its weights.

    Raises:
        ValueError: for a config key that VGGTConfig doesn't have, or a file that isn't VGGT's.
        FileNotFoundError: if the source isn't there; says how to get it.
    """
    if isinstance(source, dict):
        check_keys(source, _config_keys(), "model.vggt")
        return VGGTConfig(**source)
    if source in PUBLISHED:
        return VGGTConfig()
    if is_hub_id(source):
        return VGGTConfig(**_own_keys(read_config(source)))
    return config_of_file(open_vggt(source), read_config(source))


def load_vggt(source: str | dict[str, Any], dtype: torch.dtype = torch.float32, depth: int | None = None) -> VGGTModel:
    """Load VGGT's aggregator straight into a dtype; or make a random one from a dict of config keys.

    Args:
        source: Hub id, folder, .safetensors or .pt file in the format of facebook/VGGT-1B; or keys of VGGTConfig.
        dtype: of all weights.
        depth: its first blocks that are built and read, of each stack; None takes all.

    Raises:
        ValueError: if the file is damaged, holds more than tensors or another variant, or if any weight but those of
            the four heads is missing, unexpected or of another shape; lists them.
        FileNotFoundError: if the source isn't there; says how to get it.
    """
    if isinstance(source, dict):
        return VGGTModel(_cut(vggt_config(source), depth)).to(dtype).eval()
    file = open_vggt(source)
    config = config_of_file(file, read_config(source))
    above = tuple(f"{AGGREGATOR}{stack}.{i}." for stack in STACKS for i in range(depth or config.depth, config.depth))
    with torch.device("meta"):
        model = VGGTModel(_cut(config, depth))
    fill(model, file, AGGREGATOR, ignored=(*HEADS, *above), dtype=dtype)
    return model.eval()


def _cut(config: VGGTConfig, depth: int | None) -> VGGTConfig:
    config.depth = depth or config.depth
    return config


def open_vggt(source: str) -> TensorFile:
    """Open VGGT's weights, downloaded if need be, and refuse those of its successor."""
    path = Path(source).expanduser()
    file = open_tensors(path if path.is_file() else require_file(source, FILES, "VGGT weights"))
    if any(name.startswith(OMEGA) for name in file.shapes):
        raise ValueError(
            f"{file.path} holds VGGT-Omega, another model of the family, which has other layers. "
            f"This package runs VGGT: give {' or '.join(PUBLISHED)}."
        )
    return file


def fill(module: nn.Module, file: TensorFile, prefix: str, ignored: tuple[str, ...], dtype: torch.dtype) -> None:
    """Fill a module that stands on the meta device with a file's tensors below a prefix.

    Raises:
        ValueError: if one is missing or of another shape, or if the file has others that aren't below an ignored prefix.
    """
    wanted = {prefix + name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = {name: shape for name, shape in file.shapes.items() if not name.startswith(ignored)}
    check_shapes(wanted, found, str(file.path))
    state = {name.removeprefix(prefix): file.read(name).to(dtype, copy=True) for name in wanted}
    module.load_state_dict(state, assign=True)


def config_of_file(file: TensorFile, given: dict[str, Any]) -> VGGTConfig:
    """Take a config from the shapes of a file's tensors and, where it says more or other, from a config.json.

    Raises:
        ValueError: if neither tells how many heads there are.
    """
    keys = {**_keys_of_shapes(file.shapes), **_own_keys(given)}
    width = keys.get("embed_dim", 0)
    if width in DINOV2_WIDTHS:
        keys.setdefault("encoder_num_heads", width // 64)
    unknown = [key for key in ("num_heads", "encoder_num_heads") if key not in keys]
    if width and unknown:
        raise ValueError(
            f"{file.path}: its shapes don't tell {' and '.join(unknown)}; put a config.json beside it that does, "
            "with keys named as VGGTConfig's."
        )
    return VGGTConfig(**keys)


def _keys_of_shapes(shapes: Shapes) -> dict[str, Any]:
    """Read config keys from an aggregator's shapes, those whose tensors are there."""
    shapes = {name.removeprefix(AGGREGATOR): s for name, s in shapes.items() if name.startswith(AGGREGATOR)}
    keys = {key: read(shapes[name]) for key, name, read in _KEY_OF_SHAPE if name in shapes}
    if "img_size" in keys:
        keys["img_size"] *= keys.get("patch_size", VGGTConfig().patch_size)
    if depth := max(count_blocks(shapes, "frame_blocks."), count_blocks(shapes, "global_blocks.")):
        keys |= {"depth": depth, "qk_norm": _Q_NORM in shapes}
    if encoder_depth := count_blocks(shapes, "patch_embed.blocks."):
        keys["encoder_depth"] = encoder_depth
    if "embed_dim" in keys and _Q_NORM in shapes:
        keys["num_heads"] = keys["embed_dim"] // shapes[_Q_NORM][0]
    return keys


_Q_NORM = "frame_blocks.0.attn.q_norm.weight"

_KEY_OF_SHAPE = (
    ("embed_dim", "camera_token", lambda shape: shape[-1]),
    ("num_register_tokens", "register_token", lambda shape: shape[2]),
    ("patch_size", "patch_embed.patch_embed.proj.weight", lambda shape: shape[-1]),
    ("img_size", "patch_embed.pos_embed", lambda shape: math.isqrt(shape[1] - 1)),
    ("mlp_ratio", "frame_blocks.0.mlp.fc1.weight", lambda shape: shape[0] / shape[1]),
    ("encoder_mlp_ratio", "patch_embed.blocks.0.mlp.fc1.weight", lambda shape: shape[0] / shape[1]),
)
"""Config key, the tensor that tells it, and how; img_size is in patches here."""


def count_blocks(names: Iterable[str], prefix: str) -> int:
    """Return how many blocks a stack has, by the highest index, so that a hole in it is seen as missing."""
    indices = [int(name.removeprefix(prefix).partition(".")[0]) for name in names if name.startswith(prefix)]
    return max(indices, default=-1) + 1


def _config_keys() -> list[str]:
    return [name for name in inspect.signature(VGGTConfig.__init__).parameters if name not in ("self", "kwargs")]


def _own_keys(config: dict[str, Any]) -> dict[str, Any]:
    """Keep VGGTConfig's keys: the release's config.json also holds the reference code's switches for its heads."""
    return {key: config[key] for key in _config_keys() if key in config}
