"""Fusion: how view tokens, text and robot state meet in a context of one vector for each step of the chunk.

Letters: B batch, V views, H W pixels, P patches of a view, g grid side after pooling, N = V·g² view tokens, L text tokens,
D LLaMA width, C VGGT width (outputs are 2C), T chunk, S state dims, F fusion width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import CrossBlock
from .configuration_vla import VLAConfig
from .modeling_vggt import to_unit


class LateFusion(nn.Module):
    """Learned action queries, beside state and instruction, read view tokens and text states; LLaMA reads text only.

    `gated` also weighs each channel of each view token by what the text is about, before the queries look.

    Source: the gate is the winner of the nine ways compared in arXiv 2603.24393.
    """

    def __init__(self, config: VLAConfig):
        super().__init__()
        fusion, width = config.view_fusion_config, config.view_fusion_config.hidden_size
        if fusion.align_weight:
            raise ValueError(
                f"align_weight aligns LLaMA's states at view positions, which only `prefix` has, not `{fusion.type}`."
            )
        self.views = ViewTokens(config, width)
        self.text = Projection(config.text_config.hidden_size, width)
        self.state = StateToken(config, width)
        self.gate = ViewGate(width) if fusion.type == "gated" else None
        self.queries = nn.Embedding(config.chunk_size, width)  # one for each step: they are their own positions
        self.context_norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(
            CrossBlock(width, fusion.num_heads, fusion.dropout) for _ in range(fusion.num_layers)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, view_features: Tensor, text_features: Tensor, text_mask: Tensor, state: Tensor) -> Tensor:
        """Fuse.

        Args:
            view_features: (B, V, g², 2C), pooled VGGT tokens.
            text_features: (B, L, D), LLaMA's last hidden states.
            text_mask: (B, L) bool, True where there is text.
            state: (B, S), normalised.

        Returns:
            (B, T, F).
        """
        views, text = self.views(view_features), self.text(text_features)
        if self.gate is not None:
            views = self.gate(views, text, text_mask)
        context = self.context_norm(torch.cat([views, text], dim=1))
        mask = _widen(text_mask, before=views.shape[1], behind=0)
        # State and instruction ride with the queries: where these look depends on where the robot is and what it is told.
        queries = self.queries.weight.expand(len(context), -1, -1)
        x = torch.cat([queries, self.state(state), _whole_text(text, text_mask)], dim=1)
        for block in self.blocks:
            x = block(x, context, mask)
        return self.norm(x[:, : queries.shape[1]])


class PrefixFusion(nn.Module):
    """Early fusion: LLaMA itself reads views, text and state, and thinks at T action queries behind them.

    The sequence is: first text token, N placeholders that the view tokens fill, the other text tokens, state, T queries.
    The first text token stays first because LLaMA rests its idle attention on it. Each sample's padding is moved behind its
    queries, where causal attention never looks: so how much padding a batch mate brings can't matter, no mask is needed,
    and attention keeps its fast kernels.

    Args:
        config: with `align_weight` above 0, view tokens come from a light patch embedding instead of VGGT, and a middle
            layer's states at their positions are drawn towards VGGT's tokens: acting then does without VGGT
            (arXiv 2510.12276).
    """

    def __init__(self, config: VLAConfig):
        super().__init__()
        width = config.text_config.hidden_size
        self.views = ViewTokens(config, width)
        self.state = StateToken(config, width)
        self.queries = nn.Embedding(config.chunk_size, width)
        self.out = Projection(width, config.view_fusion_config.hidden_size)
        is_aligned = config.view_fusion_config.align_weight > 0
        self.patches = PatchTokens(config) if is_aligned else None
        self.aligner = Aligner(config) if is_aligned else None

    def forward(
        self,
        view_features: Tensor,
        input_ids: Tensor,
        text_mask: Tensor,
        state: Tensor,
        lang_encoder: nn.Module,
        align_target: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Fuse.

        Args:
            view_features: (B, V, g², 2C), pooled VGGT tokens; with alignment, those of `patches`.
            input_ids: (B, L).
            text_mask: (B, L) bool, True where there is text.
            state: (B, S), normalised.
            lang_encoder: LLaMA, without its language head.
            align_target: (B, V, g², 2C), pooled VGGT tokens; only where alignment is trained.

        Returns:
            The context (B, T, F), and the alignment loss (B,) if there is a target.
        """
        sequence, mask = self._sequence(view_features, input_ids, text_mask, state, lang_encoder)
        sequence = _gather(sequence, (~mask).byte().argsort(dim=1, stable=True))
        output = lang_encoder(inputs_embeds=sequence, use_cache=False, output_hidden_states=align_target is not None)
        chunk = self.queries.num_embeddings
        queries = mask.sum(1, keepdim=True) - chunk + torch.arange(chunk, device=mask.device)
        context = self.out(_gather(output.last_hidden_state, queries))
        if align_target is None:
            return context, None
        return context, self.aligner(output.hidden_states, align_target.flatten(1, 2))

    def _sequence(
        self, view_features: Tensor, input_ids: Tensor, text_mask: Tensor, state: Tensor, lang_encoder: nn.Module
    ) -> tuple[Tensor, Tensor]:
        """Lay out LLaMA's input (B, 1 + N + (L - 1) + 1 + T, D) and which of it is no padding."""
        text = lang_encoder.get_input_embeddings()(input_ids)
        views = self.views(view_features)
        queries = self.queries.weight.expand(len(text), -1, -1)
        parts = [text[:, :1], views, text[:, 1:], self.state(state), queries]
        mask = _widen(text_mask[:, 1:], before=1 + views.shape[1], behind=1 + queries.shape[1])
        return torch.cat([part.to(text.dtype) for part in parts], dim=1), mask


