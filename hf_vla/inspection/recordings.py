"""What an inspection shows, whatever the format: facts, findings, and what its page draws.

Letters: N rows, D dimensions, V views.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from hf_vla.data import columns
from hf_vla.data.lerobot_format import DatasetInfo, open_dataset
from hf_vla.data.windows import open_frames
from hf_vla.inspection.finding import ORDER, Finding, some
from hf_vla.inspection.meta_checks import check_meta
from hf_vla.inspection.number_checks import Vector, check_commands, check_jumps, check_overlap, check_vector
from hf_vla.inspection.picture_checks import Seen, check_pictures
from hf_vla.inspection.time_checks import check_times
from hf_vla.sample import ACTION, STATE

EPISODES_SEEN = 8
FRAMES_SEEN = 4
"""Of each of those episodes, evenly spaced from its first to its last."""

logger = logging.getLogger(__name__)


@dataclass
class Recordings:
    """One dataset as its page shows it."""

    name: str
    facts: dict[str, str]
    findings: list[Finding] = field(default_factory=list)
    vectors: list[Vector] = field(default_factory=list)
    seen: Seen = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)
    tasks: dict[str, int] = field(default_factory=dict)
    """Instruction to the number of its episodes."""

    def add(self, findings: Iterable[Finding]) -> None:
        """Take findings in, the worst first."""
        self.findings = sorted([*self.findings, *findings], key=lambda finding: ORDER.index(finding.level))


def read_lerobot(source: str | Path, revision: str | None = None) -> Recordings:
    """Look at a LeRobot dataset; what keeps it from being read is a finding, too."""
    try:
        info = open_dataset(source, revision, on_error="skip")
    except (ValueError, OSError) as error:
        found = Finding("error", "unreadable", f"The dataset can't be opened: {error}")
        return Recordings(str(source), {"folder": str(source)}, [found])
    vectors = {key: _vector(info, key) for key in (STATE, ACTION)}
    seen, unreadable = look(info.cameras, _chosen(info), lambda camera: _reader(info, camera))
    recordings = Recordings(
        name=info.name,
        facts=_facts(info, seen),
        vectors=list(vectors.values()),
        seen=seen,
        lengths=[episode.length for episode in info.episodes],
        tasks=dict(Counter(task for episode in info.episodes for task in episode.tasks)),
    )
    recordings.add(unreadable)
    recordings.add(_left_out(info))
    recordings.add(check_meta(info))
    recordings.add(check_times(info))
    recordings.add(_files(info, seen))
    recordings.add(check_numbers(vectors[STATE], vectors[ACTION]))
    recordings.add(check_pictures(seen, moving(vectors[STATE])))
    return recordings


def read_actions(source: str | Path) -> Vector:
    """Read all actions of a LeRobot dataset, under the name that it was asked for by."""
    return replace(_vector(open_dataset(source, on_error="skip"), ACTION), key=str(source))


def _left_out(info: DatasetInfo) -> list[Finding]:
    """Tell of episodes whose files are missing or broken; the others are looked at all the same."""
    if not info.left_out:
        return []
    text = f"{len(info.left_out)} episodes can't be opened; the first: {info.left_out[0]}"
    return [Finding("error", "unreadable", text)]


def check_numbers(state: Vector, action: Vector) -> list[Finding]:
    """Look at states and actions, each alone and beside one another."""
    return [
        *check_vector(state),
        *check_vector(action),
        *check_jumps(state),
        *check_commands(state, action),
        *check_overlap(action),
    ]


def moving(state: Vector) -> list[object]:
    """Name the episodes in which the state changes by more than a little."""
    width = np.nanquantile(state.values, 0.99, axis=0) - np.nanquantile(state.values, 0.01, axis=0)
    return [n for n, r in state.episodes if (np.ptp(state.values[r], axis=0) > 0.1 * width + 1e-9).any()]


def look(
    cameras: Sequence[str],
    frames: dict[object, list[Any]],
    open_camera: Callable[[str], Callable[[Any], np.ndarray]],
) -> tuple[Seen, list[Finding]]:
    """Decode some pictures of each camera; those that can't be are findings.

    Args:
        cameras: by name.
        frames: episode to what `open_camera` takes for a place.
        open_camera: gives the function that decodes one picture (H, W, 3) uint8.
    """
    seen: Seen = {camera: {} for camera in cameras}
    findings = []
    for camera in cameras:
        broken = []
        for name, places in frames.items():
            try:
                read = open_camera(camera)
                seen[camera][name] = [read(place) for place in places]
            except (ValueError, OSError, KeyError) as error:
                broken.append((name, error))
        if broken:
            findings.append(
                Finding(
                    "error",
                    "unreadable_pictures",
                    f"Camera {camera}: pictures of {len(broken)} of the {len(frames)} episodes looked at can't "
                    f"be decoded, "
                    f"episodes {some([name for name, _ in broken])}; first: {broken[0][1]}",
                )
            )
    return seen, findings


def spread(count: int, wanted: int) -> list[int]:
    """Choose places from the first to the last, evenly."""
    return sorted({int(i) for i in np.linspace(0, count - 1, min(count, wanted)).round()})


def _chosen(info: DatasetInfo) -> dict[object, list[Any]]:
    episodes = [info.episodes[i] for i in spread(len(info.episodes), EPISODES_SEEN)]
    return {e.index: [(e, frame) for frame in spread(e.length, FRAMES_SEEN)] for e in episodes}


def _reader(info: DatasetInfo, camera: str) -> Callable[[Any], np.ndarray]:
    frames = open_frames(info, camera, 0)
    return lambda place: frames.read(*place)


def _vector(info: DatasetInfo, key: str) -> Vector:
    episodes = [(e.index, slice(e.first_row, e.first_row + e.length)) for e in info.episodes]
    return Vector(key, info.names[key], columns.matrix(info.table, key), episodes)


def _facts(info: DatasetInfo, seen: Seen) -> dict[str, str]:
    cameras = []
    for camera in info.cameras:
        sizes = {f"{p.shape[1]} x {p.shape[0]}" for pictures in seen[camera].values() for p in pictures}
        kind = "video" if camera in info.episodes[0].videos else "images in the rows"
        cameras.append(f"{camera} ({', '.join(sorted(sizes)) or 'unreadable'}, {kind})")
    return {
        "format": f"LeRobot {info.version}",
        "episodes": str(len(info.episodes)),
        "frames": f"{sum(e.length for e in info.episodes):,}",
        "frames a second": f"{info.fps:g}",
        "cameras": "; ".join(cameras) or "none",
        "state": f"{info.state_dim} dimensions",
        "action": f"{info.action_dim} dimensions",
        "instructions": str(len(info.tasks)),
    }


def _files(info: DatasetInfo, seen: Seen) -> list[Finding]:
    """Compare what video files say of their rate with the dataset's, and pictures' sizes with what `meta/` says."""
    findings = []
    rates: dict[str, str] = {}
    for camera, file in {c: e.videos[c].file for e in info.episodes for c in e.videos}.items():
        from hf_vla.data.video import said_rate

        rate = said_rate(info.root / file)
        if rate is not None and abs(float(rate) / info.fps - 1) > 0.01:
            rates[camera] = f"{rate} ({file})"
    if rates:
        told = "; ".join(f"{camera}: {rate}" for camera, rate in rates.items())
        findings.append(
            Finding(
                "note",
                "container_rate",
                f"Video files say another rate than {info.fps:g} frames a second: {told}. Frames are chosen by "
                f"their own times, "
                "so nothing depends on it.",
            )
        )
    for camera, episodes in seen.items():
        shape = info.features.get(info.camera_keys[camera], {}).get("shape")
        found = {picture.shape for pictures in episodes.values() for picture in pictures}
        if shape and found and tuple(shape) not in found:
            findings.append(
                Finding(
                    "note",
                    "shape",
                    f"Camera {camera}: meta/ says {tuple(shape)}, its pictures are {some(sorted(found))}.",
                )
            )
    return findings
