"""The transformer block that fusion and flow head are built from.

Letters: B batch, Q queries, K keys, F width.
"""

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

MLP_RATIO = 4


class Attention(nn.Module):
    """Multi-head attention of one sequence to another, or to itself."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"A width of {dim} can't be split into {num_heads} heads.")
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """Let x (B, Q, F) read context (B, K, F); mask (B, K) is True where a key may be read."""
        q, k, v = (_split_heads(t, self.num_heads) for t in (self.q(x), *self.kv(context).chunk(2, dim=-1)))
        mask = None if mask is None else mask[:, None, None]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(mixed.transpose(1, 2).flatten(2))


class SelfBlock(GradientCheckpointingLayer):
    """Pre-norm block: a sequence mixes with itself, then passes an MLP."""

    def __init__(self, dim: int, num_heads: int, dropout: float = 0.0):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attention = Attention(dim, num_heads)
        self.mlp = make_mlp(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Transform x (B, Q, F); mask (B, Q) is True where a position may be read."""
        h = self.norm(x)
        x = x + self.dropout(self.attention(h, h, mask))
        return x + self.dropout(self.mlp(x))


class CrossBlock(GradientCheckpointingLayer):
    """Pre-norm block: queries read the context, mix with each other, then pass an MLP.

    They read first: before the first reading they have nothing to tell each other.
    """

    def __init__(self, dim: int, num_heads: int, dropout: float = 0.0):
        super().__init__()
        self.self_norm = nn.LayerNorm(dim)
        self.self_attention = Attention(dim, num_heads)
        self.cross_norm = nn.LayerNorm(dim)
        self.cross_attention = Attention(dim, num_heads)
        self.mlp = make_mlp(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """Transform x (B, Q, F) by context (B, K, F); mask (B, K) is True where the context may be read."""
        x = x + self.dropout(self.cross_attention(self.cross_norm(x), context, mask))
        h = self.self_norm(x)
        x = x + self.dropout(self.self_attention(h, h))
        return x + self.dropout(self.mlp(x))


def make_mlp(dim: int, out: int | None = None) -> nn.Sequential:
    """Build norm, widening layer, GELU and narrowing layer: a residual branch of width `dim`, or a map to `out`."""
    return nn.Sequential(
        nn.LayerNorm(dim), nn.Linear(dim, MLP_RATIO * dim), nn.GELU(), nn.Linear(MLP_RATIO * dim, out or dim)
    )


def _split_heads(x: Tensor, num_heads: int) -> Tensor:
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)
