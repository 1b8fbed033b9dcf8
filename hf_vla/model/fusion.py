"""Fusion: how view tokens, text and robot state meet in a context of one vector for each step of the chunk.

Letters: B batch, V views, g grid side after pooling, N = V·g² view tokens, L text tokens, D LLaMA width, C VGGT width
(outputs are 2C), T chunk, S state dims, F fusion width.
"""

import torch
from torch import Tensor, nn

from .blocks import CrossBlock
from .configuration_vla import VLAConfig


class CrossAttentionFusion(nn.Module):
    """Late fusion: learned action queries read view tokens, text states and robot state; LLaMA reads text only."""

    def __init__(self, config: VLAConfig):
        super().__init__()
        fusion, width = config.fusion_config, config.fusion_config.hidden_size
        self.views = ViewTokens(config, width)
        self.text = Projection(config.text_config.hidden_size, width)
        self.state = nn.Linear(config.state_dim, width)
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
        text = self.text(text_features)
        views = self._look(self.views(view_features), text, text_mask)
        context = torch.cat([views, text, self._state_token(state)], dim=1)
        context = self.context_norm(context)
        mask = _pad(text_mask, before=views.shape[1], behind=1)
        x = self.queries.weight.expand(len(context), -1, -1)
        for block in self.blocks:
            x = block(x, context, mask)
        return self.norm(x)

    def _look(self, views: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        return views

    def _state_token(self, state: Tensor) -> Tensor:
        return self.state(state.to(self.state.weight.dtype))[:, None]


class ViewTokens(nn.Module):
    """Project pooled view features and say where each token comes from: which view, which place of the grid."""

    def __init__(self, config: VLAConfig, width: int):
        super().__init__()
        self.project = Projection(2 * config.vggt_config.embed_dim, width)
        self.view = nn.Embedding(config.num_views, width)
        self.place = nn.Embedding(config.pool_grid**2, width)

    def forward(self, view_features: Tensor) -> Tensor:
        """Map (B, V, g², 2C) to (B, N, width), view after view."""
        tokens = self.project(view_features) + self.view.weight[:, None] + self.place.weight
        return tokens.flatten(1, 2)


class Projection(nn.Module):
    """Norm and linear map of a backbone's features, whose scale is the backbone's own affair, in the fusion's dtype."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(in_dim)
        self.linear = nn.Linear(in_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_dim) to (..., out_dim)."""
        return self.linear(self.norm(x.to(self.norm.weight.dtype)))


def _pad(mask: Tensor, before: int, behind: int) -> Tensor:
    """Widen mask (B, L) to (B, before + L + behind) by what may always be read."""
    return nn.functional.pad(mask, (before, behind), value=True)


FUSIONS = {"cross_attention": CrossAttentionFusion}
