"""How good predictions and rollouts are: action errors in physical units, success rates with their intervals.

Letters: n windows, T chunk length, A action dims.
"""

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import evaluate
import numpy as np
from datasets import Features, Value
from datasets import Sequence as ListOf

from hf_vla.console import passing_progress
from hf_vla.data.windows import WindowDataset
from hf_vla.rollout.baselines import BASELINES, commands_position
from hf_vla.sample import Sample

logger = logging.getLogger(__name__)

Z_95 = 1.959963984540054
"""Half-width of the central 95 % of a normal distribution, in standard deviations."""


class _InMemoryMetric(evaluate.Metric):
    """A metric of our own class: made without the Hub, and computed without a file."""

    def __init__(self, **kwargs):
        super().__init__(keep_in_memory=True, **kwargs)

    def _build_data_dir(self) -> str:
        # evaluate 0.4.6 makes a cache folder in the user's home even where everything is kept in memory.
        return ""


class ActionError(_InMemoryMetric):
    """Absolute and root-mean-square error of action chunks, a dimension at a time, over steps that aren't padding.

    `compute(predictions=(n, T, A), references=(n, T, A), action_is_pad=(n, T))` gives `mae` and `rmse`, A numbers each,
    and their means over dimensions as `mean_mae` and `mean_rmse`, in the units of the actions.
    """

    def _info(self) -> evaluate.MetricInfo:
        chunk = ListOf(ListOf(Value("float32")))
        features = {"predictions": chunk, "references": chunk, "action_is_pad": ListOf(Value("bool"))}
        return _describe("Error of predicted action chunks in physical units.", features)

    def _compute(self, predictions, references, action_is_pad) -> dict[str, Any]:
        valid = ~np.array(action_is_pad, bool)
        error = np.array(predictions, np.float64)[valid] - np.array(references, np.float64)[valid]
        mae, rmse = np.abs(error).mean(0), np.sqrt((error**2).mean(0))
        return {
            "mae": mae.tolist(),
            "rmse": rmse.tolist(),
            "mean_mae": float(mae.mean()),
            "mean_rmse": float(rmse.mean()),
        }


class GripperAccuracy(_InMemoryMetric):
    """Share of steps at which predicted and recorded gripper commands lie on the same side of a threshold.

    `compute(predictions=(n,), references=(n,), threshold=0.0)` gives `gripper_accuracy`.
    """

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": Value("float32"), "references": Value("float32")}
        return _describe("Agreement of predicted and recorded gripper commands.", features)

    def _compute(self, predictions, references, threshold: float = 0.0) -> dict[str, float]:
        same_side = (np.array(predictions) > threshold) == (np.array(references) > threshold)
        return {"gripper_accuracy": float(same_side.mean())}


