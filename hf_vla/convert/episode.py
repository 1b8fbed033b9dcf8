"""What a converter reads, whatever the format: episodes whose columns are named by their path in the source.

Letters: N steps of an episode.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

Column = np.ndarray | list[bytes]
"""N rows of numbers, N pictures (H, W, 3) uint8, or N encoded pictures or texts."""


@dataclass(frozen=True)
class RawEpisode:
    """One episode as its file has it; a column is read when it is asked for."""

    name: str
    """What a message calls it: its number in the file, or its group."""
    paths: tuple[str, ...] = field(repr=False)
    """Columns that it has, such as `observation/state`."""
    read_column: Callable[[str], Column] = field(repr=False)
    texts: dict[str, str] = field(default_factory=dict, repr=False)
    """Texts that hold for all of it, by path."""
    whole: dict[str, np.ndarray] = field(default_factory=dict, repr=False)
    """Numbers that hold for all of it, by path."""

    def read(self, path: str) -> Column:
        """Read one column.

        Raises:
            ValueError: where it has none of that path, naming those that it has.
        """
        if path not in self.paths:
            raise ValueError(f"has no column {path!r}; it has {', '.join(self.paths)}")
        return self.read_column(path)


class Shard(NamedTuple):
    """A file of the source: what one worker converts at a time."""

    file: Path
    num_episodes: int | None = None
    """Where the source says it."""


class Source(Protocol):
    """A folder or file of recordings in one format."""

    def shards(self) -> list[Shard]:
        """List the files, in their order."""

    def episodes(self, shard: Shard) -> Iterator[RawEpisode]:
        """Read the episodes of one file, in their order."""