class ViewTokens(nn.Module):
    """Project pooled view features and say where each token comes from: which view, which place of the grid."""

    def __init__(self, config: VLAConfig, width: int):
        super().__init__()
        self.project = Projection(2 * config.vggt_config.embed_dim, width)
        self.view = nn.Embedding(config.num_views, width)
        self.place = nn.Embedding(config.pool_grid**2, width)

    def forward(self, view_features: Tensor) -> Tensor:
        """Map (B, V, g², 2C) to (B, N, width), view after view.

        Raises:
            ValueError: unless there is one feature for each placeholder; a view would be lost, or seen twice, unnoticed.
        """
        placeholders = (self.view.num_embeddings, self.place.num_embeddings)
        brought = tuple(view_features.shape[1:3])
        if brought != placeholders:
            raise ValueError(
                f"There are placeholders for {_product(placeholders)} tokens (views x tokens of a view), but the view "
                f"features bring {_product(brought)}: num_views and pool_grid must be those of the batch."
            )
        tokens = self.project(view_features) + self.view.weight[:, None] + self.place.weight
        return tokens.flatten(1, 2)


class ViewGate(nn.Module):
    """Weigh each channel of each view token by what it holds and what the text is about."""

    def __init__(self, width: int):
        super().__init__()
        self.hidden = nn.Linear(2 * width, width)
        self.out = nn.Linear(width, width)

    def forward(self, views: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        """Gate views (B, N, F) by the mean of text (B, L, F) where mask (B, L) is True."""
        both = torch.cat([views, _mean_text(text, text_mask).expand_as(views)], dim=-1)
        return views * torch.sigmoid(self.out(F.gelu(self.hidden(both))))


class StateToken(nn.Module):
    """Embed the robot's state as one token."""

    def __init__(self, config: VLAConfig, width: int):
        super().__init__()
        self.linear = nn.Linear(config.state_dim, width)

    def forward(self, state: Tensor) -> Tensor:
        """Map (B, S) to (B, 1, width)."""
        return self.linear(state.to(self.linear.weight.dtype))[:, None]


class PatchTokens(nn.Module):
    """Embed pictures lightly, in VGGT's place: one convolution of VGGT's patch, pooled to its grid."""

    def __init__(self, config: VLAConfig):
        super().__init__()
        patch = config.vggt_config.patch_size
        self.conv = nn.Conv2d(3, 2 * config.vggt_config.embed_dim, kernel_size=patch, stride=patch)
        self.pool_grid = config.pool_grid

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Map (B, V, 3, H, W), uint8 or in [0, 1], to (B, V, g², 2C)."""
        pixels = to_unit(pixel_values).flatten(0, 1).to(self.conv.weight.dtype)
        return pool_patches(F.gelu(self.conv(pixels)), self.pool_grid).unflatten(0, pixel_values.shape[:2])


class Aligner(nn.Module):
    """Distance of a middle LLaMA layer's view states from VGGT's tokens (Spatial Forcing, arXiv 2510.12276)."""

    def __init__(self, config: VLAConfig):
        super().__init__()
        depth, layer = config.text_config.num_hidden_layers, config.view_fusion_config.align_layer
        self.layer = depth // 2 if layer is None else layer
        if not 1 <= self.layer <= depth:
            raise ValueError(f"align_layer must be 1 to {depth}, the language encoder's layers; it is {self.layer}.")
        self.project = Projection(config.text_config.hidden_size, 2 * config.vggt_config.embed_dim)

    def forward(self, hidden_states: tuple[Tensor, ...], target: Tensor) -> Tensor:
        """Compute 1 - cosine, mean over view positions.

        Args:
            hidden_states: LLaMA's input (B, ·, D) and the output of each of its layers; views stand at 1 to N.
            target: (B, N, 2C). Normed first, or the few giant channels of VGGT's residual stream would be all that counts.

        Returns:
            (B,) float32.
        """
        states = self.project(hidden_states[self.layer][:, 1 : 1 + target.shape[1]])
        target = F.layer_norm(target.float(), target.shape[-1:])
        return (1 - F.cosine_similarity(states.float(), target, dim=-1)).mean(1)


class Projection(nn.Module):
    """Norm and linear map of a backbone's features, whose scale is the backbone's own affair, in the fusion's dtype."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(in_dim)
        self.linear = nn.Linear(in_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_dim) to (..., out_dim)."""
        return self.linear(self.norm(x.to(self.norm.weight.dtype)))


def _mean_text(text: Tensor, text_mask: Tensor) -> Tensor:
    """Average text (B, L, F) where mask (B, L) is True, to (B, 1, F)."""
    weight = text_mask[..., None].to(text.dtype)
    return (text * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True)


def _whole_text(text: Tensor, text_mask: Tensor) -> Tensor:
    """Take the last of text (B, L, F) where mask (B, L) is True, which alone has read all of it: (B, 1, F).

    In the mean, the one word by which two instructions differ counts for one in L, and a small policy overlooks it.
    """
    return _gather(text, text_mask.sum(1, keepdim=True) - 1)


def pool_patches(grid: Tensor, g: int) -> Tensor:
    """Average a grid of patches (M, C, h, w) to (M, g², C), row by row.

    Raises:
        ValueError: if there are fewer patches than places.
    """
    h, w = grid.shape[-2:]
    if min(h, w) < g:
        raise ValueError(f"{h} x {w} patches can't be pooled to {g} x {g}: lower pool_grid or enlarge the pictures.")
    return F.adaptive_avg_pool2d(grid, g).flatten(2).transpose(1, 2)


def _widen(mask: Tensor, before: int, behind: int) -> Tensor:
    """Widen mask (B, L) to (B, before + L + behind) by what is never padding."""
    return F.pad(mask, (before, behind), value=True)


def _gather(sequence: Tensor, positions: Tensor) -> Tensor:
    """Take from sequence (B, M, D) each sample's own positions (B, K)."""
    return sequence.gather(1, positions[..., None].expand(-1, -1, sequence.shape[-1]))


def _product(shape: tuple[int, int]) -> str:
    return f"{shape[0]} x {shape[1]} = {shape[0] * shape[1]}"


FUSIONS = {"cross_attention": LateFusion, "gated": LateFusion, "prefix": PrefixFusion}
