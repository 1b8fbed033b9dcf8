"""Two clocks for a training's steps: the processor's, which others on the machine don't move, and the wall's."""

import itertools
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from transformers import TrainerCallback

from hf_vla.trainer import VLATrainer


class Moment(NamedTuple):
    """Seconds by two clocks."""

    processor: float
    wall: float

    def since(self, earlier: "Moment") -> "Moment":
        """Give the time from an earlier moment to this."""
        return Moment(self.processor - earlier.processor, self.wall - earlier.wall)


def now() -> Moment:
    """Read both clocks."""
    return Moment(time.process_time(), time.perf_counter())


def clocked(work: Callable[[], Any]) -> tuple[Moment, Any]:
    """Do some work; give the time it took, and what it gave."""
    begun = now()
    done = work()
    return now().since(begun), done


class Clock(TrainerCallback):
    """Notes when each step ends; between two ends lies a whole step, its data and its logging."""

    def __init__(self):
        self.ends: list[Moment] = []

    def on_step_end(self, args, state, control, **kwargs):
        """Note the time."""
        self.ends.append(now())


def step_lengths(trainer: VLATrainer) -> list[Moment]:
    """Train a round, and give what each step but the first took."""
    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()
    trainer.remove_callback(clock)
    return lengths(clock.ends)


def lengths(ends: Iterable[Moment]) -> list[Moment]:
    """Give the time between the ends of steps."""
    return [later.since(earlier) for earlier, later in itertools.pairwise(ends)]
