"""Measured memory against planned, every step of a training: to the logger, to `memory.jsonl`, to the run's events.

Reading the allocator's counters doesn't wait for the GPU. To see what lies in memory, `touch RUN/memory_snapshot`: within a
second, a whole step is recorded into `RUN/memory_snapshot_<step>.pickle`, which https://pytorch.org/memory_viz opens.
"""

import errno
import json
import logging
import os
import resource
import time
import weakref
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import TrainerCallback

from hf_vla.memory.sizes import GIB, format_size
from hf_vla.run import add_event

FILE = "memory.jsonl"
SNAPSHOT = "memory_snapshot"
NEAR_BUDGET = 0.9
"""Share of the budget past which the run is warned."""
SNAPSHOT_ENTRIES = 200_000
"""Allocations and frees that a snapshot holds at most."""
SECONDS_BETWEEN_LOOKS = 1.0
"""At least, for a wished snapshot: short steps would feel it."""

logger = logging.getLogger(__name__)


class Reading(NamedTuple):
    """Bytes of one step, and a count; None is what can't be measured here."""

    allocated_peak: int | None = None
    reserved_peak: int | None = None
    device_used: int | None = None
    """Of the whole GPU: this process, all others, the driver."""
    retries: int | None = None
    """Times that the allocator had to give its cache back to the GPU and try again, since the start of the process."""
    reserved: int | None = None
    """Now, where `reserved_peak` is the step's highest."""
    device_free: int | None = None
    host_rss: int | None = None
    """Most that the process has ever held of the host's memory."""


