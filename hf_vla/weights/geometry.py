"""VGGT's camera and depth heads from the files of its release, for pictures of what the backbone sees."""

from typing import Any

import torch

from hf_vla.model.configuration_vla import VGGTConfig
from hf_vla.model.vggt_heads import GeometryConfig, VGGTGeometry

from .checks import Shapes
from .files import read_config
from .vggt import AGGREGATOR, HEADS, count_blocks, fill, open_vggt

UNUSED = (AGGREGATOR, *(head for head in HEADS if head not in ("camera_head.", "depth_head.")))

UNTOLD = ("camera_num_heads", "dpt_layers")
"""Keys of GeometryConfig that no shape tells; VGGT-1B's are its defaults, others want them in config.json."""


def load_geometry_heads(
    source: str | dict[str, Any], config: VGGTConfig, dtype: torch.dtype = torch.float32
) -> VGGTGeometry:
    """Load the heads that belong to an aggregator.

    Args:
        source: as for `load_vggt`, but a file with heads: random ones would show nothing.
        config: the aggregator's.
        dtype: of all weights; the authors run heads in float32.

    Raises:
        ValueError: if the source is a dict, the file has no such heads or not exactly theirs, or its config.json
            doesn't say what shapes can't.
        FileNotFoundError: if the source isn't there; says how to get it.
    """
    if isinstance(source, dict):
        raise ValueError(
            "model.outputs 'geometry' shows what trained camera and depth heads see; model.vggt holds config keys, so "
            "its weights are random. Name trained weights such as facebook/VGGT-1B, or set model.outputs to 'actions'."
        )
    file = open_vggt(source)
    with torch.device("meta"):
        heads = VGGTGeometry(config, _config_of_file(file.shapes, read_config(source), config, source))
    fill(heads, file, prefix="", ignored=UNUSED, dtype=dtype)
    return heads.eval()


def _config_of_file(shapes: Shapes, given: dict[str, Any], vggt: VGGTConfig, source: str) -> GeometryConfig:
    released = VGGTConfig()
    unknown = [key for key in UNTOLD if key not in given]
    if unknown and (vggt.embed_dim, vggt.depth) != (released.embed_dim, released.depth):
        raise ValueError(f"{source}: its config.json must say {' and '.join(unknown)} for its heads to be built.")
    told = {key: given[key] for key in UNTOLD if key in given}
    return GeometryConfig(**told, **_keys_of_shapes(shapes))


def _keys_of_shapes(shapes: Shapes) -> dict[str, Any]:
    hidden = shapes.get("camera_head.trunk.0.mlp.fc1.weight")
    fused = shapes.get("depth_head.scratch.refinenet1.out_conv.weight")
    projected = [shapes.get(f"depth_head.projects.{i}.weight") for i in range(4)]
    if not (hidden and fused and all(projected)):
        return {}
    return {
        "trunk_depth": count_blocks(shapes, "camera_head.trunk."),
        "camera_mlp_ratio": hidden[0] / hidden[1],
        "dpt_features": fused[0],
        "dpt_out_channels": tuple(shape[0] for shape in projected),
    }
