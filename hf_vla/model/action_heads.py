"""Action heads: from the fusion's context to a chunk of actions, in normalised space.

Every head has `draws`, `loss` and `sample`. `draws` stands apart from `loss` because a batch that didn't fit is run again in
pieces, and the pieces must see the very numbers that the whole batch would have seen.

Letters: B batch, T chunk, A action dims, F fusion width, H head width, K bins.
"""


import torch
from torch import Tensor, nn

from .blocks import make_mlp
from .configuration_vla import VLAConfig

HEAD_DIM = 64
"""Width of an attention head of `flow`, where the head's width allows."""


class L1Head(nn.Module):
    """Regress the whole chunk at once under an L1 loss, whose optimum is the median of what experts did."""

    def __init__(self, config: VLAConfig):
        super().__init__()
        self.trunk = ResidualMLP(config.fusion_config.hidden_size, config.head_config)
        self.out = nn.Linear(config.head_config.hidden_size, config.action_dim)

    def draws(self, actions: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return nothing: this loss has no randomness."""
        return {}

    def loss(self, context: Tensor, actions: Tensor, action_is_pad: Tensor, draws: dict[str, Tensor]) -> Tensor:
        """Sum |prediction - action| over valid entries.

        Args:
            context: (B, T, F) of the fusion.
            actions: (B, T, A), normalised.
            action_is_pad: (B, T) bool, True where an entry doesn't count.
            draws: what `draws` returned for these samples.

        Returns:
            Scalar, float32.
        """
        errors = (self._predict(context) - actions.float()).abs()
        return sum_valid(errors, action_is_pad)

    forward = loss  # a module's hooks (memory trace, sharding) run around forward only

    def sample(self, context: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Predict (B, T, A) float32 from context (B, T, F)."""
        return self._predict(context)

    def _predict(self, context: Tensor) -> Tensor:
        return self.out(self.trunk(context)).float()


class ResidualMLP(nn.Module):
    """Residual MLP blocks on each step alone, from the fusion's width to a normed vector of the head's."""

    def __init__(self, in_dim: int, head_config):
        super().__init__()
        self.project = nn.Linear(in_dim, head_config.hidden_size)
        self.blocks = nn.ModuleList(make_mlp(head_config.hidden_size) for _ in range(head_config.num_layers))
        self.norm = nn.LayerNorm(head_config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, F) to (B, T, H)."""
        x = self.project(x)
        for block in self.blocks:
            x = x + block(x)
        return self.norm(x)


def sum_valid(errors: Tensor, action_is_pad: Tensor) -> Tensor:
    """Sum errors (B, T, A) over the steps that aren't padding; a scalar, float32."""
    return errors.float().masked_fill(action_is_pad[..., None], 0).sum()


HEADS = {"l1": L1Head}