class MemoryMonitor(TrainerCallback):
    """Record what each step takes, and warn when it nears the budget or when others take what the plan counts on.

    Args:
        directory: the run's. Rank 0 writes `memory.jsonl` and events into it, rank N `memory.rankN.jsonl` alone.
        planned_peak: bytes that the plan foresees for this process's GPU, None without a plan.
        budget: bytes that the run may use of it, None without one.
    """

    def __init__(
        self,
        directory: str | Path,
        planned_peak: int | None = None,
        budget: int | None = None,
    ):
        self.directory = Path(directory)
        self.plan = {"planned_peak": planned_peak, "budget": budget}
        self.highest_peak: int | None = None
        """Most bytes of tensors at any step; None where there is no GPU."""
        self.reading = Reading()
        """Of the last step."""
        self.troubles: set[str] = set()
        """Kinds of trouble that have been told and last."""
        self.held_by_others: int | None = None
        """What the GPU held beside this process's tensors after the first step: the driver, libraries, other users."""
        self.is_recording = False
        self._line_file: int | None = None
        self._looked = float("-inf")

    def on_train_begin(self, args, state, control, **kwargs):
        """Make the directory, where the run hasn't yet."""
        self.directory.mkdir(parents=True, exist_ok=True)

    def on_step_begin(self, args, state, control, **kwargs):
        """Start the step's peaks from what is held now."""
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()

    def on_step_end(self, args, state, control, **kwargs):
        """Read, write and judge what the step took."""
        self.reading = reading = read_memory()
        self._tell_once(state, "unwritten", self._write(state.global_step, args.process_index, reading))
        if reading.allocated_peak is not None:
            self._judge(state, reading)
        if state.is_world_process_zero:
            self._serve_snapshot(state.global_step)

    def _judge(self, state, reading: Reading) -> None:
        for kind, trouble in (("near_budget", self._near_budget(reading)), ("memory_taken", self._taken(reading))):
            self._tell_once(state, kind, trouble)
        self.highest_peak = max(self.highest_peak or 0, reading.allocated_peak)

    def on_train_end(self, args, state, control, **kwargs):
        """Stop what a snapshot that was never finished would go on recording."""
        if self.is_recording:
            torch.cuda.memory._record_memory_history(enabled=None)

    def _write(self, step: int, rank: int, reading: Reading) -> str | None:
        """Append a line; say so where it can't be written, on a full disk most often, which is no reason to stop."""
        name = FILE if rank == 0 else f"memory.rank{rank}.jsonl"
        values = dict(zip(Reading._fields[:4], reading[:4], strict=True))
        line = {"step": step, **values, **self.plan, "host_rss": reading.host_rss}
        try:
            if self._line_file is None:
                self._line_file = self._open_lines(name)
            append(self._line_file, f"{json.dumps(line)}\n".encode())
        except OSError as error:
            return f"{self.directory / name} lacks lines from here on: {error}."
        return None

    def _open_lines(self, name: str) -> int:
        """Open once what is written after every step: opening takes ten times as long as writing."""
        file = os.open(self.directory / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        weakref.finalize(self, os.close, file)
        return file

    def _near_budget(self, reading: Reading) -> str | None:
        budget, peak = self.plan["budget"], reading.reserved_peak
        if budget is None or peak <= NEAR_BUDGET * budget:
            return None
        planned = "nothing" if self.plan["planned_peak"] is None else format_size(self.plan["planned_peak"])
        return (
            f"Memory nears the budget: at the peak {format_size(peak)} were reserved, {peak / budget:.0%} of "
            f"{format_size(budget)}; planned were {planned}."
        )

    def _taken(self, reading: Reading) -> str | None:
        """Say so if others hold more than at the first step, and leave less free than the plan still wants."""
        planned = self.plan["planned_peak"]
        if planned is None:
            return None
        others = reading.device_used - reading.reserved
        if self.held_by_others is None:
            self.held_by_others = others
        taken, wanted = others - self.held_by_others, planned - reading.reserved
        if taken <= 0 or reading.device_free >= wanted:
            return None
        return (
            f"Another process has taken {format_size(taken)} of this GPU since the first step: "
            f"{format_size(reading.device_free)} are free, and the plan may want {format_size(wanted)} more. "
            "`hf-vla doctor` says who holds what."
        )

    def _tell_once(self, state, kind: str, trouble: str | None) -> None:
        """Tell a trouble when it begins, and again only after it has ended."""
        if trouble is None:
            self.troubles.discard(kind)
        elif kind not in self.troubles:
            self.troubles.add(kind)
            logger.warning("Step %d: %s", state.global_step, trouble)
            if state.is_world_process_zero:  # run.json has one writer
                add_event(self.directory, state.global_step, kind, trouble)

    def _serve_snapshot(self, step: int) -> None:
        if self.is_recording:
            self._dump_snapshot(step)
        elif self._is_time_to_look() and (self.directory / SNAPSHOT).exists():
            self._begin_snapshot()

    def _is_time_to_look(self) -> bool:
        now = time.monotonic()
        if now < self._looked + SECONDS_BETWEEN_LOOKS:
            return False
        self._looked = now
        return True

    def _begin_snapshot(self) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.memory._record_memory_history(max_entries=SNAPSHOT_ENTRIES)
            self.is_recording = True
        else:
            logger.warning("No GPU is used, so there is no memory snapshot to take.")
            (self.directory / SNAPSHOT).unlink()

    def _dump_snapshot(self, step: int) -> None:
        path = self.directory / f"{SNAPSHOT}_{step}.pickle"
        torch.cuda.memory._dump_snapshot(str(path))
        torch.cuda.memory._record_memory_history(enabled=None)
        self.is_recording = False
        (self.directory / SNAPSHOT).unlink(missing_ok=True)
        logger.info("Memory snapshot of step %d: %s", step, path)


def read_memory() -> Reading:
    """Read the allocator's counters and the device's; only the host's where CUDA isn't in use."""
    host_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if not torch.cuda.is_initialized():
        return Reading(host_rss=host_rss)
    stats = torch.cuda.memory_stats()
    free, total = torch.cuda.mem_get_info()
    return Reading(
        allocated_peak=stats["allocated_bytes.all.peak"],
        reserved_peak=stats["reserved_bytes.all.peak"],
        device_used=total - free,
        retries=stats["num_alloc_retries"],
        reserved=stats["reserved_bytes.all.current"],
        device_free=free,
        host_rss=host_rss,
    )


def log_values(reading: Reading) -> dict[str, float]:
    """Give what a person follows during the run: GiB and the count of retries, of what was measured."""
    shown = ("allocated_peak", "reserved_peak", "device_used", "host_rss")
    values = reading._asdict()
    logs = {f"memory/{key}_gib": round(values[key] / GIB, 3) for key in shown if values[key] is not None}
    return logs if reading.retries is None else {**logs, "memory/retries": reading.retries}


def append(file: int, line: bytes) -> None:
    """Append a line at once, and whole or not at all: neither a kill nor a full disk leaves half of one.

    Raises:
        OSError: if there is no room for it.
    """
    written = os.write(file, line)
    if written < len(line):
        os.ftruncate(file, os.fstat(file).st_size - written)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
