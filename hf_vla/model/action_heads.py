"""Action heads: from the fusion's context to a chunk of actions, in normalised space.

Every head has `draws`, `loss` and `sample`. `draws` stands apart from `loss` because a batch that didn't fit is run again in
pieces, and the pieces must see the very numbers that the whole batch would have seen. Every loss is a sum over valid entries
(steps x dimensions) in float32, so that pieces add up; the model divides.

Letters: B batch, T chunk, A action dims, F fusion width, H head width, K bins, M training actions.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import SelfBlock, make_mlp
from .configuration_vla import HeadConfig, VLAConfig

HEAD_DIM = 64
"""Width of an attention head of `flow`."""

PERIODS = (4e-3, 4.0)
"""Shortest and longest wave of the time embedding of `flow`, whose times lie between 0 and 1; as in pi0."""

FIRST_TIME = 1e-3
"""`flow` trains no closer to finished actions than this; as in pi0."""


class L1Head(nn.Module):
    """Regress the whole chunk at once under an L1 loss, whose optimum is the median of what experts did."""

    def __init__(self, config: VLAConfig):
        super().__init__()
        self.trunk = ResidualMLP(config.view_fusion_config.hidden_size, config.head_config)
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
        return _sum_valid((self.sample(context) - actions.float()).abs(), action_is_pad)

    forward = loss  # hooks (memory trace, sharding) run around forward only

    def sample(self, context: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Predict (B, T, A) float32 from context (B, T, F)."""
        return self.out(self.trunk(context)).float()


