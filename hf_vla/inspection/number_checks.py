"""What states and actions say about themselves: gaps, dimensions that hardly move, outliers, jumps, commands that lead.

Letters: N rows, D dimensions. Episodes are slices of the rows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from hf_vla.inspection.finding import Finding, some

DEAD = 0.05
"""Share of the liveliest dimension's std, under which a dimension hardly moves."""
FAR = 5.0
"""Widths between q01 and q99 beyond these, from which a value counts as out of range."""
JUMP = 0.5
"""Share of the width between q01 and q99 that no state changes by in one step, if steps are a tenth of that as a rule."""
MOSTLY = 0.2
"""Share of rows under which a gripper is between open and closed by exception."""
LEAD = 30
"""Steps that a command is looked for ahead of the state."""


@dataclass(frozen=True)
class Vector:
    """One column of vectors."""

    key: str
    names: Sequence[str]
    values: np.ndarray
    """(N, D)."""
    episodes: Sequence[tuple[object, slice]]
    """What each episode is called, and its rows."""

    def where(self, row: int) -> str:
        """Say which episode and frame a row is."""
        name, rows = next((name, rows) for name, rows in self.episodes if rows.start <= row < rows.stop)
        return f"episode {name}, frame {row - rows.start}"


def check_vector(vector: Vector) -> Iterator[Finding]:
    """Look at one column by itself."""
    yield from _not_finite(vector)
    finite = np.isfinite(vector.values).all(1)
    if finite.sum() < 2:
        return
    values = vector.values[finite].astype(np.float64)
    yield from _hardly_moving(vector, values)
    yield from _out_of_range(vector, values)


def _not_finite(vector: Vector) -> Iterator[Finding]:
    bad = ~np.isfinite(vector.values).all(1)
    if bad.any():
        names = [name for name, rows in vector.episodes if bad[rows].any()]
        yield Finding(
            "error",
            "nan",
            f"{vector.key}: {int(bad.sum())} of {len(bad)} rows aren't finite numbers, in episodes "
            f"{some(names)}; first in "
            f"{vector.where(int(bad.argmax()))}. Training refuses them.",
        )


def _hardly_moving(vector: Vector, values: np.ndarray) -> Iterator[Finding]:
    std = values.std(0)
    is_gripper = np.array([is_hand(name, d, len(std)) for d, name in enumerate(vector.names)])
    liveliest = std[~is_gripper].max(initial=0.0)
    constant = [name for name, spread in zip(vector.names, np.ptp(values, axis=0), strict=True) if spread == 0]
    still = [n for n, s, g in zip(vector.names, std, is_gripper, strict=True) if 0 < s < DEAD * liveliest and not g]
    if constant:
        yield Finding("warning", "constant", f"{vector.key}: always the same number in {some(constant)}.")
    if still:
        yield Finding(
            "warning",
            "near_constant",
            f"{vector.key}: {some(still)} hardly move (std under {DEAD:.0%} of the liveliest dimension's, "
            f"{liveliest:.3g}). "
            "Divided by so small a std, a little more movement in other episodes becomes an error of many; the "
            f"processor's "
            "floor on the scale is what keeps that in bounds.",
        )


def is_hand(name: str, d: int, dimensions: int) -> bool:
    """Tell a gripper, by its name, or by its place where dimensions only have numbers."""
    numbered = name.rpartition("_")[2] == str(d)
    return "grip" in name.lower() or "finger" in name.lower() or (numbered and d == dimensions - 1)


def _out_of_range(vector: Vector, values: np.ndarray) -> Iterator[Finding]:
    low, high = np.quantile(values, [0.01, 0.99], axis=0)
    width = high - low
    beyond = np.maximum(values - high, low - values)
    for d in np.flatnonzero((beyond > FAR * width).any(0) & (width > 0)):
        count = int((beyond[:, d] > FAR * width[d]).sum())
        row = int(np.flatnonzero(vector.values[:, d] == values[beyond[:, d].argmax(), d])[0])
        yield Finding(
            "warning",
            "out_of_range",
            f"{vector.key}: {vector.names[d]} lies far out of its range in {count} of {len(values)} rows "
            f"({count / len(values):.2%}): {vector.values[row, d]:.4g} in {vector.where(row)}, where 98 % are "
            f"between {low[d]:.4g} and {high[d]:.4g}.",
        )


