"""In-step recovery from out-of-memory: the same samples and random draws, in smaller pieces, at the same effective batch.

An optimizer step is a list of micro-steps (gradient accumulation). When one of them doesn't fit, what it left in the
gradients is worthless, so the whole optimizer step runs again from its first micro-step, each batch cut into pieces.
Several ranks recover alone, and agree once a step (`ranks.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from hf_vla.memory.out_of_memory import Attempt, free_cache
from hf_vla.memory.pieces import (
    Batch,
    count_rows,
    cut,
    dropout_of_whole_batch,
    generator_states,
    set_generator_states,
    take_rows,
)

GROW_AFTER = 50
"""Clean optimizer steps before a larger size is tried again; doubled each time that fails."""

Tell = Callable[[str, str], None]
"""Told of what happens, as (kind, text)."""


class Rung(NamedTuple):
    """One thing to try when a single sample doesn't fit; it changes no number."""

    name: str
    action: Callable[[], None]


class Fit(NamedTuple):
    """How a rank's batches go through its memory."""

    size: int
    """Rows at once."""
    rungs: int = 0
    """How many of the rungs are taken."""
    is_exhausted: bool = False
    """Whether nothing is left to try."""


class MicroStep(NamedTuple):
    """One batch of an optimizer step, and the generators' states that it began with."""

    batch: Batch
    generators: list[Tensor]


@dataclass
class MicroBatcher:
    """Runs the micro-steps of an optimizer step, in the largest pieces that memory has allowed so far.

    Args:
        model: draws what is random for a whole batch, and has the dropouts that must draw alike in pieces.
        sizes: rows at once that may be tried, ascending; the last is the whole batch.
        rungs: what to try when a single row doesn't fit, in order.
        tell: told of everything that changes.
        grow_after: clean optimizer steps before a larger size is tried.
    """

    model: nn.Module
    sizes: list[int]
    rungs: list[Rung] = field(default_factory=list)
    tell: Tell = lambda kind, text: None
    grow_after: int = GROW_AFTER

    def __post_init__(self):
        self.fit = Fit(self.sizes[-1])
        self._micro_steps: list[MicroStep] = []
        self._clean_steps = 0
        self._is_trial = False

    def run(self, batch: Batch, step: Callable[[Batch], Tensor]) -> Tensor:
        """Run one micro-step; where it doesn't fit, run the optimizer step so far again, smaller.

        Args:
            batch: the micro-step's samples.
            step: runs forward and backward of a piece and returns its loss, already divided by the step's count.

        Returns:
            The micro-step's loss. Once exhausted, zero: not even one row fits, and the caller ends the run.
        """
        self._micro_steps.append(MicroStep(batch, generator_states()))
        loss = None if self.fit.is_exhausted else _attempt(self._run_in_pieces, batch, step)
        while loss is None and self.shrink():
            self.forget()
            loss = _attempt(self._run_again, self._micro_steps, step)
        return batch["actions"].new_zeros(()) if loss is None else loss

    def run_once(self, batch: Batch, step: Callable[[Batch], Tensor]) -> Tensor | None:
        """Run a micro-step that can't be run again, in pieces; None if memory ran out."""
        return _attempt(self._run_in_pieces, batch, step)

    def wish(self, has_headroom: Callable[[int], bool]) -> Fit:
        """Say what the next step should go with: as now, or larger after enough clean steps with headroom."""
        larger = next((size for size in self.sizes if size > self.fit.size), None)
        if larger and self._clean_steps + 1 >= self.grow_after and has_headroom(larger):
            return self.fit._replace(size=larger)
        return self.fit

    def finish_step(self, agreed: Fit) -> None:
        """End an optimizer step, and go on as all ranks agreed."""
        self._micro_steps.clear()
        self._clean_steps += 1
        if agreed.size > self.fit.size:
            text = f"{self._clean_steps} steps fitted in pieces of {self.fit.size}: trying pieces of {agreed.size}."
            self._go_on(agreed, "micro_batch_grown", text)
            self._is_trial = True
        self.restrict(agreed, "Another rank ran out of memory")

    def restrict(self, fit: Fit, reason: str) -> None:
        """Take what another rank, or an earlier part of the run, found to fit, where that is less."""
        if fit == self.fit:
            return
        for rung in self.rungs[self.fit.rungs : fit.rungs]:
            rung.action()
        narrower = Fit(min(fit.size, self.fit.size), max(fit.rungs, self.fit.rungs), self.fit.is_exhausted)
        if narrower != self.fit:
            names = [rung.name for rung in self.rungs[: narrower.rungs]]
            self._go_on(narrower, "micro_batch_agreed", f"{reason}: {_describe(narrower.size, names)} here too.")

    @property
    def patience(self) -> dict[str, int | bool]:
        """What decides when a larger size is tried again; kept in checkpoints, since another cut rounds otherwise."""
        return {"clean_steps": self._clean_steps, "grow_after": self.grow_after, "is_trial": self._is_trial}

    @patience.setter
    def patience(self, saved: dict[str, int | bool]) -> None:
        self._clean_steps, self.grow_after = saved["clean_steps"], saved["grow_after"]
        self._is_trial = saved["is_trial"]

    def shrink(self) -> bool:
        """Go one size down, or one rung on; False when nothing is left to try."""
        self._back_off()
        smaller = max((size for size in self.sizes if size < self.fit.size), default=None)
        if smaller:
            text = f"{self.fit.size} samples at once don't fit: running them in pieces of {smaller}."
            self._go_on(self.fit._replace(size=smaller), "out_of_memory", text)
        elif self.fit.rungs < len(self.rungs):
            rung = self.rungs[self.fit.rungs]
            rung.action()
            text = f"{self.fit.size} at once don't fit, and can't be cut: going on with {rung.name}."
            self._go_on(self.fit._replace(rungs=self.fit.rungs + 1), "out_of_memory", text)
        elif not self.fit.is_exhausted:
            text = f"{self.fit.size} at once don't fit, and nothing is left to try."
            self._go_on(self.fit._replace(is_exhausted=True), "out_of_memory", text)
        return not self.fit.is_exhausted

    def forget(self) -> None:
        """Free what a failed attempt holds: partial gradients, and blocks that the allocator keeps."""
        self.model.zero_grad(set_to_none=True)
        free_cache()

    def rewind(self) -> None:
        """Put the generators back to where the unfinished optimizer step began."""
        if self._micro_steps:
            set_generator_states(self._micro_steps[0].generators)

    def _run_again(self, micro_steps: list[MicroStep], step: Callable[[Batch], Tensor]) -> Tensor:
        for micro_step in micro_steps:
            set_generator_states(micro_step.generators)
            loss = self._run_in_pieces(micro_step.batch, step)
        return loss

    def _run_in_pieces(self, batch: Batch, step: Callable[[Batch], Tensor]) -> Tensor:
        batch = {**batch, "draws": self.model.draws(batch["actions"])}
        rows = count_rows(batch)
        if rows <= self.fit.size:
            return step(batch)
        drawn, loss = generator_states(), batch["actions"].new_zeros(())
        for piece in cut(rows, self.fit.size):
            set_generator_states(drawn)
            with dropout_of_whole_batch(self.model, piece, rows):
                loss = loss + step(take_rows(batch, piece))
        return loss

    def _back_off(self) -> None:
        """Wait longer before growing again, if what failed was a trial."""
        if self._is_trial and self._clean_steps < self.grow_after:
            self.grow_after *= 2
        self._is_trial = False

    def _go_on(self, fit: Fit, kind: str, text: str) -> None:
        self.fit, self._clean_steps = fit, 0
        self.tell(kind, text)