class SuccessRate(_InMemoryMetric):
    """Share of rollouts that succeeded, with Wilson's 95 % interval.

    `compute(predictions=(n,) bool)` gives `successes`, `episodes`, `success_rate` and `interval`.
    """

    def _info(self) -> evaluate.MetricInfo:
        return _describe("Success rate of rollouts, with its 95 % interval.", {"predictions": Value("bool")})

    def _compute(self, predictions) -> dict[str, Any]:
        successes, episodes = int(np.sum(predictions)), len(predictions)
        return {
            "successes": successes,
            "episodes": episodes,
            "success_rate": successes / episodes,
            "interval": wilson_interval(successes, episodes),
        }


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """Give the 95 % interval of a success probability, from `successes` of `n` trials.

    Raises:
        ValueError: where `n` is 0, or less than `successes`.

    Source: Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927), 209-212.
    """
    if not 0 <= successes <= n or n == 0:
        raise ValueError(
            f"{successes} successes of {n} trials: expected one trial or more, and no more successes than trials."
        )
    share, z2 = successes / n, Z_95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(share * (1 - share) * z2 / n + z2**2 / (4 * n**2)) / (1 + z2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def difference_interval(successes: int, n: int, other_successes: int, other_n: int) -> tuple[float, float]:
    """Give the 95 % interval of the first success probability less the second, of independent trials.

    Source: Newcombe, Interval estimation for the difference between independent proportions, Statistics in Medicine 17
    (1998), 873-890, method 10.
    """
    p, q = successes / n, other_successes / other_n
    p_low, p_high = wilson_interval(successes, n)
    q_low, q_high = wilson_interval(other_successes, other_n)
    return p - q - math.hypot(p - p_low, q_high - q), p - q + math.hypot(p_high - p, q - q_low)


def offline_report(
    predict: Callable[[list[Sample]], np.ndarray],
    held_out: WindowDataset | None,
    train: WindowDataset,
    max_windows: int = 1024,
    batch_size: int = 32,
    on_error: str = "raise",
) -> dict[str, Any]:
    """Measure a policy and three baselines on the same held-out windows.

    Args:
        predict: samples to action chunks (B, T, A) in physical units.
        held_out: the windows measured on, spread evenly over its episodes if there are more than `max_windows`.
        train: what the baselines know.
        max_windows: windows measured on, at most.
        batch_size: samples that `predict` is given at once.
        on_error: `raise`, or `skip` to leave out windows that can't be read.

    Returns:
        `names` of the dimensions; `policy`, `mean_action`, `hold_still` and `nearest_state`, each with `mae` and `rmse` of
        every dimension, their means, `mean_scaled_mae` (of each dimension's over its training std) and `gripper_accuracy`
        (None where no dimension is a gripper); `hold_still_at_state`, the dimensions that command a position; `windows`
        and `episodes` measured on, the windows `left_out`, and `train_left_out`, the episodes that the baselines don't know.

    Raises:
        ValueError: where nothing is held out or can be read, or the policy predicts chunks of another shape.
    """
    if held_out is None:
        raise ValueError("Nothing is held out to measure on: set data.eval_fraction above 0, or record more episodes.")
    chosen = np.unique(np.linspace(0, len(held_out) - 1, max_windows).round().astype(int))
    chunks, indices = _predict_all(predict, held_out, chosen, batch_size, on_error)
    predictions = {"policy": chunks}
    train = train.numbers()
    predictions |= {name: baseline(train, held_out, indices) for name, baseline in BASELINES.items()}
    names = held_out.info.action_names
    return {
        "names": names,
        **{name: _errors(chunks, held_out, indices, train) for name, chunks in predictions.items()},
        "hold_still_at_state": [
            name for name, is_position in zip(names, commands_position(train), strict=True) if is_position
        ],
        "windows": len(indices),
        "episodes": len(held_out.episodes),
        "left_out": len(chosen) - len(indices),
        "train_left_out": len(train.info.left_out),
    }


def read_windows(dataset: WindowDataset, indices: Iterable[int], on_error: str = "raise") -> dict[int, Sample]:
    """Read windows; one that can't be read is an error, or said and left out where `on_error` is `skip`."""
    found = {}
    for i in map(int, indices):
        try:
            found[i] = dataset[i]
        except (ValueError, OSError) as error:
            if on_error == "raise":
                raise
            logger.warning("A held-out sample was left out (data.on_error): %s", error)
    return found


def _predict_all(
    predict: Callable, dataset: WindowDataset, indices: np.ndarray, batch_size: int, on_error: str
) -> tuple[np.ndarray, np.ndarray]:
    """Give predicted chunks (n, T, A), and which of the windows could be read, (n,)."""
    predicted, read = [], []
    with passing_progress() as progress:
        for start in progress.track(range(0, len(indices), batch_size), description="Measuring on held-out windows"):
            if found := read_windows(dataset, indices[start : start + batch_size], on_error):
                predicted.append(np.asarray(predict(list(found.values()))))
                read += found
    if not read:
        raise ValueError(f"{dataset.info.name}: none of {len(indices)} held-out samples can be read to measure on.")
    chunks, indices = np.concatenate(predicted), np.array(read)
    expected = (len(indices), dataset.chunk_size, dataset.info.action_dim)
    if chunks.shape != expected:
        raise ValueError(
            f"The policy predicts chunks of shape {chunks.shape[1:]}, but the dataset's are {expected[1:]} (T, A)."
        )
    return chunks, indices


def _errors(chunks: np.ndarray, held_out: WindowDataset, indices: np.ndarray, train: WindowDataset) -> dict[str, Any]:
    recorded = held_out.windows(indices)
    errors = ActionError().compute(
        predictions=chunks, references=recorded.actions, action_is_pad=recorded.action_is_pad
    )
    std = train.actions.std(0)
    moving = std > 0
    errors["mean_scaled_mae"] = float((np.asarray(errors["mae"])[moving] / std[moving]).mean())
    gripper = gripper_dimension(held_out.info.action_names)
    if gripper is None:
        return {**errors, "gripper_accuracy": None}
    valid = ~recorded.action_is_pad
    accuracy = GripperAccuracy().compute(
        predictions=chunks[valid][:, gripper],
        references=recorded.actions[valid][:, gripper],
        threshold=float((train.actions[:, gripper].min() + train.actions[:, gripper].max()) / 2),
    )
    return {**errors, **accuracy}


def gripper_dimension(names: Sequence[str]) -> int | None:
    """Find the gripper among the dimensions of an action: by its name, or the last where dimensions have only numbers."""
    named = [i for i, name in enumerate(names) if "grip" in name.lower()]
    if named:
        return named[-1]
    return len(names) - 1 if names[-1] == f"action_{len(names) - 1}" else None


def _describe(description: str, features: dict[str, Any]) -> evaluate.MetricInfo:
    return evaluate.MetricInfo(
        description=description, citation="", inputs_description="", features=Features(features)
    )
