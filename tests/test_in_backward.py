"""The optimizer inside the backward pass: same numbers as outside it, one gradient at a time, and out of memory."""

import json

import pytest
import torch

from hf_vla.memory.budget import MemoryBudgetError
from hf_vla.memory.ranks import RESTART
from hf_vla.prepare import build_trainer
from hf_vla.recipe import RecipeError
from hf_vla.run import read_info
from tests.tiny_run import tiny_recipe


def recipe(in_backward: bool = True, dropout: float = 0.0, **training):
    plan = {
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "linear",
        "weight_decay": 0.1,
        "save_strategy": "no",
        **training,
    }
    model = {"fusion": {"dropout": dropout}, "head": {"type": "flow"}}
    return tiny_recipe(model=model, training=plan, memory={"optimizer_in_backward": in_backward})


def trained(trainer, **kwargs) -> dict[str, torch.Tensor]:
    trainer.train(**kwargs)
    return weights_of(trainer)


def weights_of(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.bare_model().named_parameters()}


def assert_equal(weights: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert [name for name in expected if not torch.equal(weights[name], expected[name])] == []


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adafactor", "adamw_bnb_8bit"])
def test_it_gives_the_ordinary_optimizers_weights(tmp_path, optim):
    if "bnb" in optim:
        pytest.importorskip("bitsandbytes")
    plan = {"optim": optim, "max_steps": 3, "logging_steps": 1}
    trainer = build_trainer(recipe(**plan), tmp_path / "in")
    weights = trained(trainer)
    ordinary = build_trainer(recipe(in_backward=False, **plan), tmp_path / "out")
    assert_equal(weights, trained(ordinary))
    rates = [[e["learning_rate"] for e in t.state.log_history if "loss" in e] for t in (trainer, ordinary)]
    assert rates[0] == rates[1] == pytest.approx([1e-3, 2e-3 / 3, 1e-3 / 3])
    assert "grad_norm" not in trainer.state.log_history[0]


def test_one_gradient_is_alive_at_a_time(tmp_path):
    trainer = build_trainer(recipe(max_steps=2), tmp_path)
    model, alive = trainer.bare_model(), []
    for parameter in filter(lambda parameter: parameter.requires_grad, model.parameters()):
        parameter.register_post_accumulate_grad_hook(
            lambda parameter: alive.append(sum(p.grad is not None for p in model.parameters()))
        )
    trainer.train()
    assert set(alive) == {1}


def test_resuming_is_exact(tmp_path):
    plan = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    straight = trained(build_trainer(recipe(dropout=0.1, **plan), tmp_path))
    resumed = build_trainer(recipe(dropout=0.1, **plan), tmp_path)
    assert_equal(trained(resumed, resume_from_checkpoint=str(tmp_path / "checkpoint-2")), straight)


def run_short_of_memory(trainer, first_step: int, is_enough: bool = True) -> None:
    """From a step on, let memory run out in the backward, unless activations are recomputed and that is enough."""
    model = trainer.bare_model()

    def check(gradient: torch.Tensor) -> None:
        is_saving = is_enough and model.model.fusion.blocks[0].gradient_checkpointing
        if trainer.state.global_step >= first_step and not is_saving:
            raise torch.OutOfMemoryError("injected")

    def watch(module, args, context) -> None:
        if context.requires_grad:
            context.register_hook(check)

    model.model.fusion.register_forward_hook(watch)


def test_a_rehearsal_that_fails_goes_one_rung_on_and_changes_no_number(tmp_path):
    expected = trained(build_trainer(recipe(dropout=0.1), tmp_path / "undisturbed"))
    trainer = build_trainer(recipe(dropout=0.1), tmp_path / "short")
    run_short_of_memory(trainer, first_step=0)
    assert_equal(trained(trainer), expected)
    events = read_info(tmp_path / "short")["events"]
    assert ["can't be cut: going on with activation checkpointing" in event["text"] for event in events] == [True]


def test_when_no_rehearsal_passes_the_run_ends_with_its_weights_as_they_were(tmp_path):
    trainer = build_trainer(recipe(), tmp_path)
    before = weights_of(trainer)
    run_short_of_memory(trainer, first_step=0, is_enough=False)
    with pytest.raises(MemoryBudgetError, match="Step 0 is saved"):
        trainer.train()
    assert_equal(weights_of(trainer), before)
    assert (tmp_path / "checkpoint-0/model.safetensors").is_file()


def test_a_step_that_fails_midway_is_not_run_again_but_restarted(tmp_path):
    """Another process takes memory at step 3, after its rehearsal has proven it long ago."""
    plan = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    expected = trained(build_trainer(recipe(**plan), tmp_path / "undisturbed"))
    trainer = build_trainer(recipe(**plan), tmp_path / "run")
    run_short_of_memory(trainer, first_step=3)
    with pytest.raises(SystemExit) as stopped:
        trainer.train()
    assert stopped.value.code == RESTART
    found = json.loads((tmp_path / "run/micro_batch.json").read_text())
    assert found == {"size": 4, "rungs": ["activation checkpointing"]}
    resumed = build_trainer(recipe(**plan), tmp_path / "run")
    run_short_of_memory(resumed, first_step=3)
    assert_equal(trained(resumed, resume_from_checkpoint=str(tmp_path / "run/checkpoint-2")), expected)


def test_half_precision_is_refused():
    with pytest.raises(RecipeError, match="fp16"):
        recipe(fp16=True)
