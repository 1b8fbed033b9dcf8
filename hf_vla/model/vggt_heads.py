"""VGGT's camera and depth heads, built only to show what the frozen backbone sees; acting never needs them.

Written from the paper (arXiv 2503.11651) and from measured facts about the released model; parameter names are those of
facebook/VGGT-1B. Run them in float32, outside autocast, as their authors do.

Letters: B batch, V views, F = B·V frames, H W pixels, h w patches along a side, C width of the aggregator (tokens are 2C).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_vla import VGGTConfig
from .modeling_vggt import BLOCK_EPS, Block, Float32LayerNorm, Mlp

POSE_DIM = 9
POSE_STEPS = 4
FRAMES_AT_ONCE = 8
POSITION_SCALE = 0.1
POSITION_BASE = 100.0


@dataclass(frozen=True)
class GeometryConfig:
    """Shapes of the heads; the defaults are those of facebook/VGGT-1B."""

    trunk_depth: int = 4
    camera_num_heads: int = 16
    camera_mlp_ratio: float = 4.0
    dpt_features: int = 256
    dpt_out_channels: tuple[int, int, int, int] = (256, 512, 1024, 1024)
    dpt_layers: tuple[int, int, int, int] = (4, 11, 17, 23)
    """Aggregator layers that the depth head reads, shallow to deep."""


class Geometry(NamedTuple):
    """What the views show, in a scale of the model's own."""

    depth: Tensor
    """(B, V, H, W) float32, positive."""
    depth_conf: Tensor
    """(B, V, H, W) float32, 1 or more; larger is surer."""
    pose_enc: Tensor
    """(B, V, 9) float32: translation, quaternion (x, y, z, w), fields of view along H and W in radians; from the world,
    which is view 0's camera, to the camera, with x right, y down, z forward."""


class VGGTGeometry(nn.Module):
    """Camera and depth heads over the layers of an aggregator."""

    def __init__(self, vggt: VGGTConfig, config: GeometryConfig):
        super().__init__()
        self.layers = (*config.dpt_layers, vggt.depth - 1)
        self.patch_size = vggt.patch_size
        self.num_special = 1 + vggt.num_register_tokens
        self.camera_head = CameraHead(2 * vggt.embed_dim, config)
        self.depth_head = DPTHead(2 * vggt.embed_dim, config, channels=2)

    def forward(self, outputs: list[Tensor], height: int, width: int) -> Geometry:
        """Read depth and cameras from tokens.

        Args:
            outputs: what VGGTModel returned for `layers=self.layers`, each (B, V, 1 + R + P, 2C).
            height: H of the pictures.
            width: W of the pictures.
        """
        h, w = height // self.patch_size, width // self.patch_size
        patches = [tokens[:, :, self.num_special :].flatten(0, 1) for tokens in outputs[:-1]]
        maps = self.depth_head(patches, (h, w), (height, width)).unflatten(0, outputs[0].shape[:2])
        log_depth, log_conf = maps.unbind(2)
        return Geometry(log_depth.exp(), 1 + log_conf.exp(), self.camera_head(outputs[-1][:, :, 0])[-1])


class CameraHead(nn.Module):
    """Refine each view's camera in four steps, with attention among the views."""

    def __init__(self, dim: int, config: GeometryConfig):
        super().__init__()
        self.token_norm = Float32LayerNorm(dim, eps=BLOCK_EPS)
        self.empty_pose_tokens = nn.Parameter(torch.zeros(1, 1, POSE_DIM))
        self.embed_pose = nn.Linear(POSE_DIM, dim)
        self.poseLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 3 * dim))
        self.trunk = nn.Sequential(
            *(
                Block(dim, config.camera_num_heads, config.camera_mlp_ratio, layer_scale=0.01, eps=BLOCK_EPS)
                for _ in range(config.trunk_depth)
            )
        )
        self.trunk_norm = Float32LayerNorm(dim, eps=BLOCK_EPS)
        self.pose_branch = Mlp(dim, dim // 2, POSE_DIM)

    def forward(self, camera_tokens: Tensor) -> list[Tensor]:
        """Return each step's (B, V, 9) for camera tokens (B, V, 2C); the last is the answer."""
        tokens = self.token_norm(camera_tokens)
        normed = F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6)
        given, raw, steps = self.empty_pose_tokens.expand(*tokens.shape[:2], -1), 0.0, []
        for _ in range(POSE_STEPS):
            shift, scale, gate = self.poseLN_modulation(self.embed_pose(given)).chunk(3, dim=-1)
            x = self.trunk(gate * (normed * (1 + scale) + shift) + tokens)
            raw = raw + self.pose_branch(self.trunk_norm(x))
            given = raw.detach()
            steps.append(torch.cat([raw[..., :7], raw[..., 7:].relu()], dim=-1))
        return steps