class FlowHead(nn.Module):
    """Flow matching: learn the velocity that carries noise to actions, and act by following it in N Euler steps.

    Convention of openpi: at time t the sample is t·noise + (1 - t)·actions, so t = 1 is noise, t = 0 the actions, and the
    velocity is noise - actions. Times are drawn from Beta(1.5, 1), which favours the noisy end, where all is still to be
    decided. Padded steps aren't read by the others, so that what stands there can't move the loss.

    Source: arXiv 2410.24164 (pi0), section IV and appendix B.
    """

    def __init__(self, config: VLAConfig):
        super().__init__()
        head, width = config.head_config, config.head_config.hidden_size
        self.beta, self.num_steps = head.beta, head.num_inference_steps
        self.context = nn.Linear(config.view_fusion_config.hidden_size, width)
        self.action = nn.Linear(config.action_dim, width)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        num_heads = math.gcd(width, max(1, width // HEAD_DIM))
        self.blocks = nn.ModuleList(SelfBlock(width, num_heads) for _ in range(head.num_layers))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, config.action_dim)

    def draws(self, actions: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Draw noise (B, T, A) and a time (B,) for each of B samples."""
        return {
            "noise": _draw_normal(actions.shape, actions.device, generator),
            "time": FIRST_TIME + (1 - FIRST_TIME) * _draw_beta(len(actions), self.beta, actions.device, generator),
        }

    def loss(self, context: Tensor, actions: Tensor, action_is_pad: Tensor, draws: dict[str, Tensor]) -> Tensor:
        """Sum squared errors of the velocity over valid entries; arguments as `L1Head.loss`."""
        actions, noise, time = actions.float(), draws["noise"], draws["time"]
        t = time[:, None, None]
        is_read = ~action_is_pad | action_is_pad.all(dim=1, keepdim=True)  # attention to nothing at all would be NaN
        velocity = self._velocity(context, t * noise + (1 - t) * actions, time, is_read)
        return _sum_valid((velocity - (noise - actions)) ** 2, action_is_pad)

    forward = loss  # hooks (memory trace, sharding) run around forward only

    def sample(self, context: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Carry noise to actions (B, T, A) float32 under context (B, T, F)."""
        B, T = context.shape[:2]
        x = _draw_normal((B, T, self.out.out_features), context.device, generator)
        for step in range(self.num_steps):
            time = torch.full((B,), 1 - step / self.num_steps, device=context.device)
            x = x - self._velocity(context, x, time) / self.num_steps
        return x

    def _velocity(self, context: Tensor, noisy: Tensor, time: Tensor, is_read: Tensor | None = None) -> Tensor:
        dtype = self.context.weight.dtype
        embedded_time = self.time(_embed_time(time, self.context.out_features).to(dtype))
        x = self.context(context) + self.action(noisy.to(dtype)) + embedded_time[:, None]
        for block in self.blocks:
            x = block(x, is_read)
        return self.out(self.norm(x)).float()


class DiscreteHead(nn.Module):
    """Classify each entry into K quantile bins, all entries at once.

    A bin is known by its level, the median of the training actions in it; an action belongs to the nearest level. Levels
    rather than edges, because a gripper that is either open or shut then comes back exactly, where bins between edges
    would give something halfway. Levels are a buffer, and travel in the checkpoint.
    """

    def __init__(self, config: VLAConfig):
        super().__init__()
        self.trunk = ResidualMLP(config.view_fusion_config.hidden_size, config.head_config)
        self.out = nn.Linear(config.head_config.hidden_size, config.action_dim * config.head_config.num_bins)
        self.levels: Tensor
        self.register_buffer("levels", uniform_levels(config.action_dim, config.head_config.num_bins))

    def fit_levels(self, actions: Tensor) -> None:
        """Take the levels from training actions (M, A), normalised; once, before training."""
        quantiles = (torch.arange(self.levels.shape[1]) + 0.5) / self.levels.shape[1]
        ranks = (quantiles * len(actions)).long()
        self.levels.copy_(actions.float().sort(dim=0).values[ranks].T)

    def draws(self, actions: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return nothing: this loss has no randomness."""
        return {}

    def loss(self, context: Tensor, actions: Tensor, action_is_pad: Tensor, draws: dict[str, Tensor]) -> Tensor:
        """Sum cross-entropies over valid entries; arguments as `L1Head.loss`."""
        errors = F.cross_entropy(self._logits(context).movedim(-1, 1), self._bins(actions), reduction="none")
        return _sum_valid(errors, action_is_pad)

    forward = loss  # hooks (memory trace, sharding) run around forward only

    def sample(self, context: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Decode the likeliest level of each entry, (B, T, A) float32, from context (B, T, F)."""
        bins = self._logits(context).argmax(-1)
        return self.levels.float()[torch.arange(len(self.levels), device=bins.device), bins]

    def _logits(self, context: Tensor) -> Tensor:
        """Give (B, T, A, K) float32."""
        return self.out(self.trunk(context)).float().unflatten(-1, self.levels.shape)

    def _bins(self, actions: Tensor) -> Tensor:
        """Give the nearest level's index (B, T, A) of actions (B, T, A)."""
        levels = self.levels.float()
        borders = (levels[:, 1:] + levels[:, :-1]) / 2
        by_dim = actions.float().flatten(0, 1).T.contiguous()
        return torch.searchsorted(borders, by_dim).T.unflatten(0, actions.shape[:2])


def uniform_levels(action_dim: int, num_bins: int) -> Tensor:
    """Spread levels (A, K) evenly over [-1, 1], for actions that are still unknown."""
    return ((torch.arange(num_bins) + 0.5) / num_bins * 2 - 1).repeat(action_dim, 1)


class ResidualMLP(nn.Module):
    """Residual MLP blocks on each step alone, from the fusion's width to a normed vector of the head's."""

    def __init__(self, in_dim: int, config: HeadConfig):
        super().__init__()
        self.project = nn.Linear(in_dim, config.hidden_size)
        self.blocks = nn.ModuleList(make_mlp(config.hidden_size) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, F) to (B, T, H)."""
        x = self.project(x)
        for block in self.blocks:
            x = x + block(x)
        return self.norm(x)


def _sum_valid(errors: Tensor, action_is_pad: Tensor) -> Tensor:
    """Sum errors (B, T, A) over the steps that aren't padding."""
    return errors.masked_fill(action_is_pad[..., None], 0).sum()


def _embed_time(time: Tensor, width: int) -> Tensor:
    """Embed times (B,) in [0, 1] as waves (B, width)."""
    shortest, longest = PERIODS
    exponents = torch.linspace(0, 1, width // 2, device=time.device)
    angles = 2 * math.pi * time[:, None] / (shortest * (longest / shortest) ** exponents)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def _draw_normal(shape: tuple[int, ...], device: torch.device, generator: torch.Generator | None) -> Tensor:
    where = device if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=where).to(device)


def _draw_beta(
    size: int, beta: tuple[float, float], device: torch.device, generator: torch.Generator | None
) -> Tensor:
    where = device if generator is None else generator.device
    # torch.distributions.Beta calls this very function, but takes no generator.
    # Filled there: a tensor made of numbers is a copy from the host, which waits for the GPU.
    parameters = torch.stack([torch.full((size,), value, device=where) for value in beta], dim=1)
    return torch._sample_dirichlet(parameters, generator=generator)[:, 0].to(device)


HEADS = {"l1": L1Head, "flow": FlowHead, "discrete": DiscreteHead}
