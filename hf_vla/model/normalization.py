"""Statistics of states and actions, and the affine map between physical units and the model's.

Letters: D dimensions of a state or an action.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

MODES = ("mean_std", "min_max", "q01_q99")

FLOOR = 0.01
"""Smallest scale of a dimension, relative to its own size; see `Stats.scale`."""


@dataclass(frozen=True)
class Stats:
    """Per-dimension statistics of one key of a dataset, (D,) float32 each, in physical units.

    LeRobot v2 datasets have no quantiles; `q01` and `q99` are None there.
    """

    mean: Tensor
    std: Tensor
    min: Tensor
    max: Tensor
    q01: Tensor | None = None
    q99: Tensor | None = None

    @classmethod
    def from_dict(cls, values: Mapping, key: str = "stats") -> "Stats":
        """Read the lists of a dataset's `stats.json`; what else is there (`count`, other quantiles) is left out.

        Args:
            values: name of a statistic to D numbers.
            key: what the statistics are of, for messages.

        Raises:
            ValueError: if a statistic is missing, isn't finite, or has another number of dimensions than the mean.
        """
        missing = [name for name in ("mean", "std", "min", "max") if name not in values]
        if missing:
            raise ValueError(f"The statistics of {key} lack {', '.join(missing)}; recompute the dataset's stats.json.")
        names = [name for name in cls.__dataclass_fields__ if values.get(name) is not None]
        stats = {name: torch.as_tensor(values[name], dtype=torch.float32).flatten() for name in names}
        for name, value in stats.items():
            if len(value) != len(stats["mean"]) or not value.isfinite().all():
                raise ValueError(
                    f"{name} of {key} must be {len(stats['mean'])} finite numbers, as mean has; it is {value.tolist()}."
                )
        return cls(**stats)

    def to_dict(self) -> dict[str, list[float]]:
        """Give the statistics as lists, for JSON."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: value.tolist() for name, value in values.items() if value is not None}

    def __len__(self) -> int:
        return len(self.mean)

    def center(self, mode: str) -> Tensor:
        """Give what is mapped to 0: the mean, or the middle of the range."""
        if mode == "mean_std":
            return self.mean
        low, high = self._range(mode)
        return (low + high) / 2

    def scale(self, mode: str) -> Tensor:
        """Give what is mapped to 1: the standard deviation, or half of the range; never near zero.

        A dimension that hardly moves must not explode (its noise blown up to the size of a signal) nor vanish (its rare
        moves lost), so the scale has a floor relative to the dimension itself:

        - where the bulk moves by less than 1 % of the full range (a gripper that seldom closes has q01 = q99), all that
          moves is the tail, and half of the full range is the scale;
        - the scale is at least 1 % of the largest magnitude, so that a dead dimension's noise stays noise;
        - a dimension that is always 0 says nothing of its size, and is left in its own units.
        """
        half_range = (self.max - self.min) / 2
        low, high = self._range(mode) if mode != "mean_std" else (-self.std, self.std)
        scale = (high - low) / 2
        scale = torch.where(scale < FLOOR * half_range, half_range, scale)
        scale = torch.maximum(scale, FLOOR * torch.maximum(self.min.abs(), self.max.abs()))
        return torch.where(scale == 0, 1.0, scale)

    def _range(self, mode: str) -> tuple[Tensor, Tensor]:
        if mode == "min_max":
            return self.min, self.max
        if mode != "q01_q99":
            raise ValueError(f"Unknown normalization {mode!r}; allowed: {', '.join(MODES)}.")
        if self.q01 is None or self.q99 is None:
            raise ValueError(
                "The dataset's statistics have no q01 and q99: recompute its stats.json, "
                "or set data.normalization to mean_std or min_max."
            )
        return self.q01, self.q99


def normalize(x: Tensor, stats: Stats, mode: str) -> Tensor:
    """Map physical values to the model's.

    Args:
        x: (..., D) float32 in physical units.
        stats: statistics of these D dimensions.
        mode: `mean_std` to mean 0 and deviation 1; `min_max` and `q01_q99` map that range to [-1, 1]. Nothing is clipped.

    Returns:
        (..., D) float32; `unnormalize` gives x back.
    """
    return (x - stats.center(mode).to(x.device)) / stats.scale(mode).to(x.device)


def unnormalize(x: Tensor, stats: Stats, mode: str) -> Tensor:
    """Map the model's values back to physical ones; the inverse of `normalize`, with the same arguments."""
    return x * stats.scale(mode).to(x.device) + stats.center(mode).to(x.device)
