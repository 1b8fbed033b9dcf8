"""Out of memory at every phase of a training: the run must end as if nothing had happened, and say that it did."""

import functools
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from transformers import Trainer

import hf_vla.trainer
from hf_vla.memory.budget import MemoryBudgetError
from hf_vla.memory.microbatch import Fit
from hf_vla.memory.out_of_memory import free_cache
from hf_vla.prepare import build_trainer
from hf_vla.run import read_info
from tests.faults.shortage import PLACES, Shortage, in_evaluation, in_forward
from tests.tiny_run import tiny_recipe

STEPS, ACCUMULATION, BATCH = 2, 2, 4

RANDOM = {
    "model": {
        "freeze_vggt": True,
        "freeze_lang_encoder": True,
        "fusion": {"dropout": 0.2},
        "head": {"type": "flow"},
    },
    "lora": {"apply_to": ["lang_encoder", "vggt"], "r": 4, "lora_dropout": 0.2},
}


def recipe(**training):
    """A recipe with everything random that there is: dropout in fusion and adapters, draws of the flow head."""
    plan = {
        "max_steps": STEPS,
        "gradient_accumulation_steps": ACCUMULATION,
        "lr_scheduler_type": "linear",
        "logging_steps": 1,
        "save_strategy": "no",
        "adam_epsilon": 1e-3,  # a key's bias has no gradient but rounding errors, which a smaller one would blow up
        **training,
    }
    return tiny_recipe(**RANDOM, training=plan)


class Outcome(NamedTuple):
    """What a run came to."""

    log: list[dict]
    weights: dict[str, torch.Tensor]
    events: list[dict]


def run(trainer) -> Outcome:
    trainer.train()
    timeless = [
        {k: v for k, v in entry.items() if not k.endswith(("_runtime", "_second"))}
        for entry in trainer.state.log_history
    ]
    return Outcome(timeless, weights_of(trainer), read_info(trainer.args.output_dir).get("events", []))


def weights_of(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.bare_model().named_parameters() if p.requires_grad}


