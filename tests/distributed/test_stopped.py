"""One of two real processes is asked to stop: both stop after the same step, with a checkpoint, and none waits."""

from pathlib import Path

import pytest

from hf_vla import saving
from hf_vla.run import read_info
from tests.distributed.launch import torchrun
from tests.distributed.train_stopped import AT_STEP

pytestmark = pytest.mark.distributed


def test_what_one_rank_is_asked_all_do(tmp_path):
    code, output = torchrun(Path(__file__).with_name("train_stopped.py"), tmp_path)
    assert code == 0, output[-4000:]
    assert [(tmp_path / f"code-{rank}").read_text() for rank in (0, 1)] == ["143", "143"]
    assert saving.find(tmp_path / "run").checkpoint.name == f"checkpoint-{AT_STEP + 1}"
    assert [event["kind"] for event in read_info(tmp_path / "run")["events"]] == ["stopped"]
