"""Processes that do a share of a long job: they never outlive who started them, nor explain themselves at Ctrl-C."""

import multiprocessing
import os
import signal
import threading
from multiprocessing.context import SpawnContext, SpawnProcess

INTERRUPT = {signal.SIGINT}


class _Worker(SpawnProcess):
    """Ends at once and without a word: at Ctrl-C, which a terminal sends to all processes alike, or left by its parent."""

    def start(self) -> None:
        """Start with Ctrl-C held back until `run`: while a process imports, nothing in it decides what that does."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, INTERRUPT)
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def run(self) -> None:
        """Work; a pool's worker whose parent was killed would else wait for its next job for ever."""
        threading.Thread(target=_end_with_parent, daemon=True).start()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, INTERRUPT)
        super().run()


class _Context(SpawnContext):
    Process = _Worker


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


WORKERS = _Context()
"""For `ProcessPoolExecutor`: fresh processes, since forked ones would share torch's locks and a simulator's graphics."""
