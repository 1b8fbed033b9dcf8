"""What the backbone makes of one held-out observation: the depth of every view, and where its cameras stood.

Letters: V views, H W pixels.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from hf_vla import run, weights
from hf_vla.model.modeling_vggt import VGGTModel
from hf_vla.model.processing_vla import VLAProcessor
from hf_vla.model.vggt_heads import Geometry, VGGTGeometry
from hf_vla.sample import Sample

FOLDER = "geometry"
FILE = "geometry.json"
RAMP = np.array([(20, 24, 70), (35, 95, 160), (60, 170, 160), (190, 215, 110), (255, 246, 195)])
"""Colours of depth from far to near, (5, 3) in 0 to 255; their lightness rises evenly, so that grey prints tell it too."""
SPREAD = (0.02, 0.98)
"""Quantiles of depth that the colours span; single far pixels would leave all others one colour."""


def write_geometry(
    directory: Path, source: str | dict[str, Any], vggt: VGGTModel, processor: VLAProcessor, sample: Sample
) -> dict[str, Any]:
    """Look at one sample through VGGT's camera and depth heads, and write what they see into the run.

    Args:
        directory: the run's; gets `geometry.json` and, under `geometry/`, `depth_<view>.png` and `view_<view>.png`.
        source: where VGGT's weights came from; its heads are in the same file.
        vggt: the policy's own, with what training made of it.
        processor: the policy's.
        sample: the observation.

    Raises:
        ValueError: if the source holds no trained heads, as a dict of config keys doesn't.
    """
    heads = weights.load_geometry_heads(source, vggt.config)
    batch = processor(images=[sample.images], task=[sample.task], state=sample.state[None])
    geometry = look(vggt, heads, batch["pixel_values"].to(vggt.device))
    (directory / FOLDER).mkdir(exist_ok=True)
    depth = geometry.depth[0].numpy()
    pictures = color_depth(depth)
    views = []
    for i, (name, camera) in enumerate(zip(processor.views, relative_cameras(geometry.pose_enc[0]), strict=True)):
        file = f"{name.replace('/', '_')}.png"
        Image.fromarray(pictures[i]).save(directory / FOLDER / f"depth_{file}")
        Image.fromarray(sample.images[i]).save(directory / FOLDER / f"view_{file}")
        near, far = np.quantile(depth[i], SPREAD)
        views.append({"name": name, "file": file, "near": float(near), "far": float(far), **camera})
    seen = {
        "task": sample.task,
        "episode_index": sample.episode_index,
        "frame_index": sample.frame_index,
        "views": views,
    }
    run.write_json(directory / FILE, seen)
    return seen


@torch.inference_mode()
def look(vggt: VGGTModel, heads: VGGTGeometry, pixel_values: torch.Tensor) -> Geometry:
    """Read depth and cameras of pictures (1, V, 3, H, W) in [0, 1]; the heads run in float32, on the CPU."""
    outputs = [tokens.float().cpu() for tokens in vggt(pixel_values, layers=heads.layers)]
    return heads(outputs, *pixel_values.shape[-2:])


def color_depth(depth: np.ndarray) -> np.ndarray:
    """Paint depth (V, H, W) as (V, H, W, 3) uint8: the nearer the lighter, all views on one logarithmic scale."""
    logarithm = np.log(depth)
    near, far = np.quantile(logarithm, SPREAD)
    share = np.clip((far - logarithm) / max(far - near, 1e-6), 0, 1)
    stops = np.linspace(0, 1, len(RAMP))
    return np.stack([np.interp(share, stops, channel) for channel in RAMP.T], axis=-1).round().astype(np.uint8)


def relative_cameras(pose_enc: torch.Tensor) -> list[dict[str, Any]]:
    """Turn encoded poses (V, 9) into each camera's pose as view 0's camera sees it.

    Returns:
        A dict a view: `translation` (3) in the scale of the depths and `quaternion` (x, y, z, w), which take points of view
        0's camera to this one's; `angle_degrees` of that rotation; `field_of_view_degrees` along height and width.
    """
    translation, quaternion, field_of_view = pose_enc.double().split((3, 4, 2), dim=-1)
    quaternion = quaternion / quaternion.norm(dim=-1, keepdim=True)
    cameras = []
    for i in range(len(pose_enc)):
        turn = _multiply(quaternion[i], _conjugate(quaternion[0]))
        turn = -turn if turn[3] < 0 else turn  # of the two that mean the same rotation, the shorter way
        shift = translation[i] - _rotate(turn, translation[0])
        cameras.append(
            {
                "translation": shift.tolist(),
                "quaternion": turn.tolist(),
                "angle_degrees": math.degrees(2 * math.atan2(turn[:3].norm(), turn[3])),
                "field_of_view_degrees": field_of_view[i].rad2deg().tolist(),
            }
        )
    return cameras


def _multiply(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Compose rotations (x, y, z, w): first b, then a."""
    u, v = a[:3], b[:3]
    return torch.cat([a[3] * v + b[3] * u + torch.linalg.cross(u, v), (a[3] * b[3] - u @ v)[None]])


def _conjugate(a: torch.Tensor) -> torch.Tensor:
    return torch.cat([-a[:3], a[3:]])


def _rotate(a: torch.Tensor, point: torch.Tensor) -> torch.Tensor:
    """Rotate a point (3,) by a unit quaternion (x, y, z, w)."""
    twist = 2 * torch.linalg.cross(a[:3], point)
    return point + a[3] * twist + torch.linalg.cross(a[:3], twist)
