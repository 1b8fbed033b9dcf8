"""Out of memory in the optimizer's update: run again where nothing has moved, and a stop in words where something has."""

import itertools
import sys

import pytest
import torch
from torch.overrides import TorchFunctionMode
from transformers import Adafactor

from hf_vla.memory.ranks import RESTART
from hf_vla.memory.update import _forget_new_states, count_changes, first_updated, guard_update, weights_alike
from hf_vla.prepare import build_trainer
from hf_vla.run import read_info
from tests.faults.test_out_of_memory import (
    STEPS,
    assert_same,
    assert_same_weights,
    recipe,
    run,
    undisturbed,
    weights_of,
)

GROUPS = 2
"""Of parameters, with weight decay and without: each makes its states, and moves, as its turn comes."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("undisturbed")


def fail_on(monkeypatch, calls: set[int]) -> None:
    """Run out of memory at some of the calls of the optimizer's arithmetic, one a group and update."""
    module = sys.modules["torch.optim.adam"]  # torch.optim deletes the name
    compute, done = module.adam, []

    def compute_or_fail(*args, **kwargs):
        done.append(args)
        if len(done) - 1 in calls:
            raise torch.OutOfMemoryError("injected")
        return compute(*args, **kwargs)

    monkeypatch.setattr(module, "adam", compute_or_fail)


@pytest.mark.parametrize("calls", [{0}, {GROUPS}], ids=["without states", "with states"])
@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch"])
def test_an_update_that_changed_nothing_runs_again(tmp_path, folder, monkeypatch, calls, optim):
    expected = undisturbed(False, folder)
    fail_on(monkeypatch, calls)
    outcome = run(build_trainer(recipe(optim=optim), tmp_path))
    assert_same(outcome, expected)
    assert [event["kind"] for event in outcome.events] == ["out_of_memory"]
    assert "changed nothing yet" in outcome.events[0]["text"]


@pytest.mark.parametrize("calls", [{GROUPS + 1}, {GROUPS, GROUPS + 1}], ids=["one group has moved", "it fails again"])
def test_otherwise_the_run_goes_on_from_its_last_checkpoint(tmp_path, folder, monkeypatch, caplog, calls):
    expected = undisturbed(False, folder)
    plan = {"save_strategy": "steps", "save_steps": 1}
    with monkeypatch.context() as patch:
        fail_on(patch, calls)
        with pytest.raises(SystemExit) as stopped:
            build_trainer(recipe(**plan), tmp_path).train()
    assert stopped.value.code == RESTART
    assert "go on from the last checkpoint with --resume" in caplog.text
    assert not (tmp_path / f"checkpoint-{STEPS}").exists()
    resumed = build_trainer(recipe(**plan), tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert_same_weights(weights_of(resumed), expected.weights)
    assert len(read_info(tmp_path).get("events", [])) == len(calls) - 1


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD, "adamw_8bit"])
def test_a_weight_that_moved_is_noticed_whatever_the_optimizer(make):
    if make == "adamw_8bit":
        make = pytest.importorskip("bitsandbytes").optim.AdamW8bit
    weight = torch.nn.Parameter(torch.ones(8192))
    update = make([weight], lr=0.1)
    weight.grad = torch.ones_like(weight)
    plain = update.step

    def step_and_fail():
        plain()
        raise torch.OutOfMemoryError("injected")

    update.step, texts = step_and_fail, []
    guard_update(update, lambda kind, text: pytest.fail("it would have been run twice"), texts.append)
    update.step()
    assert len(texts) == 1


class FailsAt(TorchFunctionMode):
    """Runs out of memory instead of the call of some number; a mode below autograd would keep versions from growing."""

    def __init__(self, number: int):
        super().__init__()
        self.left = number

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if (
            func is not torch._C._set_grad_enabled
        ):  # it takes no memory, and would leave gradients off for all tests to come
            if self.left == 0:
                raise torch.OutOfMemoryError("injected")
            self.left -= 1
        return func(*args, **(kwargs or {}))


def groups_of_two_kinds() -> list[dict]:
    """Two groups of weights in two precisions, the first of which has no gradient."""
    groups = []
    for decay in (0.1, 0.0):
        weights = [
            torch.nn.Parameter(torch.ones(64, 128, dtype=dtype)) for dtype in [torch.float32, torch.bfloat16] * 3
        ]
        for weight in weights[1:]:
            weight.grad = torch.full_like(weight, 0.5)
        groups.append({"params": weights, "weight_decay": decay})
    return groups


def everything(optimizer: torch.optim.Optimizer) -> list[float]:
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    states = [value for states in optimizer.state.values() for value in states.values()]
    return [float(torch.as_tensor(value).detach().double().sum()) for value in weights + states if value is not None]


@pytest.mark.parametrize("steps", [0, 2], ids=["without states", "with states"])
@pytest.mark.parametrize(
    "make",
    [
        lambda groups: torch.optim.AdamW(groups, fused=True),
        lambda groups: torch.optim.AdamW(groups, foreach=True),
        lambda groups: torch.optim.AdamW(groups, foreach=False),
        lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, foreach=True),
        lambda groups: torch.optim.RMSprop(groups, foreach=True),
        lambda groups: Adafactor(groups, lr=0.1, relative_step=False),
        lambda groups: pytest.importorskip("bitsandbytes").optim.AdamW8bit(groups),
        lambda groups: pytest.importorskip("bitsandbytes").optim.Lion8bit(groups),
    ],
    ids=["fused AdamW", "foreach AdamW", "AdamW", "SGD", "RMSprop", "Adafactor", "8-bit AdamW", "8-bit Lion"],
)
def test_wherever_an_update_fails_the_first_weights_tell_whether_anything_moved(make, steps):
    failed = moved = 0
    for number in itertools.count():
        optimizer = make(groups_of_two_kinds())
        for _ in range(steps):
            optimizer.step()
        first = first_updated(weights_alike(optimizer))
        before, known, changes = everything(optimizer), len(optimizer.state), count_changes(optimizer, first)
        try:
            with FailsAt(number):
                optimizer.step()
        except torch.OutOfMemoryError:
            failed += 1
        else:
            break
        has_moved = count_changes(optimizer, first) != changes
        moved += has_moved
        if not has_moved:
            _forget_new_states(optimizer, known)
            assert everything(optimizer) == before
    assert failed > moved > 0


class HalfMade(torch.optim.SGD):
    """Runs out of memory between two states of a weight, once, and never makes states where there are some."""

    fails = 1

    def step(self):
        state = self.state[self.param_groups[0]["params"][0]]
        if not state:
            state["first"] = torch.zeros(1)
            if self.fails:
                self.fails -= 1
                raise torch.OutOfMemoryError("injected")
            state["second"] = torch.zeros(1)
        state["second"] += 1


def test_states_that_were_made_by_half_are_made_anew():
    weight, told = torch.nn.Parameter(torch.ones(1)), []
    weight.grad = torch.ones_like(weight)
    update = HalfMade([weight])
    guard_update(update, lambda kind, text: told.append(kind), pytest.fail)
    update.step()
    assert told == ["out_of_memory"]
    assert update.state[weight]["second"] == 1
