"""What an episode's numbers show that makes it unfit to learn from: found when a dataset is opened, before pictures are.

Letters: n rows of the episode, D dimensions.
"""

from dataclasses import replace

import numpy as np

from hf_vla.data import columns
from hf_vla.data.lerobot_format import DatasetInfo, Episode
from hf_vla.sample import ACTION, STATE

_RATE_TOLERANCE = 0.01
"""Share by which an episode's rate may differ: timestamps are rounded."""


def leave_out_faulty(info: DatasetInfo) -> DatasetInfo:
    """Keep the episodes that nothing is wrong with, and note which others there were, and why.

    Raises:
        ValueError: where none is left.
    """
    faults = {episode.index: find_fault(info, episode) for episode in info.episodes}
    found = tuple(fault for fault in faults.values() if fault is not None)
    if not found:
        return info
    sound = tuple(episode for episode in info.episodes if faults[episode.index] is None)
    if not sound:
        raise ValueError(
            f"{info.name}: data.on_error is 'skip', but something is wrong with each of its {len(found)} episodes, in the "
            f"first: {found[0]}"
        )
    return replace(info, episodes=sound, meta_stats={}, left_out=info.left_out + found)


def find_fault(info: DatasetInfo, episode: Episode) -> str | None:
    """Say what is wrong with an episode's numbers, with its file and index; None where nothing is."""
    try:
        rows = {
            key: columns.matrix(info.table, key, episode.first_row, episode.length)
            for key in (STATE, ACTION, "timestamp", "task_index")
            if key in info.table.column_names
        }
    except ValueError as error:
        return f"{info.root / episode.file}: episode {episode.index}: {error}"
    return (
        rate_fault(info, episode, rows.get("timestamp"))
        or number_fault(info, episode, STATE, rows[STATE])
        or number_fault(info, episode, ACTION, rows[ACTION])
        or task_fault(info, episode, rows.get("task_index"))
    )


def number_fault(info: DatasetInfo, episode: Episode, key: str, values: np.ndarray) -> str | None:
    """Say at which frame an episode's (n, D) states or actions stop being finite."""
    is_finite = np.isfinite(values).all(1)
    if is_finite.all():
        return None
    return (
        f"{info.root / episode.file}: {key} of episode {episode.index} has values that aren't finite, the first at frame "
        f"{int(np.argmin(is_finite))}. Repair the episode, or leave it out by data.on_error 'skip'."
    )


def rate_fault(info: DatasetInfo, episode: Episode, seconds: np.ndarray | None) -> str | None:
    """Say that an episode's (n, 1) timestamps have another rate than the dataset: a chunk would take another time there."""
    if seconds is None or len(seconds) < 2:
        return None
    step = float(np.median(np.diff(seconds[:, 0])))
    if step <= 0 or abs(step * info.fps - 1) <= _RATE_TOLERANCE:
        return None
    return (
        f"{info.root / episode.file}: episode {episode.index} has {1 / step:.4g} frames a second by its timestamps, where "
        f"the dataset has {info.fps:.4g}. Record it at that rate, or leave it out by data.on_error 'skip'."
    )


def task_fault(info: DatasetInfo, episode: Episode, indices: np.ndarray | None) -> str | None:
    """Say which of an episode's (n, 1) task indices has no text, or that it has no instruction at all."""
    if indices is None:
        return None if episode.tasks else _no_instruction(info, episode)
    known = np.isin(indices[:, 0], list(info.tasks))
    if known.all():
        return None
    frame = int(np.argmin(known))
    return (
        f"{info.root / episode.file}: episode {episode.index}, frame {frame} has task_index {int(indices[frame, 0])}, and "
        f"meta/ has no text for it; it has {sorted(info.tasks)}."
    )


def _no_instruction(info: DatasetInfo, episode: Episode) -> str:
    return f"{info.root}: episode {episode.index} has no instruction, neither in its rows nor in meta/."
