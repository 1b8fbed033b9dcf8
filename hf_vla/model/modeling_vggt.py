"""VGGT's aggregator: several views of a scene in, tokens that know the scene's geometry out.

Written from the paper (arXiv 2503.11651) and from measured facts about the released model; parameter names are those
of facebook/VGGT-1B below `aggregator.`, so that its weights load without conversion.

Letters: B batch, V views (view 0 is the reference frame), H W pixels, h w patches along a side, P = h·w patches of a
view, R register tokens, C width (outputs are 2C), d channels of a head.

Precision. Whatever dtype the weights have, the residual stream, every LayerNorm, LayerScale, the rotary embedding and
the outputs are float32; matrix products, the convolution and attention run in the weights' dtype (under autocast, in
autocast's). With every weight in bfloat16, the fourth layer of a random model is off from float32 by 0.7 % of the
outputs' spread (rms); a bfloat16 stream would cost 1.2 %.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_vla import VGGTConfig

IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)

ENCODER_EPS = 1e-6
BLOCK_EPS = 1e-5

POSITION_STD = 0.5
"""About that of an embedded patch: with DINOv2's 0.02 a small model from scratch takes long to tell places apart."""
TOKEN_STD = 0.02
"""Not the release's 1e-6: a LayerNorm that meets so small a token multiplies its gradient by hundreds, and clipping by the
global norm then takes that from all other gradients."""


def count_patches(pixels: int, patch_size: int, name: str) -> int:
    """Return how many patches tile a side.

    Raises:
        ValueError: where they can't; names the nearest two sides that they can.
    """
    if pixels < patch_size or pixels % patch_size:
        low = max(patch_size, pixels // patch_size * patch_size)
        raise ValueError(
            f"The {name} must be a multiple of {patch_size}, VGGT's patch; {pixels} isn't. "
            f"Nearest: {low} and {low + patch_size}."
        )
    return pixels // patch_size


def to_unit(pixel_values: Tensor) -> Tensor:
    """Give pictures in [0, 1]: those that come as uint8 are a quarter of the traffic from loader to device."""
    return pixel_values if pixel_values.is_floating_point() else pixel_values.float().div_(255)


def normalize_pixels(pixel_values: Tensor) -> Tensor:
    """Standardise (..., 3, H, W), uint8 or in [0, 1], as ImageNet's pictures are, in float32.

    With plain numbers rather than a buffer: nothing is rounded when the model is cast, or copied to the device.
    """
    channels = to_unit(pixel_values).float().unbind(-3)
    return torch.stack([(x - m) / s for x, m, s in zip(channels, IMAGE_MEAN, IMAGE_STD, strict=True)], dim=-3)


def rotary_tables(h: int, w: int, num_special: int, head_dim: int, base: float, device) -> tuple[Tensor, Tensor]:
    """Make the cosines and sines of one view's tokens, each (num_special + h·w, d) float32.

    The first half of a head's channels turns with the patch's row, the second with its column, both counted from 1;
    special tokens stand at (0, 0), so they don't turn. In bfloat16 the 37th patch's angles would be off by up to 0.12.
    """
    half = head_dim // 2
    frequencies = base ** (-torch.arange(0, half, 2, dtype=torch.float32, device=device) / half)
    rows = torch.arange(1, h + 1, dtype=torch.float32, device=device).repeat_interleave(w, output_size=h * w)
    columns = torch.arange(1, w + 1, dtype=torch.float32, device=device).repeat(h)
    by_row, by_column = rows[:, None] * frequencies, columns[:, None] * frequencies
    angles = F.pad(torch.cat([by_row, by_row, by_column, by_column], dim=-1), (0, 0, num_special, 0))
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x (..., tokens, d): in each half of the channels, channel j pairs with channel j + d/4."""
    first, second = x.unflatten(-1, (2, 2, -1)).unbind(-2)
    return x * cos + torch.stack([-second, first], dim=-2).flatten(-3) * sin


class Float32LayerNorm(nn.LayerNorm):
    """LayerNorm that computes and returns float32, whatever its weights are stored in."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis."""
        return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)


class LayerScale(nn.Module):
    """Learned factor for each channel of a residual branch."""

    def __init__(self, dim: int, initial: float):
        super().__init__()
        self.initial = initial
        self.gamma = nn.Parameter(torch.full((dim,), initial))

    def forward(self, x: Tensor) -> Tensor:
        """Scale x (..., C); returns float32."""
        return x.float() * self.gamma


