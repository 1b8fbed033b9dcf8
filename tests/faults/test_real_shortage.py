"""Memory that really runs out: the system refuses a training process more, and the step goes through in pieces."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_vla.memory.out_of_memory import Attempt
from hf_vla.run import read_info


def train_within(output: Path, allowed: int | None = None) -> dict[str, int]:
    """Train in a process of its own, whose large tensors go back to the system as soon as they are freed."""
    command = [sys.executable, "-m", "tests.faults.train_within", output, *([] if allowed is None else [str(allowed)])]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads((output / "grown.json").read_text())


@pytest.mark.skipif(sys.platform != "linux", reason="other systems don't hold a process to its address space")
def test_a_step_that_the_system_has_no_memory_for_goes_through_in_pieces(tmp_path):
    whole = train_within(tmp_path / "whole")
    pieces = train_within(tmp_path / "pieces", whole["grown"] // 2)
    assert pieces["size"] < whole["size"]
    assert {event["kind"] for event in read_info(tmp_path / "pieces")["events"]} == {"out_of_memory"}
    expected = load_file(tmp_path / "whole/weights.safetensors")
    for name, weight in load_file(tmp_path / "pieces/weights.safetensors").items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ],
)
def test_libraries_that_got_nothing_from_the_driver_are_out_of_memory_too(text):
    with Attempt() as attempt:
        raise RuntimeError(text)
    assert attempt.failed


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("CUDA error: out of memory")])
def test_other_errors_go_their_way(error):
    with pytest.raises(type(error)), Attempt():
        raise error