class DPTHead(nn.Module):
    """Dense prediction from four layers of tokens, fused from coarse to fine.

    Source: Ranftl et al., Vision Transformers for Dense Prediction, arXiv 2103.13413.
    """

    def __init__(self, dim: int, config: GeometryConfig, channels: int):
        super().__init__()
        outs = config.dpt_out_channels
        self.norm = Float32LayerNorm(dim, eps=BLOCK_EPS)
        self.projects = nn.ModuleList(nn.Conv2d(dim, out, kernel_size=1) for out in outs)
        self.resize_layers = nn.ModuleList(
            [
                nn.ConvTranspose2d(outs[0], outs[0], kernel_size=4, stride=4),
                nn.ConvTranspose2d(outs[1], outs[1], kernel_size=2, stride=2),
                nn.Identity(),
                nn.Conv2d(outs[3], outs[3], kernel_size=3, stride=2, padding=1),
            ]
        )
        self.scratch = Scratch(config.dpt_features, outs, channels)

    def forward(self, layers: list[Tensor], grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
        """Map four layers of patch tokens (F, h·w, 2C) to (F, channels, H, W), a few frames at a time."""
        chunks = zip(*(tokens.split(FRAMES_AT_ONCE) for tokens in layers), strict=True)
        return torch.cat([self._maps(chunk, grid, size) for chunk in chunks])

    def _maps(self, layers: tuple[Tensor, ...], grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
        aspect = size[1] / size[0]
        pyramid = []
        for tokens, project, resize in zip(layers, self.projects, self.resize_layers, strict=True):
            x = project(self.norm(tokens).transpose(1, 2).unflatten(2, grid))
            pyramid.append(resize(x + position_map(x, aspect)))
        x = _resize(self.scratch.fuse(pyramid), size)
        return self.scratch.output_conv2(x + position_map(x, aspect))


class Scratch(nn.Module):
    """The part of a DPT head that joins its four levels."""

    def __init__(self, features: int, outs: tuple[int, ...], channels: int):
        super().__init__()
        self.layer1_rn, self.layer2_rn, self.layer3_rn, self.layer4_rn = (
            nn.Conv2d(out, features, kernel_size=3, padding=1, bias=False) for out in outs
        )
        self.refinenet1, self.refinenet2, self.refinenet3 = (Fusion(features) for _ in range(3))
        self.refinenet4 = Fusion(features, has_skip=False)
        self.output_conv1 = nn.Conv2d(features, features // 2, kernel_size=3, padding=1)
        self.output_conv2 = nn.Sequential(
            nn.Conv2d(features // 2, 32, kernel_size=3, padding=1), nn.ReLU(), nn.Conv2d(32, channels, kernel_size=1)
        )

    def fuse(self, pyramid: list[Tensor]) -> Tensor:
        """Join four maps, fine to coarse, into one of twice the finest's size."""
        convs = (self.layer1_rn, self.layer2_rn, self.layer3_rn, self.layer4_rn)
        one, two, three, four = (conv(x) for conv, x in zip(convs, pyramid, strict=True))
        x = self.refinenet4(four, size=three.shape[-2:])
        x = self.refinenet3(x, three, size=two.shape[-2:])
        x = self.refinenet2(x, two, size=one.shape[-2:])
        x = self.refinenet1(x, one, size=tuple(2 * side for side in one.shape[-2:]))
        return self.output_conv1(x)


class Fusion(nn.Module):
    """Add a finer level to what came from the coarser ones, refine, and enlarge."""

    def __init__(self, features: int, has_skip: bool = True):
        super().__init__()
        if has_skip:
            self.resConfUnit1 = ResidualConv(features)
        self.resConfUnit2 = ResidualConv(features)
        self.out_conv = nn.Conv2d(features, features, kernel_size=1)

    def forward(self, x: Tensor, skip: Tensor | None = None, *, size: tuple[int, int]) -> Tensor:
        """Fuse x with the finer level `skip`, and resize to `size`."""
        if skip is not None:
            x = x + self.resConfUnit1(skip)
        return self.out_conv(_resize(self.resConfUnit2(x), size))


class ResidualConv(nn.Module):
    """Two convolutions, each behind a ReLU, on top of the rectified input."""

    def __init__(self, features: int):
        super().__init__()
        self.conv1 = nn.Conv2d(features, features, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(features, features, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Refine x (F, features, height, width)."""
        x = x.relu()
        return x + self.conv2(self.conv1(x).relu())


def position_map(x: Tensor, aspect: float) -> Tensor:
    """Make the sine-cosine embedding (1, channels, height, width) of where each pixel of a map lies in the picture.

    Coordinates are those of pixel centres in a picture whose diagonal reaches from -1 to 1, so that they know its shape.
    """
    _, channels, height, width = x.shape
    half_diagonal = (aspect**2 + 1) ** 0.5
    across = _centres(width, aspect / half_diagonal, x.device)
    down = _centres(height, 1 / half_diagonal, x.device)
    by_column = _sine_cosine(across, channels // 2)[:, None, :].expand(-1, height, -1)
    by_row = _sine_cosine(down, channels // 2)[:, :, None].expand(-1, -1, width)
    return POSITION_SCALE * torch.cat([by_column, by_row])[None].to(x.dtype)


def _centres(count: int, reach: float, device) -> Tensor:
    """Return the middles of `count` equal parts of [-reach, reach], in float64."""
    return (torch.arange(count, dtype=torch.float64, device=device) * 2 + 1 - count) * (reach / count)


def _sine_cosine(positions: Tensor, channels: int) -> Tensor:
    """Embed positions (n,) as (channels, n): sines, then cosines, from frequency 1 down to nearly 1/100."""
    steps = torch.arange(channels // 2, dtype=torch.float64, device=positions.device) / (channels / 2)
    angles = POSITION_BASE ** -steps[:, None] * positions
    return torch.cat([angles.sin(), angles.cos()])


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)
