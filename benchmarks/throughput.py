"""Samples a second of a loader, counted alike for whoever's it is: it runs in both environments, and needs neither.

A loader's process imports its project once, and measures each setting in a fork of its own: no loader finds another's
workers, decoders or threads.
"""

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path


def measure(sizes: Iterator[int], warm_up: float, seconds: float) -> dict[str, float]:
    """Go through a loader, and count once it is warm.

    Args:
        sizes: of its batches, without end.
        warm_up: seconds before counting begins, with the next batch.
        seconds: to count for, at least.

    Returns:
        `samples_per_second` by the clock, and `processor_ms` of all its processes for a sample, which others on the machine
        change less.
    """
    begin = time.perf_counter()
    for _ in sizes:
        if time.perf_counter() - begin >= warm_up:
            break
    start, worked, samples = time.perf_counter(), processor_seconds(), 0
    for size in sizes:
        samples += size
        if time.perf_counter() - start >= seconds:
            break
    took = time.perf_counter() - start
    return {"samples_per_second": samples / took, "processor_ms": 1000 * (processor_seconds() - worked) / samples}


def processor_seconds() -> float:
    """Add up the processor time of this process and its workers."""
    total = time.process_time()
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        total += sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")
    return total


def serve(speed: Callable[..., dict[str, float]]) -> None:
    """Measure what each line of the standard input asks for, a JSON list of arguments, and answer with a line of JSON."""
    context = multiprocessing.get_context("fork")
    for line in sys.stdin:
        with ProcessPoolExecutor(1, context) as measuring:
            print(json.dumps(measuring.submit(speed, *json.loads(line)).result()), flush=True)
