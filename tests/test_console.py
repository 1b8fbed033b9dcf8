"""What a person reads on the terminal when a program ends before it has begun."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("program", ["hf_vla.cli", "hf_vla.train"])
def test_ctrl_c_while_libraries_are_imported_shows_no_traceback(tmp_path, program):
    slow = "import time; print('importing', flush=True); time.sleep(60)"
    (tmp_path / "transformers.py").write_text(slow)
    process = subprocess.Popen(
        [sys.executable, "-m", program, "--help"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == ("", "")
    assert process.returncode == -signal.SIGINT