@dataclass
class EvaluationBatcher:
    """Runs batches that leave no gradients, each in the largest pieces that memory has allowed so far.

    Args:
        sizes: rows at once that may be tried, ascending; the last is the whole batch.
        tell: told of everything that changes.
    """

    sizes: list[int]
    tell: Tell = lambda kind, text: None

    def run(self, batch: Batch, step: Callable[[Batch], Any]) -> list[Any] | None:
        """Run `step` on a batch, in pieces if need be.

        Returns:
            The result of each piece; None if not even the smallest fits.
        """
        while self.sizes:
            with Attempt():
                return [step(take_rows(batch, piece)) for piece in cut(count_rows(batch), self.sizes[-1])]
            self._shrink()
        return None

    def _shrink(self) -> None:
        size = self.sizes.pop()
        free_cache()
        now = f"going on in pieces of {self.sizes[-1]}" if self.sizes else "nothing is left to try"
        self.tell("out_of_memory", f"{size} samples can't be evaluated at once: {now}.")


def _attempt(run: Callable[..., Tensor], *work: Any) -> Tensor | None:
    """Run some work and return its loss; None if memory ran out."""
    with Attempt():
        return run(*work)
    return None


def _describe(size: int, rungs: list[str]) -> str:
    return " and ".join([f"pieces of {size}", *rungs])


def divisors(number: int) -> list[int]:
    """List what divides a number, ascending: pieces of such a size are all alike."""
    return [n for n in range(1, number + 1) if number % n == 0]