def check_jumps(vector: Vector) -> Iterator[Finding]:
    """Look for steps of a state that no robot makes."""
    low, high = np.nanquantile(vector.values, [0.01, 0.99], axis=0)
    width = high - low
    steps = [np.abs(np.diff(vector.values[rows], axis=0)) for _, rows in vector.episodes if rows.stop - rows.start > 1]
    if not steps:
        return
    usual = np.nanquantile(np.concatenate(steps), 0.9, axis=0)
    found = []
    for name, rows in vector.episodes:
        change = np.abs(np.diff(vector.values[rows], axis=0))
        jumps = (change > JUMP * width) & (usual < JUMP / 10 * width) & (width > 0)
        found += [(name, int(frame) + 1, vector.names[d]) for frame, d in zip(*np.nonzero(jumps), strict=True)]
    switches = {vector.names[d] for d in range(len(vector.names)) if len(np.unique(vector.values[:, d])) <= 3}
    found = [jump for jump in found if "grip" not in jump[2].lower() and jump[2] not in switches]
    if found:
        told = some([f"{name} at frame {frame} ({dim})" for name, frame, dim in found])
        yield Finding(
            "warning",
            "jump",
            f"{vector.key}: jumps by more than half of its range in one step, {len(found)} times: episode "
            f"{told}. Episodes "
            "that were joined, or a sensor that failed.",
        )


def check_commands(state: Vector, action: Vector) -> Iterator[Finding]:
    """Look at actions beside states: first commands that are none, and positions that are commanded ahead."""
    sizes = np.abs(np.nan_to_num(action.values))
    firsts = np.array([sizes[rows.start] for _, rows in action.episodes])
    none = (firsts < 1e-3 * np.quantile(sizes, 0.75, axis=0)).mean(0) > 0.8
    if len(firsts) > 1 and none.sum() > len(none) / 2:  # a gripper's command may be given from the start
        dims = [name for name, is_none in zip(action.names, none, strict=True) if is_none]
        yield Finding(
            "warning",
            "first_action_zero",
            f"{action.key}: the first action of episodes is zero in {some(dims)}: a command that was never "
            f"given. Leave the first "
            "frame out (drop_first: 1 in a convention).",
        )
    yield from _between(action)
    yield from _lead(state, action)


def _between(action: Vector) -> Iterator[Finding]:
    """Look for grippers that are commanded to open or close, but not always wholly."""
    for d, name in enumerate(action.names):
        values = action.values[np.isfinite(action.values[:, d]), d]
        low, high = values.min(initial=np.inf), values.max(initial=-np.inf)
        is_between = np.minimum(values - low, high - values) > 0.05 * (high - low)
        if is_hand(name, d, len(action.names)) and 0 < is_between.mean() < MOSTLY:
            yield Finding(
                "note",
                "gripper_between",
                f"{action.key}: {name} is {low:.3g} or {high:.3g} as a rule, and between them in {int(is_between.sum())} of "
                f"{len(values)} rows: no switch, as a gripper that only opens and closes takes. A convention's `settle` "
                "decides them.",
            )


def _lead(state: Vector, action: Vector) -> Iterator[Finding]:
    states, actions = state.values, action.values
    if states.shape != actions.shape or not np.isfinite(states).all() or not np.isfinite(actions).all():
        return
    if 2 * np.abs(actions - states).mean() >= np.abs(actions).mean():
        return  # actions aren't positions
    longest = min(LEAD, max(rows.stop - rows.start for _, rows in state.episodes) - 2)
    errors = []
    for k in range(longest + 1):
        longer = [rows for _, rows in state.episodes if rows.stop - rows.start > k]
        parts = [np.abs(actions[r.start : r.stop - k] - states[r.start + k : r.stop]) for r in longer]
        errors.append(np.concatenate(parts).mean())
    if len(errors) > 3 and (best := int(np.argmin(errors))) >= 3:
        yield Finding(
            "note",
            "action_leads",
            f"{action.key} commands positions that the state reaches about {best} frames later (mean difference "
            f"{errors[best]:.3g} there, {errors[0]:.3g} at once): 'hold the current state' is a weak baseline, "
            f"and a chunk "
            "shorter than that says little.",
        )


def check_overlap(action: Vector, others: Sequence[Vector] = ()) -> Iterator[Finding]:
    """Look for episodes that are there twice: held out, they would be judged by what was learnt by heart."""
    seen: dict[bytes, list[object]] = {}
    for name, rows in action.episodes:
        seen.setdefault(np.ascontiguousarray(action.values[rows]).tobytes(), []).append(name)
    twice = [names for names in seen.values() if len(names) > 1]
    if twice:
        yield Finding(
            "error",
            "duplicates",
            f"{sum(len(names) - 1 for names in twice)} episodes repeat another's actions exactly: "
            f"{some([' = '.join(map(str, names)) for names in twice])}. Some would be held out and trained on "
            f"at once.",
        )
    for other in others:
        shared = [n for n, r in other.episodes if np.ascontiguousarray(other.values[r]).tobytes() in seen]
        if shared:
            yield Finding(
                "error",
                "overlap",
                f"{len(shared)} of {len(other.episodes)} episodes of {other.key} are in this dataset, too (same "
                f"actions): never "
                "judge by them what was trained here. Split by episode instead.",
            )
