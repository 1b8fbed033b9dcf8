"""Where a step can't be run again, all ranks stop at once, and the launcher goes on from the last checkpoint."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_vla.run import MODEL, read_info
from tests.distributed.launch import torchrun

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def test_ranks_that_wait_for_one_that_stopped_are_started_again(tmp_path):
    """Rank 0 waits in the collective that averages a gradient, when rank 1 stops; torchrun ends and restarts both."""
    script = Path(__file__).with_name("train_restarted.py")
    code, output = torchrun(script, tmp_path, options=("--max-restarts", "1"))
    assert code == 0, output[-4000:]
    assert "exitcode: 75" in output or "exitcode  : 75" in output
    found = json.loads((tmp_path / "run/micro_batch.json").read_text())
    assert found == {"size": 4, "rungs": ["activation checkpointing"]}
    assert "micro_batch_agreed" in [event["kind"] for event in read_info(tmp_path / "run")["events"]]
    weights, expected = (load_file(tmp_path / name / MODEL / "model.safetensors") for name in ("run", "undisturbed"))
    assert [name for name in expected if not torch.equal(weights[name], expected[name])] == []
