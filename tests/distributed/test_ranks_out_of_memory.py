"""Memory runs out on one of two ranks: none waits for ever, both end alike, and as if nothing had happened."""

from pathlib import Path

import pytest
import torch

from hf_vla.prepare import build_trainer
from hf_vla.run import read_info
from tests.distributed.launch import torchrun
from tests.distributed.scenarios import SCENARIOS, outcome_of, plain

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """All scenarios, trained by two processes one after the other: starting them is what takes long."""
    folder = tmp_path_factory.mktemp("two_ranks")
    code, output = torchrun(Path(__file__).with_name("train_scenarios.py"), folder)
    assert code == 0, output[-4000:]
    return folder


def outcome(folder: Path, name: str, rank: int = 0) -> dict:
    return torch.load(folder / f"{name}-{rank}.pt")


def assert_same(weights: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], **tolerance: float) -> None:
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, expected[name], **tolerance, msg=name)


@pytest.mark.parametrize("name", SCENARIOS)
def test_both_ranks_end_with_the_same_weights(folder, name):
    assert_same(outcome(folder, name, 1)["weights"], outcome(folder, name, 0)["weights"], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["forward", "backward"])
def test_a_rank_out_of_memory_changes_no_number(folder, name):
    found, expected = outcome(folder, name), outcome(folder, "undisturbed")
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-4)
    assert_same(found["weights"], expected["weights"], rtol=1e-4, atol=1e-6)
    assert found["steps"] == expected["steps"] == 2


@pytest.mark.parametrize("name", ["forward", "backward"])
def test_both_ranks_go_on_with_the_smaller_size(folder, name):
    assert {outcome(folder, name, rank)["size"] for rank in (0, 1)} == {SCENARIOS[name].rows}
    kind = "micro_batch_agreed" if SCENARIOS[name].rank else "out_of_memory"
    assert {event["kind"] for event in read_info(folder / name)["events"]} == {kind}


def test_ranks_draw_apart(folder):
    assert outcome(folder, "undisturbed", 0)["draw"] != outcome(folder, "undisturbed", 1)["draw"]


def test_when_nothing_fits_on_one_rank_both_end_together_with_a_checkpoint(folder):
    for rank in (0, 1):
        assert "Step 0 is saved" in outcome(folder, "exhausted", rank)["error"]
    assert (folder / "exhausted/checkpoint-0/trainer_state.json").is_file()


def test_two_processes_train_what_one_does_with_twice_the_accumulation(folder, tmp_path):
    alone = outcome_of(build_trainer(plain(2), tmp_path))
    together = outcome(folder, "plain")
    assert together["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    assert_same(together["weights"], alone["weights"], rtol=1e-4, atol=1e-6)
