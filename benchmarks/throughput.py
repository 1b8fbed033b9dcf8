"""Samples a second of a loader, counted alike for whoever's it is: it runs in both environments, and needs neither.

A loader's process imports its project once, and measures each setting in a fork of its own: no loader finds another's
workers, decoders or threads.
"""

import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor


def samples_per_second(sizes: Iterator[int], warm_up: float, seconds: float) -> float:
    """Go through a loader, and count once it is warm.

    Args:
        sizes: of its batches, without end.
        warm_up: seconds before counting begins, with the next batch.
        seconds: to count for, at least.
    """
    begin = time.perf_counter()
    for _ in sizes:
        if time.perf_counter() - begin >= warm_up:
            break
    start, samples = time.perf_counter(), 0
    for size in sizes:
        samples += size
        if time.perf_counter() - start >= seconds:
            break
    return samples / (time.perf_counter() - start)


def serve(speed: Callable[..., float]) -> None:
    """Measure what each line of the standard input asks for, a JSON list of arguments, and answer with a line of JSON."""
    context = multiprocessing.get_context("fork")
    for line in sys.stdin:
        with ProcessPoolExecutor(1, context) as measuring:
            print(json.dumps(measuring.submit(speed, *json.loads(line)).result()), flush=True)
