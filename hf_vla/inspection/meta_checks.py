"""What `meta/` says, against the rows: instructions, names, statistics, and which episodes are there."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from hf_vla.data import columns
from hf_vla.data.lerobot_format import STAT_NAMES, DatasetInfo
from hf_vla.inspection.finding import Finding, some
from hf_vla.sample import ACTION, STATE

WIDER = 3.0
"""Times that a dimension's std over all episodes may be its std over those on disk."""

_KINDS = {
    "episodes in meta/ are on disk": ("warning", "partial"),
    "fps, the timestamps": ("warning", "wrong_fps"),
    "another length than meta/": ("warning", "lengths_disagree"),
    "have no rows": ("warning", "lost_episodes"),
    "no pictures of the cameras": ("warning", "missing_camera"),
    "numbered instead": ("note", "names_disagree"),
    "episode_index is missing": ("note", "missing_column"),
}
"""What opening a dataset may have to repair, by words of it."""


def check_meta(info: DatasetInfo) -> Iterator[Finding]:
    """Look at all that describes the dataset."""
    for repair in info.repairs:
        level, kind = next((found for words, found in _KINDS.items() if words in repair), ("warning", "repaired"))
        yield Finding(level, kind, f"Repaired on opening: {repair}.")
    yield from _tasks(info)
    yield from _names(info)
    yield from _stats(info)
    yield from _subset(info)
    if len(info.cameras) == 1:
        yield Finding(
            "note",
            "one_camera",
            f"There is one camera, {info.cameras[0]}: a pair of views takes two moments of it (data.views with "
            f"an offset).",
        )


def _tasks(info: DatasetInfo) -> Iterator[Finding]:
    if "task_index" in info.table.column_names:
        used = columns.matrix(info.table, "task_index")[:, 0]
        unknown = sorted(set(used.tolist()) - set(info.tasks))
        if unknown:
            row = int(np.isin(used, unknown).argmax())
            episode = next(e for e in info.episodes if e.first_row <= row < e.first_row + e.length)
            yield Finding(
                "error",
                "task_without_text",
                f"task_index {some(unknown)} has no text in meta/: episode {episode.index} ({episode.file}), "
                f"frame {row - episode.first_row}, is the first of {int(np.isin(used, unknown).sum())} rows. "
                f"Training refuses them.",
            )
    empty = [index for index, text in info.tasks.items() if not str(text).strip()]
    if empty:
        yield Finding("error", "empty_task", f"The text of task_index {some(empty)} is empty: nothing to be told.")
    if len(info.tasks) == 1:
        yield Finding("note", "one_task", "All episodes have one instruction, so nothing of language can be learnt.")


def _names(info: DatasetInfo) -> Iterator[Finding]:
    for key in (STATE, ACTION):
        names = info.features.get(key, {}).get("names")
        if isinstance(names, list) and names and isinstance(names[0], list):
            yield Finding("note", "nested_names", f"{key}: names are nested, [[…]]; they are read as one list.")
        if len(set(info.names[key])) < len(info.names[key]):
            yield Finding("warning", "same_names", f"{key}: two dimensions bear one name.")


def _stats(info: DatasetInfo) -> Iterator[Finding]:
    for key in (STATE, ACTION):
        stats = info.meta_stats.get(key, {})
        missing = [name for name in STAT_NAMES if np.size(stats.get(name, ())) != len(info.names[key])]
        if missing:
            yield Finding(
                "note",
                "missing_stats",
                f"{key}: meta/ has no {some(missing)} of these rows, so they are computed at each start; "
                "data_scripts/compute_stats.py writes them once.",
            )
            continue
        values = columns.matrix(info.table, key)
        mean, std = np.nanmean(values, axis=0), np.nanstd(values, axis=0)
        off = np.abs(np.ravel(stats["mean"]) - mean) > 0.1 * std + 1e-6
        off |= np.abs(np.ravel(stats["std"]) - std) > 0.2 * std + 1e-6
        if off.any():
            dims = [name for name, wrong in zip(info.names[key], off, strict=True) if wrong]
            yield Finding(
                "error",
                "wrong_stats",
                f"{key}: meta/stats.json isn't of these rows: mean or std of {some(dims)} are others. "
                f"Normalisation would "
                "be wrong; data_scripts/compute_stats.py writes them anew.",
            )


def _subset(info: DatasetInfo) -> Iterator[Finding]:
    """Compare the spread of the rows on disk with that of all episodes, where v2.1's `meta/` has each one's statistics."""
    file = info.root / "meta/episodes_stats.jsonl"
    if not file.is_file():
        return
    described = [json.loads(line)["stats"] for line in file.read_text().splitlines() if line.strip()]
    for key in (STATE, ACTION):
        whole = _pooled_std([stats[key] for stats in described if key in stats])
        if whole is None or len(whole) != len(info.names[key]):
            continue
        ratio = whole / np.maximum(np.nanstd(columns.matrix(info.table, key).astype(np.float64), axis=0), 1e-9)
        dims = [f"{info.names[key][d]} ({ratio[d]:.3g} times)" for d in np.argsort(-ratio) if ratio[d] > WIDER]
        if dims:
            yield Finding(
                "warning",
                "subset_stats",
                f"{key}: over all {len(described)} episodes in meta/, {some(dims)} spread wider than over the "
                f"{len(info.episodes)} on disk. Scaled by these rows alone, other episodes lie far outside: take a "
                "larger part, or rely on the processor's floor.",
            )


def _pooled_std(stats: list[dict[str, Any]]) -> np.ndarray | None:
    """Put episodes' mean, std and count together, (D,)."""
    if not stats:
        return None
    mean, std = (np.array([np.ravel(s[name]) for s in stats], np.float64) for name in ("mean", "std"))
    weights = np.array([np.ravel(s["count"])[0] for s in stats], np.float64)[:, None]
    total = (weights * mean).sum(0) / weights.sum()
    return np.sqrt((weights * (std**2 + (mean - total) ** 2)).sum(0) / weights.sum())
