"""Going on after a kill: the log and the weights of a run that was never stopped, to the last bit."""

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lerobot_folders import write_v3
from transformers import TrainerCallback

import hf_vla.train
from hf_vla.checkpoint import load_checkpoint
from hf_vla.prepare import build_trainer
from hf_vla.recipe import Recipe
from hf_vla.run import read_info
from hf_vla.train import train
from tests.tiny_run import tiny_recipe

torch.set_num_threads(1)

FROZEN = {"freeze_vggt": True, "freeze_lang_encoder": True}
DROPOUT = {"fusion": {"dropout": 0.2}, "head": {"type": "flow"}}
LORA = {"apply_to": ["lang_encoder"], "r": 4, "lora_dropout": 0.2}
PLAN = {
    "max_steps": 10,
    "gradient_accumulation_steps": 2,
    "logging_steps": 3,
    "save_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "lr_scheduler_type": "cosine",
}
"""About 4 steps of 2 x 3 samples are an epoch, the last of them short."""

ADAPTED = {"model": {**FROZEN, **DROPOUT}, "lora": LORA}
CASES = {
    "whole": {},
    "lora": ADAPTED,
    "nf4_workers": {**ADAPTED, "model": {**ADAPTED["model"], "quantization": "nf4"}, "data": {"num_workers": 2}},
    "epochs": {
        "training": {"max_steps": -1, "num_train_epochs": 2, "save_strategy": "epoch", "eval_strategy": "epoch"}
    },
}


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> str:
    return str(write_v3(tmp_path_factory.mktemp("data") / "doors", lengths=(5, 7, 3, 6, 8, 4)))


@pytest.fixture(scope="session")
def recipe(dataset) -> Callable[[str], Recipe]:
    def make(name: str) -> Recipe:
        case = CASES[name]
        data = {"dataset": dataset, "batch_size": 3, **case.get("data", {})}
        return tiny_recipe(
            model=case.get("model", DROPOUT),
            lora=case.get("lora", {}),
            data=data,
            training={**PLAN, **case.get("training", {})},
        )

    return make


class KillAt(TrainerCallback):
    """Kills the process at the end of a step, or of the epoch in which it is."""

    def __init__(self, step: int, moment: str = "on_step_end"):
        self._step = step
        setattr(self, moment, self._kill)

    def _kill(self, args, state, control, **kwargs):
        if state.global_step == self._step:
            os.kill(os.getpid(), signal.SIGKILL)


def run_killed(action: Callable[[], object]) -> None:
    """Run in a forked process, which must end by SIGKILL."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def train_killed(plan, directory: Path, callback: TrainerCallback, resume: bool = False) -> None:
    def build(*args):
        trainer = build_trainer(*args)
        trainer.add_callback(callback)
        return trainer

    def action():
        hf_vla.train.build_trainer = build
        train(plan, directory, resume)

    run_killed(action)


def log_of(run: Path) -> list[dict]:
    """Give the log without times and measured memory."""
    return [
        {k: v for k, v in entry.items() if not k.endswith(("_runtime", "_second")) and not k.startswith("memory/")}
        for entry in json.loads((run / "log_history.json").read_text())
    ]


def assert_same_run(run: Path, expected: Path) -> None:
    assert log_of(run) == log_of(expected)
    assert read_info(run)["train"] == read_info(expected)["train"]
    weights, wanted = (dict(load_checkpoint(r / "model")[0].named_parameters()) for r in (run, expected))
    assert weights.keys() == wanted.keys()
    assert [name for name, tensor in weights.items() if not torch.equal(tensor, wanted[name])] == []


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory, recipe) -> Callable[[str], Path]:
    runs = {}

    def run(name: str) -> Path:
        if name not in runs:
            runs[name] = train(recipe(name), tmp_path_factory.mktemp(name) / "run")
        return runs[name]

    return run


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "callbacks"),
    [
        # Mid-epoch, between two lines of the log; and after the last checkpoint, before the model is written.
        pytest.param("lora", [KillAt(7), KillAt(10, "on_save")], id="lora"),
        # Before there is a checkpoint, and before another is reached.
        pytest.param("whole", [KillAt(1), KillAt(3), KillAt(3)], id="whole", marks=SLOW),
        pytest.param("nf4_workers", [KillAt(7)], id="nf4_workers", marks=SLOW),
        pytest.param("epochs", [KillAt(5), KillAt(8, "on_epoch_end")], id="epochs_within", marks=SLOW),
        pytest.param("epochs", [KillAt(4, "on_save"), KillAt(8, "on_save")], id="epochs_saved", marks=SLOW),
    ],
)
def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path, recipe, undisturbed, name, callbacks):
    run = tmp_path / "run"
    for k, callback in enumerate(callbacks):
        train_killed(recipe(name), run, callback, resume=k > 0)
    train(recipe(name), run, resume=True)
    assert_same_run(run, undisturbed(name))
