"""Out of memory while VGGT runs ahead of a step: fewer pairs at once, and nothing else changes."""

import pytest
import torch

from hf_vla.prepare import build_trainer
from hf_vla.run import read_info
from tests.faults.shortage import Shortage, in_forward
from tests.test_encode_ahead import ACCUMULATION, BATCH, STEP, STEPS, Outcome, recipe, run
from tests.test_lookahead import assert_same_bits, overlapped
from tests.tiny_run import TINY_VGGT


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Outcome:
    return run(build_trainer(recipe(STEP), tmp_path_factory.mktemp("undisturbed")))


def in_encoding(trainer, shortage: Shortage) -> None:
    """Fail as VGGT begins."""
    trainer.bare_model().model.vggt.register_forward_pre_hook(lambda module, args: shortage.check(args[0]))


def assert_same(outcome: Outcome, expected: Outcome) -> None:
    assert outcome.losses == pytest.approx(expected.losses, rel=1e-5)
    for name, weight in outcome.weights.items():
        torch.testing.assert_close(weight, expected.weights[name], rtol=1e-5, atol=1e-6, msg=name)


def texts(directory) -> list[str]:
    return [event["text"] for event in read_info(directory)["events"]]


@pytest.mark.parametrize("call", [0, 1], ids=["first_step", "second_step"])
def test_pairs_that_dont_fit_at_once_are_encoded_in_smaller_pieces(tmp_path, undisturbed, call):
    trainer = build_trainer(recipe(STEP), tmp_path)
    in_encoding(trainer, Shortage(rows=3, when=lambda n: n >= call))
    outcome = run(trainer)
    assert_same(outcome, undisturbed)
    assert outcome.pairs == [STEP] * call + [3] * 4 * (STEPS - call)  # those that went through
    assert [text.partition("from now on ")[2] for text in texts(tmp_path)] == [
        "encoding 6 at once.",
        "encoding 3 at once.",
    ]
    assert {event["step"] for event in read_info(tmp_path)["events"]} == {call}


def test_where_not_one_pair_fits_ahead_each_micro_step_encodes_its_own(tmp_path, undisturbed):
    trainer = build_trainer(recipe(2), tmp_path)
    in_encoding(trainer, Shortage(rows=0, when=lambda call: call < 2))
    outcome = run(trainer)
    assert_same(outcome, undisturbed)
    assert outcome.pairs == [BATCH] * ACCUMULATION * STEPS
    assert "each micro-step encodes its own" in texts(tmp_path)[-1]


def test_features_that_cant_be_gathered_are_encoded_again_in_smaller_pieces(tmp_path, undisturbed, monkeypatch):
    trainer = build_trainer(recipe(STEP), tmp_path)
    stack = torch.stack

    def fail_once(tensors, **options):
        if tensors[0].shape == (2, 2**2, 2 * TINY_VGGT["embed_dim"]):
            monkeypatch.undo()
            raise torch.OutOfMemoryError("injected")
        return stack(tensors, **options)

    monkeypatch.setattr(torch, "stack", fail_once)
    outcome = run(trainer)
    assert_same(outcome, undisturbed)
    assert outcome.pairs == [STEP, *[STEP // 2] * 2 * STEPS]


def test_a_step_that_is_run_again_in_pieces_doesnt_run_vggt_again(tmp_path, undisturbed):
    trainer = build_trainer(recipe(STEP), tmp_path)
    in_forward(trainer.bare_model(), Shortage(rows=1, when=lambda call: call > 0))
    outcome = run(trainer)
    assert_same(outcome, undisturbed)
    assert trainer.batcher.fit.size == 1
    assert outcome.pairs == [STEP] * STEPS


def test_what_was_found_to_fit_is_kept_in_the_checkpoint(tmp_path):
    first = build_trainer(recipe(STEP, max_steps=1, save_strategy="steps", save_steps=1), tmp_path)
    in_encoding(first, Shortage(rows=3))
    first.train()
    resumed = build_trainer(recipe(STEP), tmp_path)
    shortage = Shortage(rows=3)
    in_encoding(resumed, shortage)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert (resumed.ahead.pairs, shortage.failures) == (3, 0)


def given_up(directory) -> list[int]:
    """The steps in which the overlap was given up."""
    return [event["step"] for event in read_info(directory)["events"] if event["kind"] == "overlap_given_up"]


def test_where_the_next_steps_pairs_dont_fit_beside_this_one_they_are_encoded_in_turn(tmp_path, undisturbed):
    trainer = build_trainer(overlapped(recipe(STEP)), tmp_path)
    in_encoding(trainer, Shortage(rows=0, when=lambda call: call == 1))
    outcome = run(trainer)
    assert_same_bits(outcome, undisturbed)
    assert trainer.ahead.pairs == STEP  # as many as ever
    assert given_up(tmp_path) == [0]
    assert not trainer.is_uncut


def test_a_step_that_runs_out_beside_vggt_ends_the_overlap_and_uses_what_is_encoded(tmp_path, undisturbed):
    trainer = build_trainer(overlapped(recipe(STEP)), tmp_path)
    in_forward(trainer.bare_model(), Shortage(rows=1))
    outcome = run(trainer)
    assert_same(outcome, undisturbed)
    assert trainer.batcher.fit.size == 1
    assert outcome.pairs == [STEP] * STEPS
    assert given_up(tmp_path) == [0]


def test_that_the_overlap_was_given_up_is_kept_in_the_checkpoint(tmp_path):
    first = build_trainer(overlapped(recipe(STEP, max_steps=1, save_strategy="steps", save_steps=1)), tmp_path)
    in_encoding(first, Shortage(rows=0, when=lambda call: call == 1))
    first.train()
    resumed = build_trainer(overlapped(recipe(STEP)), tmp_path)
    assert not resumed.lookahead.is_given_up
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert resumed.lookahead.is_given_up
    assert given_up(tmp_path) == [0]  # and not told again