@functools.cache
def undisturbed(checkpointing: bool, folder: Path) -> Outcome:
    return run(build_trainer(recipe(activation_checkpointing=checkpointing), folder / f"undisturbed-{checkpointing}"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("undisturbed")


def assert_same(outcome: Outcome, expected: Outcome) -> None:
    """Same losses, learning rates, gradient norms, evaluations and steps, same weights, to float tolerance."""
    assert len(outcome.log) == len(expected.log)
    for entry, wanted in zip(outcome.log, expected.log, strict=True):
        assert entry == pytest.approx(wanted, rel=1e-4), "the log differs"
    assert_same_weights(outcome.weights, expected.weights)


def assert_same_weights(weights: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(0, id="first_micro_step"),
        pytest.param(1, id="second_micro_step"),
        pytest.param(2, id="second_step", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("place", PLACES)
def test_a_step_that_did_not_fit_leaves_no_trace_in_the_numbers(tmp_path, folder, place, call):
    checkpointing = place == "recomputation"
    trainer = build_trainer(recipe(activation_checkpointing=checkpointing), tmp_path)
    shortage = Shortage(rows=1, when=lambda n: n >= call)
    PLACES[place](trainer.bare_model(), shortage)
    outcome = run(trainer)
    assert_same(outcome, undisturbed(checkpointing, folder))
    assert trainer.batcher.fit.size == 1
    assert shortage.failures >= 2
    assert [event["kind"] for event in outcome.events] == ["out_of_memory"] * 2
    assert {event["step"] for event in outcome.events} == {call // ACCUMULATION}
    assert "pieces of 2" in outcome.events[0]["text"]
    assert "pieces of 1" in outcome.events[1]["text"]


def test_a_size_that_fits_ends_the_search(tmp_path, folder):
    trainer = build_trainer(recipe(), tmp_path)
    in_forward(trainer.bare_model(), Shortage(rows=2))
    outcome = run(trainer)
    assert_same(outcome, undisturbed(False, folder))
    assert trainer.batcher.fit.size == 2
    assert len(outcome.events) == 1


def test_evaluation_goes_on_in_pieces(tmp_path, folder):
    def evaluated(directory: Path, shortage: Shortage) -> tuple[dict, Outcome]:
        trainer = build_trainer(recipe(max_steps=2, eval_strategy="steps", eval_steps=1), directory)
        trainer.eval_dataset = torch.utils.data.Subset(trainer.eval_dataset, range(6))  # a whole batch and half of one
        in_evaluation(trainer.bare_model(), shortage)
        return trainer, run(trainer)

    _, expected = evaluated(tmp_path / "undisturbed", Shortage(rows=99))
    trainer, outcome = evaluated(tmp_path / "short", Shortage(rows=1))
    assert_same(outcome, expected)  # the second step's dropout and noise too: evaluation drew as often
    assert [entry["eval_loss"] for entry in outcome.log if "eval_loss" in entry]
    assert trainer.evaluation_batcher.sizes == [1]
    assert trainer.batcher.fit.size == BATCH
    assert len(outcome.events) == 2
    assert all("can't be evaluated at once" in event["text"] for event in outcome.events)


def test_an_evaluation_that_cannot_be_done_ends_the_run_with_its_reason(tmp_path):
    trainer = build_trainer(recipe(max_steps=1, eval_strategy="steps", eval_steps=1), tmp_path)
    in_evaluation(trainer.bare_model(), Shortage(rows=0))
    with pytest.raises(MemoryBudgetError, match="Evaluation doesn't fit"):
        trainer.train()


@pytest.mark.parametrize("what", ["save_checkpoint", "_save_optimizer_and_scheduler"])
def test_saving_is_tried_again(tmp_path, folder, monkeypatch, what):
    owner = hf_vla.trainer if what == "save_checkpoint" else Trainer
    save, calls = getattr(owner, what), []

    def fail_once(*args, **kwargs):
        calls.append(what)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("injected")
        return save(*args, **kwargs)

    monkeypatch.setattr(owner, what, fail_once)
    plan = recipe(save_strategy="steps", save_steps=1)
    outcome = run(build_trainer(plan, tmp_path))
    assert_same(outcome, undisturbed(False, folder))
    assert [event["kind"] for event in outcome.events] == ["out_of_memory"]
    resumed = build_trainer(plan, tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert_same_weights(weights_of(resumed), outcome.weights)


def test_what_was_found_to_fit_is_kept_in_the_checkpoint(tmp_path):
    first = build_trainer(recipe(max_steps=1, save_strategy="steps", save_steps=1), tmp_path)
    in_forward(first.bare_model(), Shortage(rows=2))
    first.train()
    resumed = build_trainer(recipe(max_steps=2), tmp_path)
    shortage = Shortage(rows=2)
    in_forward(resumed.bare_model(), shortage)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert resumed.batcher.fit == Fit(2)
    assert shortage.failures == 0
    assert read_info(tmp_path)["events"][-1]["kind"] == "micro_batch_agreed"


def test_the_size_grows_back_and_waits_longer_where_that_fails(tmp_path):
    """Two rows fit for good; the first trial of four fails, later ones don't."""
    trainer = build_trainer(recipe(max_steps=12, gradient_accumulation_steps=1), tmp_path)
    trainer.batcher.grow_after = 2
    in_forward(trainer.bare_model(), Shortage(rows=2, when=lambda call: call < 2))
    events = run(trainer).events
    steps = [(event["step"], event["kind"]) for event in events]
    # step 0 fails; after two clean ones four are tried, in vain; the next trial comes after four, and holds
    assert steps == [(0, "out_of_memory"), (1, "micro_batch_grown"), (2, "out_of_memory"), (5, "micro_batch_grown")]
    assert trainer.batcher.fit.size == BATCH


def test_growing_wants_headroom(tmp_path, monkeypatch):
    monkeypatch.setattr(hf_vla.trainer, "has_headroom", lambda size, larger: False)
    trainer = build_trainer(recipe(max_steps=4, gradient_accumulation_steps=1), tmp_path)
    trainer.batcher.grow_after = 1
    in_forward(trainer.bare_model(), Shortage(rows=2))
    trainer.train()
    assert trainer.batcher.fit.size == 2


def fits_with_checkpointing_only(model: torch.nn.Module, is_enough: bool = True) -> None:
    """Let no row fit until activations are recomputed."""

    def watch(module, args):
        if module.training and not (is_enough and model.is_activation_checkpointing):
            raise torch.OutOfMemoryError("injected")

    model.model.fusion.register_forward_pre_hook(watch)


def test_activation_checkpointing_is_the_next_rung(tmp_path, folder):
    plan = {"save_strategy": "steps", "save_steps": STEPS}
    trainer = build_trainer(recipe(**plan), tmp_path)
    fits_with_checkpointing_only(trainer.bare_model())
    outcome = run(trainer)
    assert_same(outcome, undisturbed(False, folder))
    assert "going on with activation checkpointing" in outcome.events[-1]["text"]
    assert trainer.batcher.fit == Fit(1, rungs=1)

    resumed = build_trainer(recipe(**plan | {"max_steps": STEPS + 1}), tmp_path)
    fits_with_checkpointing_only(resumed.bare_model())
    before = len(outcome.events)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS}"))
    assert [event["kind"] for event in read_info(tmp_path)["events"][before:]] == ["micro_batch_agreed"]


@pytest.mark.parametrize("step", [0, 1])
def test_when_nothing_is_left_the_run_ends_with_nothing_lost(tmp_path, folder, step):
    """A checkpoint is written, and going on from it with more memory gives what an undisturbed run gives."""
    trainer = build_trainer(recipe(), tmp_path)
    trainer.what_fits = lambda recipe: "Batches of half a sample fit."
    in_forward(trainer.bare_model(), Shortage(rows=0, when=lambda call: call > step * ACCUMULATION))
    with pytest.raises(MemoryBudgetError, match="half a sample") as caught:
        trainer.train()
    assert f"Step {step} is saved" in str(caught.value)
    assert "nothing is left to try" in read_info(tmp_path)["events"][-1]["text"]
    checkpoint = tmp_path / f"checkpoint-{step}"
    (checkpoint / "micro_batch.json").write_text('{"size": 4, "rungs": []}')  # more memory
    resumed = build_trainer(recipe(), tmp_path)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == STEPS
    if step:  # at an epoch's first step Trainer's loader draws once more after resuming, and dropout differs
        assert_same_weights(weights_of(resumed), undisturbed(False, folder).weights)


@pytest.mark.gpu
def test_on_a_gpu_with_less_memory_than_the_step_wants(tmp_path, monkeypatch):
    """The allocator itself refuses, somewhere in the step; nothing is injected."""
    sizes = {
        "vggt": {"img_size": 112, "embed_dim": 256, "depth": 2, "num_heads": 4, "encoder_depth": 2},
        **{name: value for name, value in RANDOM["model"].items() if name != "freeze_vggt"},
    }
    plan = {"max_steps": 3, "use_cpu": False, "logging_steps": 1, "save_strategy": "no", "adam_epsilon": 1e-3}
    wide = tiny_recipe(
        model=sizes,
        lora={"apply_to": ["lang_encoder"], "r": 4, "lora_dropout": 0.2},
        data={"batch_size": 32, "image_size": 112},
        training=plan,
    )
    monkeypatch.setattr(hf_vla.trainer, "has_headroom", lambda size, larger: False)
    torch.cuda.reset_peak_memory_stats()
    trainer = build_trainer(wide, tmp_path / "undisturbed")
    resting = torch.cuda.memory_allocated()
    expected = run(trainer)
    wanted = torch.cuda.max_memory_allocated()
    del trainer
    free_cache()
    _, total = torch.cuda.mem_get_info()
    try:
        torch.cuda.set_per_process_memory_fraction((resting + (wanted - resting) * 0.6) / total)
        trainer = build_trainer(wide, tmp_path / "short")
        outcome = run(trainer)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert trainer.batcher.fit.size < 32
    assert outcome.events
    for name, tensor in outcome.weights.items():
        torch.testing.assert_close(tensor, expected.weights[name], rtol=1e-3, atol=1e-4, msg=name)
