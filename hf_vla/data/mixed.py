"""Several datasets as one: a policy trained on all of them, with each one's own statistics, or one set that covers them.

Letters: S state dims, A action dims.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import numpy as np
from torch.utils.data import ConcatDataset

from hf_vla.data.lerobot_format import DatasetInfo, Episode
from hf_vla.data.order import Part
from hf_vla.data.streaming import StreamedDataset
from hf_vla.data.windows import Window, WindowDataset
from hf_vla.sample import Sample


@dataclass
class MixedInfo:
    """What several datasets are together; names and rate are the first one's."""

    infos: list[DatasetInfo]
    shares: list[float]
    """Of the draws, 1 together."""

    def __post_init__(self):
        self.name = " + ".join(info.name for info in self.infos)
        self.cameras, self.action_names = self.infos[0].cameras, self.infos[0].action_names
        self.fps = self.infos[0].fps
        self.left_out = tuple(fault for info in self.infos for fault in info.left_out)
        self.state_dim, self.action_dim = self.infos[0].state_dim, self.infos[0].action_dim
        self.episodes = tuple(episode for info in self.infos for episode in info.episodes)
        _check_names(self.infos)

    @cached_property
    def stats_by_name(self) -> dict[str, dict[str, dict[str, np.ndarray]]]:
        """Give each dataset's own statistics by its name, which is the `source` of its samples."""
        return {info.name: info.stats for info in self.infos}

    @cached_property
    def stats(self) -> dict[str, dict[str, np.ndarray]]:
        """Merge the datasets' statistics, each with the weight of its share of the draws.

        Mean and std are those of the mixture; the range covers every dataset's, and so do q01 and q99: quantiles can't be
        merged exactly, and a range too wide cuts off none of them.
        """
        return {key: merge_stats([info.stats[key] for info in self.infos], self.shares) for key in self.infos[0].stats}


class MixedDataset(ConcatDataset):
    """Datasets one behind the other, indexed as `Order` does.

    Args:
        datasets: of the same views, chunk size and dimensions.
        weights: of each, or None for each to count by its samples.

    Raises:
        ValueError: where they differ in the number of views, or of dimensions.
    """

    def __init__(self, datasets: Sequence[WindowDataset | StreamedDataset], weights: Sequence[float | None]):
        super().__init__(datasets)
        self.parts: tuple[Part, ...] = tuple(
            replace(dataset.part, weight=weight) for dataset, weight in zip(datasets, weights, strict=True)
        )
        for what, count in (
            ("views", lambda d: len(d.views)),
            ("state dimensions", lambda d: d.info.state_dim),
            ("action dimensions", lambda d: d.info.action_dim),
        ):
            found = [(d.info.name, count(d)) for d in datasets]
            if len({number for _, number in found}) > 1:
                raise ValueError(
                    f"data.mixture: the datasets differ in their {what}: "
                    f"{', '.join(f'{name} has {number}' for name, number in found)}. One policy takes one number."
                )
        sizes = [part.weight or len(part) for part in self.parts]
        self.info = MixedInfo([d.info for d in datasets], [size / sum(sizes) for size in sizes])
        self.views, self.chunk_size = datasets[0].views, datasets[0].chunk_size
        self.episodes: list[Episode] = [episode for d in datasets for episode in d.episodes]

    def __getitem__(self, i: int) -> Sample:
        if not 0 <= i < len(self):
            raise IndexError(f"Sample {i} of {len(self)}.")
        return super().__getitem__(i)

    @property
    def tasks(self) -> list[str]:
        """Give the instruction of every sample."""
        return [task for dataset in self.datasets for task in dataset.tasks]

    @property
    def sources(self) -> list[str]:
        """Name the dataset of every sample."""
        return [dataset.info.name for dataset in self.datasets for _ in range(len(dataset))]

    @property
    def states(self) -> np.ndarray:
        """Give the state of every sample, (n, S) float32; of streamed datasets, `numbers` has them."""
        return np.concatenate([dataset.states for dataset in self.datasets])

    @property
    def actions(self) -> np.ndarray:
        """Give the first action of every sample, (n, A) float32; of streamed datasets, `numbers` has them."""
        return np.concatenate([dataset.actions for dataset in self.datasets])

    def locate(self, i: int) -> tuple[Episode, int]:
        """Say which episode sample `i` is from, and at which of its frames."""
        d = int(np.searchsorted(self.cumulative_sizes, i, side="right"))
        return self.datasets[d].locate(i - self._starts[d])

    def numbers(self) -> "MixedDataset":
        """Give its states, actions and instructions in memory, without pictures; see `StreamedDataset.numbers`."""
        return MixedDataset([d.numbers() for d in self.datasets], [part.weight for part in self.parts])

    def windows(self, indices: Sequence[int]) -> Window:
        """Cut states and action chunks of many samples, without their pictures."""
        indices = np.asarray(indices)
        owners = np.searchsorted(self.cumulative_sizes, indices, side="right")
        rows, parts = [], []
        for d in np.unique(owners):
            rows.append(np.flatnonzero(owners == d))
            parts.append(self.datasets[d].windows(indices[rows[-1]] - self._starts[d]))
        back = np.argsort(np.concatenate(rows))
        return Window(*(np.concatenate(columns)[back] for columns in zip(*parts, strict=True)))

    @property
    def _starts(self) -> list[int]:
        return [0, *accumulate(len(dataset) for dataset in self.datasets)]


def _check_names(infos: Sequence[DatasetInfo]) -> None:
    """Refuse two datasets of one name: whose units a policy acts in is said by name."""
    roots: dict[str, str] = {}
    for info in infos:
        if roots.setdefault(info.name, str(info.root)) != str(info.root):
            raise ValueError(
                f"data.mixture: two datasets are named {info.name!r}, {roots[info.name]} and {info.root}, and a policy "
                "keeps statistics by name: rename one's folder."
            )


def merge_stats(stats: Sequence[dict[str, np.ndarray]], shares: Sequence[float]) -> dict[str, np.ndarray]:
    """Merge statistics of one key, (D,) each, by the share of each dataset; see `MixedInfo.stats`."""
    weights = np.asarray(shares, np.float64)[:, None]
    columns = {name: np.stack([np.asarray(s[name], np.float64) for s in stats]) for name in stats[0]}
    mean = (weights * columns["mean"]).sum(0)
    variance = (weights * (columns["std"] ** 2 + (columns["mean"] - mean) ** 2)).sum(0)
    merged = {name: values.min(0) if name in ("min", "q01") else values.max(0) for name, values in columns.items()}
    merged |= {"mean": mean, "std": np.sqrt(variance)}
    return {name: values.astype(np.float32) for name, values in merged.items()}
