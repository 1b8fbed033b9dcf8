"""A sharded training equals the unsharded one, and one rank out of memory in its forward costs it a restart, no work."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_vla.checkpoint import load_checkpoint
from hf_vla.run import MODEL
from tests.distributed.launch import torchrun

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def test_shards_train_as_the_whole_and_go_on_smaller_from_the_checkpoint(tmp_path):
    code, output = torchrun(Path(__file__).with_name("train_sharded.py"), tmp_path, options=("--max-restarts", "1"))
    assert code == 0, output[-4000:]
    assert "exitcode: 75" in output or "exitcode  : 75" in output
    assert json.loads((tmp_path / "sharded/micro_batch.json").read_text()) == {"size": 2, "rungs": []}
    assert losses(tmp_path / "sharded") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)
    weights, expected = (load_file(tmp_path / name / MODEL / "model.safetensors") for name in ("sharded", "whole"))
    torch.testing.assert_close(weights, expected, rtol=1e-3, atol=1e-4)
    model, _, _ = load_checkpoint(tmp_path / "sharded/checkpoint-2")
    assert {name: value.shape for name, value in model.state_dict().items()} == {
        n: v.shape for n, v in expected.items()
    }


def losses(run: Path) -> list[float]:
    log = json.loads((run / "log_history.json").read_text())
    return [line["loss"] for line in log if "loss" in line]
