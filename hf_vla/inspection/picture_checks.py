"""What cameras show: nothing, always the same, the same as another; and what is wrong with their files.

Letters: H W pixels.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from hf_vla.inspection.finding import Finding, some

BLACK = 4
"""Level of 255 that no pixel but a few exceeds in a picture of nothing."""
SAME = 1.0
"""Mean difference of levels under which two pictures are one."""

Seen = dict[str, dict[object, list[np.ndarray]]]
"""Camera to episode to some of its pictures, in their order, (H, W, 3) uint8."""


def check_pictures(seen: Seen, moving: Sequence[object]) -> Iterator[Finding]:
    """Look at some pictures of every camera.

    Args:
        seen: pictures of some episodes, the same frames for every camera.
        moving: episodes in which the state changes, so that pictures should.
    """
    for camera, episodes in seen.items():
        yield from _dark(camera, episodes)
        yield from _frozen(camera, episodes, moving)
        sizes = {picture.shape[:2] for pictures in episodes.values() for picture in pictures}
        if len(sizes) > 1:
            yield Finding(
                "warning", "sizes", f"Camera {camera}: pictures have {len(sizes)} sizes: {some(sorted(sizes))}."
            )
    yield from _twins(seen)


def is_black(picture: np.ndarray) -> bool:
    """Tell whether a picture shows nothing."""
    return bool(np.quantile(picture, 0.99) <= BLACK)


def _dark(camera: str, episodes: dict[object, list[np.ndarray]]) -> Iterator[Finding]:
    dark = [name for name, pictures in episodes.items() if all(is_black(picture) for picture in pictures)]
    if not episodes or not dark:
        return
    if len(dark) == len(episodes):
        yield Finding("error", "black_camera", f"Camera {camera} is black wherever it was looked at: leave it out.")
    else:
        yield Finding("warning", "black_camera", f"Camera {camera} is black in episodes {some(dark)}.")


def _frozen(camera: str, episodes: dict[object, list[np.ndarray]], moving: Sequence[object]) -> Iterator[Finding]:
    frozen = [
        name
        for name, pictures in episodes.items()
        if name in moving
        and len(pictures) > 1
        and not is_black(pictures[0])
        and all(_difference(pictures[0], picture) == 0 for picture in pictures[1:])
    ]
    if frozen:
        yield Finding(
            "error" if len(frozen) == len(episodes) else "warning",
            "frozen_camera",
            f"Camera {camera} shows one and the same picture while the robot moves, in episodes {some(frozen)}.",
        )


def _twins(seen: Seen) -> Iterator[Finding]:
    cameras = list(seen)
    for i, first in enumerate(cameras):
        for second in cameras[i + 1 :]:
            pairs = [
                (a, b)
                for name in seen[first]
                for a, b in zip(seen[first][name], seen[second].get(name, ()), strict=False)
                if not is_black(a)
            ]
            if pairs and all(_difference(a, b) < SAME for a, b in pairs):
                yield Finding(
                    "error",
                    "same_camera",
                    f"Cameras {first} and {second} show the same: they are one view, not a pair.",
                )


def _difference(first: np.ndarray, second: np.ndarray) -> float:
    if first.shape != second.shape:
        return np.inf
    return float(np.abs(first.astype(np.int16) - second).mean())
