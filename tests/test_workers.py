"""Worker processes end when their parent does, and at Ctrl-C without a word."""

import os
import signal
import subprocess
import sys

PROGRAM = """
import os, time
from concurrent.futures import ProcessPoolExecutor

from hf_vla.console import end_quietly_when_interrupted
from hf_vla.workers import WORKERS

end_quietly_when_interrupted()
with ProcessPoolExecutor(1, WORKERS) as pool:
    print(pool.submit(os.getpid).result(), flush=True)
    pool.submit(time.sleep, 60).result()
"""


def start() -> subprocess.Popen:
    """Start a program in a process group of its own, as a terminal does, and wait until its worker works."""
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", PROGRAM]
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    process.stdout.readline()
    return process


def test_ctrl_c_reaches_all_and_none_explains_itself():
    process = start()
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=30) == ("", "")
    assert process.returncode == -signal.SIGINT


def test_a_worker_does_not_outlive_a_parent_that_was_killed():
    process = start()
    process.kill()
    process.communicate(timeout=30)  # which a worker that lives would hold open
    assert process.returncode == -signal.SIGKILL
