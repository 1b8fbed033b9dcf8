"""Where a training stands, beyond weights, optimizer and generators: written into each checkpoint, so that a run goes on as
if it had not stopped.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

from hf_vla.data.order import Lanes
from hf_vla.run import write_json

FILE = "progress.json"


@dataclass
class Progress:
    """State of the data and of the log, at the end of an optimizer step."""

    step: int = 0
    epoch: int = 0
    position: int = 0
    """Samples of the epoch that all ranks together have seen."""
    epoch_is_over: bool = False
    """Whether what follows an epoch's last step is done too."""
    samples: int = 0
    """That an epoch has."""
    lanes: Lanes = field(default_factory=Lanes)
    """By which the epoch's order was made."""
    ranks: int = 1
    batch_size: int = 1
    accumulation: int = 1
    losses: list[float] = field(default_factory=lambda: [0.0])
    """By rank: the sum of losses since the last line of the log."""
    total_loss: float = 0.0
    """Sum of all losses before that line."""
    logged_step: int = 0
    seconds: float = 0.0
    """Of training, in all sessions that led here."""
    skipped: int = 0
    """Samples that couldn't be read and were left out."""

    def save(self, directory: Path) -> None:
        """Write it into a checkpoint."""
        write_json(directory / FILE, dataclasses.asdict(self))

    @classmethod
    def load(cls, directory: Path) -> "Progress":
        """Read it from a checkpoint."""
        values = json.loads((directory / FILE).read_text())
        return cls(**{**values, "lanes": Lanes(*values["lanes"])})

    def describe_change(self, samples: int, ranks: int, batch_size: int, accumulation: int) -> str | None:
        """Say what goes on in another way than it began; None if nothing does."""
        if samples != self.samples:
            return (
                f"This run's data had {self.samples} samples and has {samples} now: the order is another, and of epoch "
                f"{self.epoch} some may be seen twice and some not at all."
            )
        if (ranks, batch_size, accumulation) == (self.ranks, self.batch_size, self.accumulation):
            return None
        return (
            f"This run had {_deal(self.ranks, self.batch_size, self.accumulation)} and goes on with "
            f"{_deal(ranks, batch_size, accumulation)}. Each sample of epoch {self.epoch} that was not seen yet will be "
            "seen once, but the order differs, steps hold other samples, and random draws are new: the numbers will not be "
            "those of a run that was never stopped."
        )


def _deal(ranks: int, batch_size: int, accumulation: int) -> str:
    return f"{ranks} processes x {batch_size} samples x {accumulation} accumulated"