class Attention(nn.Module):
    """Multi-head self-attention; queries and keys may be normalised, and turned by their position."""

    def __init__(self, dim: int, num_heads: int, qk_norm: bool):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = Float32LayerNorm(dim // num_heads, eps=BLOCK_EPS) if qk_norm else nn.Identity()
        self.k_norm = Float32LayerNorm(dim // num_heads, eps=BLOCK_EPS) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Attend among the tokens of x (batch, tokens, C)."""
        qkv = self.qkv(x.to(self.qkv.weight.dtype))
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        mixed = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two layers with an exact GELU between."""

    def __init__(self, dim: int, hidden: int, out: int | None = None):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, out or dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., C)."""
        return self.fc2(F.gelu(self.fc1(x.to(self.fc1.weight.dtype))))


class Block(GradientCheckpointingLayer):
    """Pre-norm transformer block; the one block of encoder, frame, global and camera stacks."""

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float, layer_scale: float, eps: float, qk_norm: bool = False
    ):
        super().__init__()
        self.norm1 = Float32LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, num_heads, qk_norm)
        self.ls1 = LayerScale(dim, layer_scale)
        self.norm2 = Float32LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.ls2 = LayerScale(dim, layer_scale)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Transform x (batch, tokens, C)."""
        x = x + self.ls1(self.attn(self.norm1(x), rotary))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchProjection(nn.Module):
    """Project each patch of pixels to one token."""

    def __init__(self, dim: int, patch_size: int):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, pixels: Tensor) -> Tensor:
        """(views, 3, H, W) -> (views, P, C), row by row."""
        return self.proj(pixels.to(self.proj.weight.dtype)).flatten(2).transpose(1, 2)


class PatchEncoder(nn.Module):
    """DINOv2 with registers: each view alone, to one token a patch."""

    def __init__(self, config: VGGTConfig):
        super().__init__()
        dim, self.grid = config.embed_dim, count_patches(config.img_size, config.patch_size, "img_size of the config")
        self.num_special = 1 + config.num_register_tokens
        self.patch_embed = PatchProjection(dim, config.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid**2, dim))
        self.register_tokens = nn.Parameter(torch.zeros(1, config.num_register_tokens, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, dim), requires_grad=False)  # in the checkpoint, never used
        self.blocks = nn.ModuleList(
            Block(
                dim,
                config.encoder_num_heads,
                config.encoder_mlp_ratio,
                layer_scale=config.encoder_init_values,
                eps=ENCODER_EPS,
            )
            for _ in range(config.encoder_depth)
        )
        self.norm = Float32LayerNorm(dim, eps=ENCODER_EPS)

    def forward(self, pixels: Tensor, h: int, w: int) -> Tensor:
        """Encode standardised pixels (views, 3, H, W) to (views, P, C) float32."""
        patches = self.patch_embed(pixels).float()
        cls_position, patch_positions = self.positions(h, w).split([1, h * w], dim=1)
        special = torch.cat([self.cls_token + cls_position, self.register_tokens], dim=1)
        x = torch.cat([special.expand(len(patches), -1, -1), patches + patch_positions], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, self.num_special :]

    def positions(self, h: int, w: int) -> Tensor:
        """Return the position embedding (1, 1 + h·w, C) float32 of a grid, class token first."""
        positions = self.pos_embed.float()
        if (h, w) == (self.grid, self.grid):
            return positions
        cls_position, grid = positions[:, :1], positions[:, 1:]
        grid = grid.unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(h, w), mode="bicubic", antialias=True, align_corners=False)
        return torch.cat([cls_position, grid.flatten(2).transpose(1, 2)], dim=1)


class VGGTModel(PreTrainedModel):
    """VGGT's aggregator: attention within each view and among all views, in turn."""

    config_class = VGGTConfig
    base_model_prefix = "vggt"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ("Block",)

    def __init__(self, config: VGGTConfig):
        super().__init__(config)
        _check_head_dim(config)
        dim = config.embed_dim
        self.patch_embed = PatchEncoder(config)
        self.camera_token = nn.Parameter(torch.zeros(1, 2, 1, dim))
        self.register_token = nn.Parameter(torch.zeros(1, 2, config.num_register_tokens, dim))
        self.frame_blocks = nn.ModuleList(_aggregator_block(config) for _ in range(config.depth))
        self.global_blocks = nn.ModuleList(_aggregator_block(config) for _ in range(config.depth))
        self.post_init()

    @property
    def num_special_tokens(self) -> int:
        """How many tokens (camera, registers) stand before a view's patches."""
        return 1 + self.config.num_register_tokens

    def forward(self, pixel_values: Tensor, layers: Sequence[int] | None = None) -> list[Tensor]:
        """Run the stack as far as the last layer asked for.

        Args:
            pixel_values: (B, V, 3, H, W), uint8 or in [0, 1]; H and W multiples of the patch size.
            layers: which layers' tokens to return; negative ones count from the end. None asks for all.

        Returns:
            For each layer asked for, in that order, (B, V, 1 + R + P, 2C) float32: the tokens after the frame block
            beside those after the global block; camera token first, then registers, then patches row by row.

        Raises:
            ValueError: for pictures of another shape, a side that patches can't tile, or a layer that isn't there.
        """
        h, w = self._grid(pixel_values)
        B, V = pixel_values.shape[:2]
        wanted = self._layer_indices(layers)
        x = self._tokens(pixel_values, h, w)
        cos, sin = self._rotary(h, w, x.device)
        within_view, among_views = (cos, sin), (cos.repeat(V, 1), sin.repeat(V, 1))
        outputs = {}
        for i in range(max(wanted, default=-1) + 1):
            frame = self.frame_blocks[i](x.flatten(0, 1), within_view)
            x = self.global_blocks[i](frame.reshape(B, -1, frame.shape[-1]), among_views).unflatten(1, (V, -1))
            if i in wanted:
                outputs[i] = torch.cat([frame.unflatten(0, (B, V)), x], dim=-1)
        return [outputs[i] for i in wanted]

    def _tokens(self, pixel_values: Tensor, h: int, w: int) -> Tensor:
        """Encode each view and put its camera and register tokens first: (B, V, 1 + R + P, C) float32."""
        B, V = pixel_values.shape[:2]
        patches = self.patch_embed(normalize_pixels(pixel_values).flatten(0, 1), h, w).unflatten(0, (B, V))
        special = torch.cat([self.camera_token, self.register_token], dim=2).float()
        first, others = special.split(1, dim=1)
        special = torch.cat([first, others.expand(-1, V - 1, -1, -1)], dim=1)
        return torch.cat([special.expand(B, -1, -1, -1), patches], dim=2)

    def _rotary(self, h: int, w: int, device) -> tuple[Tensor, Tensor]:
        head_dim = self.config.embed_dim // self.config.num_heads
        return rotary_tables(h, w, self.num_special_tokens, head_dim, self.config.rope_freq, device)

    def _grid(self, pixel_values: Tensor) -> tuple[int, int]:
        if pixel_values.ndim != 5 or pixel_values.shape[2] != 3:
            raise ValueError(f"VGGT takes pixel_values (B, V, 3, H, W); these are {tuple(pixel_values.shape)}.")
        H, W = pixel_values.shape[-2:]
        patch = self.config.patch_size
        return count_patches(H, patch, "height of pixel_values"), count_patches(W, patch, "width of pixel_values")

    def _layer_indices(self, layers: Sequence[int] | None) -> list[int]:
        depth = self.config.depth
        if layers is None:
            return list(range(depth))
        for layer in layers:
            if not -depth <= layer < depth:
                raise ValueError(f"This VGGT has layers 0 to {depth - 1} (or -{depth} to -1); {layer} isn't one.")
        return [layer % depth for layer in layers]

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))  # as torch does: scaled by the width, whatever it is
            init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            init.normal_(module.weight, std=1 / math.sqrt(module.weight[0].numel()))
            init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, LayerScale):
            init.constant_(module.gamma, module.initial)
        elif isinstance(module, PatchEncoder):
            init.normal_(module.pos_embed, std=POSITION_STD)
            init.normal_(module.cls_token, std=TOKEN_STD)
            init.normal_(module.register_tokens, std=TOKEN_STD)
            init.zeros_(module.mask_token)
        elif isinstance(module, VGGTModel):
            init.normal_(module.camera_token, std=TOKEN_STD)
            init.normal_(module.register_token, std=TOKEN_STD)


def _aggregator_block(config: VGGTConfig) -> Block:
    return Block(
        config.embed_dim,
        config.num_heads,
        config.mlp_ratio,
        layer_scale=config.init_values,
        eps=BLOCK_EPS,
        qk_norm=config.qk_norm,
    )


def _check_head_dim(config: VGGTConfig) -> None:
    for name in ("num_heads", "encoder_num_heads"):
        if config.embed_dim % getattr(config, name):
            raise ValueError(
                f"embed_dim {config.embed_dim} can't be split into {name} = {getattr(config, name)} heads."
            )
    head_dim = config.embed_dim // config.num_heads
    if head_dim % 4:
        raise ValueError(
            "embed_dim / num_heads must be a multiple of 4: one channel pair turns with rows, one with columns; "
            f"it is {head_dim}."
        )
