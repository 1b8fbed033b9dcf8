"""Look at an RLDS dataset as it is, before it is converted: its flags, its descriptions and its splits can lie.

Letters: N rows of all episodes, D dimensions.
"""

import io
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from hf_vla.convert.episode import RawEpisode
from hf_vla.convert.rlds import Feature, RLDSSource
from hf_vla.inspection.finding import Finding, some
from hf_vla.inspection.number_checks import Vector, check_overlap
from hf_vla.inspection.picture_checks import Seen, check_pictures, is_black
from hf_vla.inspection.recordings import EPISODES_SEEN, FRAMES_SEEN, Recordings, check_numbers, look, moving, spread
from hf_vla.inspection.time_checks import check_lengths

_TEXTS = ("language_instruction", "observation/natural_language_instruction")
_MOST = 200
"""Episodes that are read of each split: enough to see what they are like."""


def read_rlds(folder: str | Path) -> Recordings:
    """Look at the split `train` of an RLDS dataset, or its first, and at whether the others repeat it."""
    source = RLDSSource(Path(folder))
    split = "train" if "train" in _splits(source) else min(_splits(source), default="train")
    source = RLDSSource(Path(folder), split)
    try:
        episodes = _episodes(source)
    except (ValueError, OSError) as error:
        found = Finding("error", "unreadable", f"The split {split} can't be read: {error}")
        return Recordings(str(folder), {"format": "RLDS"}, [found])
    state, action = (_vector(episodes, source.features, word) for word in ("state", "action"))
    cameras = sorted(path for path, feature in source.features.items() if feature.is_bytes and "image" in path)
    seen, unreadable = _look(episodes, cameras)
    recordings = Recordings(
        name=f"{source.folder.name} ({split})",
        facts={
            "format": "RLDS (TFRecord)",
            "episodes": f"{len(episodes)}" + (" (the first)" if len(episodes) == _MOST else ""),
            "frames": str(sum(rows.stop - rows.start for _, rows in action.episodes)),
            "cameras": ", ".join(cameras),
            "state": f"{state.values.shape[1]} dimensions",
            "action": f"{action.values.shape[1]} dimensions",
        },
        vectors=[state, action],
        seen=seen,
        lengths=[rows.stop - rows.start for _, rows in action.episodes],
        tasks=dict(Counter(_text(episode) for episode in episodes)),
    )
    for findings in (
        unreadable,
        check_numbers(state, action),
        check_pictures(seen, moving(state)),
        check_lengths(recordings.lengths),
        _flags(episodes, cameras, seen),
        _descriptions(source),
        _other_splits(source, action),
        _texts(recordings.tasks),
        [Finding("note", "no_rate", "Nothing says how many steps a second there are; a convention has to.")],
    ):
        recordings.add(findings)
    return recordings


def _episodes(source: RLDSSource) -> list[RawEpisode]:
    episodes: list[RawEpisode] = []
    for shard in source.shards():
        for episode in source.episodes(shard):
            episodes.append(episode)
            if len(episodes) == _MOST:
                return episodes
    return episodes


def _vector(episodes: list[RawEpisode], features: dict[str, Feature], word: str) -> Vector:
    """Put the columns of a state or an action side by side: one vector, or several pieces as OXE has them."""
    paths = [
        path
        for path, feature in features.items()
        if not feature.is_bytes and (path == word or path.startswith(f"{word}/") or path.endswith(f"/{word}"))
    ]
    if not paths:
        raise ValueError(f"no column is called {word}; there are {', '.join(features)}.")
    parts = [np.concatenate([np.asarray(e.read(path), np.float32) for path in paths], axis=1) for e in episodes]
    ends = np.cumsum([len(part) for part in parts])
    slices = [(e.name, slice(int(end) - len(p), int(end))) for e, p, end in zip(episodes, parts, ends, strict=True)]
    values = np.concatenate(parts)
    return Vector(
        paths[0] if len(paths) == 1 else word, [f"{word}_{d}" for d in range(values.shape[1])], values, slices
    )


def _look(episodes: list[RawEpisode], cameras: list[str]) -> tuple[Seen, list[Finding]]:
    chosen = [episodes[i] for i in spread(len(episodes), EPISODES_SEEN)]
    by_name = {episode.name: episode for episode in chosen}
    places = {
        name: [(name, frame) for frame in spread(len(episode.read(cameras[0])), FRAMES_SEEN)]
        for name, episode in by_name.items()
        if cameras
    }
    return look(cameras, places, lambda camera: lambda place: _open(by_name[place[0]].read(camera)[place[1]]))


def _open(encoded: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))


def _text(episode: RawEpisode) -> str:
    for path in _TEXTS:
        if path in episode.paths:
            return episode.read(path)[0].decode(errors="replace")
    return ""


def _texts(tasks: dict[str, int]) -> Iterator[Finding]:
    if tasks.get("", 0):
        yield Finding("warning", "empty_task", f"{tasks['']} of {sum(tasks.values())} episodes have no instruction.")


def _flags(episodes: list[RawEpisode], cameras: list[str], seen: Seen) -> Iterator[Finding]:
    for path in ("is_last", "is_terminal", "reward"):
        if path in episodes[0].paths and not any(np.any(episode.read(path)) for episode in episodes):
            yield Finding(
                "warning",
                f"{path}_never",
                f"{path} is 0 in every step of every episode: an episode's end, or success, can't be told by it.",
            )
    wrong: dict[str, list[str]] = {"deny what their cameras show": [], "promise pictures that are black": []}
    denying, promising = wrong.values()
    for camera in cameras:
        flag = f"episode_metadata/has_{camera.rsplit('/', 1)[-1]}"
        said = [episode.whole[flag] for episode in episodes if flag in episode.whole]
        shows = any(not is_black(picture) for pictures in seen[camera].values() for picture in pictures)
        if said and shows != bool(np.any(said)):
            (denying if shows else promising).append(flag)
    for what, flags in wrong.items():
        if flags:
            yield Finding("warning", "wrong_flag", f"{some(flags)} {what}: don't go by them.")


def _descriptions(source: RLDSSource) -> Iterator[Finding]:
    """Find descriptions that were left from a template: they count another number of dimensions than there are."""
    for path, feature in source.features.items():
        named = sum(int(count) for count in re.findall(r"(\d+)x ", feature.description))
        size = int(np.prod(feature.shape, dtype=int))
        if named and named != size:
            yield Finding(
                "warning",
                "wrong_description",
                f"{path} has {size} dimensions, and features.json describes {named} ({feature.description!r}): "
                f"the description "
                "is of something else.",
            )


def _other_splits(source: RLDSSource, action: Vector) -> Iterator[Finding]:
    for split in sorted(_splits(source) - {source.split}):
        try:
            other = RLDSSource(source.folder, split)
            vector = _vector(_episodes(other), other.features, "action")
        except (ValueError, OSError) as error:
            yield Finding("error", "unreadable", f"The split {split} can't be read: {error}")
            continue
        yield from check_overlap(
            _renamed(action), [Vector(f"the split {split}", vector.names, vector.values, vector.episodes)]
        )


def _splits(source: RLDSSource) -> set[str]:
    return {file.name.split(".tfrecord")[0].rsplit("-", 1)[-1] for file in source.folder.glob("*.tfrecord-*")}


def _renamed(action: Vector) -> Vector:
    """Keep one of each episode, so that what is found is the overlap alone."""
    kept = {action.values[rows].tobytes(): (name, rows) for name, rows in action.episodes}
    return Vector(action.key, action.names, action.values, list(kept.values()))
