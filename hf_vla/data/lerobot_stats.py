"""The statistics that a LeRobotDataset v3.0 keeps of each episode and of the whole, in the very form of its files.

Letters: N rows, D dimensions, H W pixels.
"""

import numpy as np

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}

_FEW_PIXELS = 150
"""Side that a large picture is thinned out to before its pixels are counted."""


def vector_stats(values: np.ndarray) -> dict[str, list]:
    """Compute the statistics of (N, D) numbers: lists of D floats, `count` the number of rows; quantiles are exact."""
    values = values.astype(np.float64)  # float32 loses the std of a large offset
    stats = {"min": values.min(0), "max": values.max(0), "mean": values.mean(0), "std": values.std(0)}
    quantiles = np.quantile(values, list(QUANTILES.values()), axis=0)
    stats |= dict(zip(QUANTILES, quantiles, strict=True))
    return {name: value.tolist() for name, value in stats.items()} | {"count": [len(values)]}


class PictureStats:
    """Statistics of pictures, by counting each value of each channel: exact for what was counted, and small."""

    def __init__(self):
        self._counts = np.zeros((3, 256), np.int64)
        self._pictures = 0

    def add(self, picture: np.ndarray) -> None:
        """Count the pixels of one (H, W, 3) uint8 picture."""
        stride = max(1, max(picture.shape[:2]) // _FEW_PIXELS)
        pixels = picture[::stride, ::stride].reshape(-1, 3)
        self._counts += np.stack([np.bincount(pixels[:, channel], minlength=256) for channel in range(3)])
        self._pictures += 1

    def merge(self, other: "PictureStats") -> None:
        """Count what another has counted, too."""
        self._counts += other._counts
        self._pictures += other._pictures

    def stats(self) -> dict[str, list]:
        """Return the statistics in [0, 1] with LeRobot's shape (3, 1, 1); `count` is the number of pictures."""
        values = np.arange(256) / 255
        share = self._counts / self._counts.sum(1, keepdims=True)
        mean = share @ values
        results = {
            "min": values[(share > 0).argmax(1)],
            "max": values[255 - (share[:, ::-1] > 0).argmax(1)],
            "mean": mean,
            "std": np.sqrt((share * (values - mean[:, None]) ** 2).sum(1)),
        }
        for name, quantile in QUANTILES.items():
            results[name] = values[(share.cumsum(1) >= quantile - 1e-12).argmax(1)]
        return {name: result.reshape(3, 1, 1).tolist() for name, result in results.items()} | {
            "count": [self._pictures]
        }
