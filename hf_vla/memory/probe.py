"""Start small, then step up: real steps at micro-batch 1, 2, 4 under the budget, a line through their peaks, and the largest
micro-batch that the line allows, verified.

Letters: m micro-batch (samples at once).
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from hf_vla.memory.gpus import facts_of, write_calibration
from hf_vla.memory.meter import Meter, Usage
from hf_vla.memory.sizes import format_size
from hf_vla.run import now

SHARE = 0.9
"""Of the budget; what is left is for fragmentation over a long run, and for other processes."""
LINE_SIZES = (1, 2, 4)
LINE_STEPS, PROOF_STEPS = 3, 10
"""Optimizer states come into being in the first step; the second is the first that runs beside them."""

Run = Callable[[int, int], bool]
"""(m, steps) -> whether real training at m, with evaluation and a checkpoint at its end, went through without help."""


@dataclass(frozen=True)
class Measurement:
    """What one micro-batch took."""

    batch_size: int
    steps: int
    fits: bool
    usage: Usage
    seconds: float


@dataclass(frozen=True)
class ProbeResult:
    """What the probe found."""

    measured_on: str
    budget: int
    batch_size: int
    """The largest micro-batch that is verified; 0 if none fits."""
    at_rest: int
    """Bytes that the line has at m = 0."""
    per_sample: int
    """Bytes that each sample adds."""
    measurements: tuple[Measurement, ...]

    @property
    def overhead(self) -> float:
        """How much more the allocator held than tensors took, at the largest peak."""
        largest = max((m.usage for m in self.measurements), key=lambda usage: usage.allocated)
        return largest.reserved / largest.allocated

    @property
    def outside(self) -> int:
        """Bytes that the process took beside its allocator: context, kernels, libraries."""
        return max(m.usage.outside for m in self.measurements)

    def describe(self) -> str:
        """Say it for people, a line a measurement."""
        lines = [
            f"{m.batch_size:4} samples at once: {format_size(m.usage.total):>10}, {m.steps} steps in {m.seconds:.1f} s"
            + ("" if m.fits else ", out of memory")
            for m in self.measurements
        ]
        line = f"line: {format_size(self.at_rest)} + {format_size(self.per_sample)} a sample"
        found = f"{self.batch_size} samples at once are verified" if self.batch_size else "not even one sample fits"
        return "\n".join(
            [*lines, line, f"{found}, within {SHARE:.0%} of {format_size(self.budget)} ({self.measured_on})"]
        )

    def to_dict(self) -> dict[str, Any]:
        """Give all of it as JSON can hold it."""
        return {**asdict(self), "overhead": self.overhead, "outside": self.outside}


def probe(run: Run, meter: Meter, budget: int, largest: int) -> ProbeResult:
    """Find the largest micro-batch whose real training stays under 90 % of a budget.

    Args:
        run: trains; it is given the samples that take most.
        meter: reads the peaks, and caps the process at the budget.
        budget: bytes that one process may use.
        largest: micro-batch that is never exceeded, such as the effective batch.
    """
    meter.cap(budget)
    allowed = int(SHARE * budget)
    line = _measure_line(run, meter, allowed, largest)
    at_rest, per_sample = fit_line(line)
    proofs: list[Measurement] = []
    candidate = _largest_allowed(line, at_rest, per_sample, allowed, largest)
    while candidate and not (proofs and _is_good(proofs[-1], allowed)):
        proofs.append(measure(run, meter, candidate, PROOF_STEPS))
        if not _is_good(proofs[-1], allowed):
            candidate = _next_smaller(candidate, proofs[-1], per_sample, allowed)
    return ProbeResult(meter.name, budget, candidate, at_rest, per_sample, (*line, *proofs))


def measure(run: Run, meter: Meter, batch_size: int, steps: int) -> Measurement:
    """Train some steps at one micro-batch and read the peak."""
    meter.start()
    began = time.perf_counter()
    fits = run(batch_size, steps)
    return Measurement(batch_size, steps, fits, meter.peak(), time.perf_counter() - began)


def fit_line(measurements: list[Measurement]) -> tuple[int, int]:
    """Fit peak = at_rest + per_sample · m to what fitted, by least squares; returns (at_rest, per_sample) in bytes."""
    points = [(m.batch_size, m.usage.total) for m in measurements if m.fits]
    if len(points) < 2:
        return (points[0][1] if points else 0), 0
    per_sample, at_rest = np.polyfit(*np.array(points, dtype=float).T, 1)
    return round(at_rest), round(per_sample)


def calibrate(result: ProbeResult) -> None:
    """Store what the process took beside its allocator, for the next plan for this kind of GPU."""
    source = f"measured by hf-vla probe, {now()[:10]}; the allocator held {result.overhead:.2f} x the tensors' peak"
    write_calibration(replace(facts_of(result.measured_on), context_bytes=result.outside, source=source))


def _measure_line(run: Run, meter: Meter, allowed: int, largest: int) -> list[Measurement]:
    line: list[Measurement] = []
    for size in LINE_SIZES:
        if size <= largest and (not line or _is_good(line[-1], allowed)):
            line.append(measure(run, meter, size, LINE_STEPS))
    return line


def _is_good(measurement: Measurement, allowed: int) -> bool:
    return measurement.fits and measurement.usage.total <= allowed


def _largest_allowed(line: list[Measurement], at_rest: int, per_sample: int, allowed: int, largest: int) -> int:
    """Give the largest micro-batch that the line allows, below any that was seen to fail."""
    failed = [m.batch_size for m in line if not _is_good(m, allowed)]
    limit = min([largest, *(size - 1 for size in failed)])
    if per_sample <= 0:  # too few points, or peaks that don't depend on the batch
        return limit
    return max(0, min(limit, (allowed - at_rest) // per_sample))


def _next_smaller(size: int, failed: Measurement, per_sample: int, allowed: int) -> int:
    """Go down by what was too much, by the line, and by one at the least."""
    excess = failed.usage.total - allowed
    return max(0, size - max(1, -(-excess // per_sample) if per_sample > 0 else 1))
