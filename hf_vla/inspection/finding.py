"""One thing that an inspection found."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

Level = Literal["error", "warning", "note"]
ORDER = ("error", "warning", "note")

_NAMED = 6


class Finding(NamedTuple):
    """What was found: an `error` spoils training, a `warning` may, a `note` is good to know."""

    level: Level
    kind: str
    """A word for it, the same in every dataset: `nan`, `black_camera`."""
    text: str


def some(things: Sequence[object]) -> str:
    """Name a few things, and count the rest."""
    named = ", ".join(str(thing) for thing in things[:_NAMED])
    return f"{named} and {len(things) - _NAMED} more" if len(things) > _NAMED else named
