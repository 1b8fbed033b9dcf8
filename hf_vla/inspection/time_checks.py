"""What the columns of indices and times say: steps of time that aren't even, rates that differ, lengths that disagree."""

from collections.abc import Iterator

import numpy as np

from hf_vla.data import columns
from hf_vla.data.lerobot_format import DatasetInfo
from hf_vla.inspection.finding import Finding, some

SHORT = 16
"""Steps of a usual chunk; a shorter episode is padded in every sample."""
UNEVEN = 0.1
"""Share of a step by which one may be off."""


def check_times(info: DatasetInfo) -> Iterator[Finding]:
    """Look at timestamps, frame numbers and lengths."""
    if "timestamp" in info.table.column_names:
        yield from _timestamps(info)
    if "frame_index" in info.table.column_names:
        yield from _frame_numbers(info)
    yield from check_lengths([episode.length for episode in info.episodes])


def check_lengths(lengths: list[int]) -> Iterator[Finding]:
    """Look at the episodes' lengths."""
    short = sum(length < SHORT for length in lengths)
    if short:
        yield Finding(
            "note",
            "short_episodes",
            f"{short} of {len(lengths)} episodes are shorter than {SHORT} steps; chunks reach beyond their end, "
            f"where the last "
            "action is repeated and doesn't count.",
        )
    if len(lengths) > 4 and len(set(lengths)) == 1:
        yield Finding(
            "warning",
            "one_length",
            f"All {len(lengths)} episodes have {lengths[0]} steps: they were cut, so their ends aren't the "
            f"tasks' ends.",
        )


def _timestamps(info: DatasetInfo) -> Iterator[Finding]:
    seconds = columns.matrix(info.table, "timestamp")[:, 0].astype(np.float64)
    uneven, rates = [], {}
    for episode in info.episodes:
        steps = np.diff(seconds[episode.first_row : episode.first_row + episode.length])
        if not len(steps):
            continue
        usual = float(np.median(steps))
        rates[episode.index] = 1 / usual if usual > 0 else 0.0
        off = np.flatnonzero(np.abs(steps - usual) > UNEVEN * abs(usual) + 1e-6)
        if len(off):
            uneven.append(f"{episode.index} (frame {off[0] + 1}: {steps[off[0]]:.4g} s after the one before)")
    if uneven:
        yield Finding(
            "warning",
            "uneven_time",
            f"Frames are missing or doubled in {len(uneven)} episodes: their timestamps aren't evenly spaced, "
            f"in episode "
            f"{some(uneven)}.",
        )
    differing = [f"{index} ({rate:.4g})" for index, rate in rates.items() if abs(rate / info.fps - 1) > 0.01]
    if differing:
        yield Finding(
            "error",
            "mixed_fps",
            f"{len(differing)} episodes run at another rate than {info.fps:g} frames a second by their "
            f"timestamps: episode "
            f"{some(differing)}. A chunk of actions would mean another time there.",
        )


def _frame_numbers(info: DatasetInfo) -> Iterator[Finding]:
    numbers = columns.matrix(info.table, "frame_index")[:, 0]
    wrong = []
    for episode in info.episodes:
        rows = numbers[episode.first_row : episode.first_row + episode.length]
        if not np.array_equal(rows, np.arange(episode.length)):
            wrong.append(episode.index)
    if wrong:
        yield Finding(
            "error",
            "frame_numbers",
            f"Frames aren't numbered 0, 1, 2 … in episodes {some(wrong)}: rows are missing, doubled or out of order.",
        )
