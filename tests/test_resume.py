"""Going on after a kill: the log and the weights of a run that was never stopped, to the last bit."""

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from lerobot_folders import write_v3
from transformers import TrainerCallback

import hf_vla.train
from benchmarks.killed import compare
from hf_vla import saving
from hf_vla.data.loader import SKIPPED
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
    "ahead": {**ADAPTED, "memory": {"encode_ahead": 4}},
    "overlapped": {**ADAPTED, "memory": {"encode_ahead": 4, "encode_overlap": True}, "data": {"num_workers": 1}},
    "nf4_workers": {**ADAPTED, "model": {**ADAPTED["model"], "quantization": "nf4"}, "data": {"num_workers": 2}},
    "streamed": {**ADAPTED, "data": {"streaming": True, "num_workers": 1, "shuffle_episodes": 2}},
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
            memory=case.get("memory", {}),
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


class KillWhileSaving(TrainerCallback):
    """Kills the process when a checkpoint is written, and not yet in its place."""

    def __init__(self, step: int):
        self._step = step

    def on_train_begin(self, args, state, control, **kwargs):
        def finish(run, step):
            if step == self._step:
                os.kill(os.getpid(), signal.SIGKILL)
            whole(run, step)

        whole, saving.finish = saving.finish, finish


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


def assert_same_run(run: Path, expected: Path) -> None:
    assert compare(run, expected) == []
    assert read_info(run)["train"] == read_info(expected)["train"]


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
        pytest.param("ahead", [KillAt(7)], id="ahead"),
        # Before there is a checkpoint, and before another is reached.
        pytest.param("whole", [KillAt(1), KillAt(3), KillAt(3)], id="whole", marks=SLOW),
        pytest.param("nf4_workers", [KillAt(7)], id="nf4_workers", marks=SLOW),
        pytest.param("streamed", [KillAt(3), KillWhileSaving(6)], id="streamed", marks=SLOW),
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


def test_a_killed_run_that_looks_a_step_ahead_goes_on_as_one_that_never_did(tmp_path, recipe, undisturbed):
    train_killed(recipe("overlapped"), tmp_path / "run", KillAt(7))  # in mid-epoch, the next step's features held
    train(recipe("overlapped"), tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", undisturbed("ahead"))


def test_an_unfinished_checkpoint_is_passed_over_and_said(tmp_path, recipe, undisturbed):
    run = tmp_path / "run"
    train_killed(recipe("lora"), run, KillWhileSaving(4))
    assert (run / "unfinished-4").is_dir()
    weights = run / "checkpoint-2/trained.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])  # as a disk that lost power may leave it
    found = saving.find(run)
    assert found.checkpoint is None
    assert found.skipped == [
        "unfinished-4 was still being written",
        f"checkpoint-2 isn't whole: trained.safetensors has {len(whole) - 1} bytes and not {len(whole)}",
    ]
    weights.write_bytes(whole)
    assert saving.find(run).checkpoint == run / "checkpoint-2"
    train(recipe("lora"), run, resume=True)
    assert_same_run(run, undisturbed("lora"))
    told = [event["text"] for event in read_info(run)["events"] if event["kind"] == "resumed"]
    assert told == ["unfinished-4 was still being written: it is passed over.", "Going on from checkpoint-2."]
    assert not list(run.glob("unfinished-*"))


def write_checkpoint(run: Path, step: int) -> None:
    saving.begin(run, step)
    (saving.aside(run, step) / "state.json").write_text("{}")
    saving.finish(run, step)


def test_the_newest_and_the_best_are_kept(tmp_path):
    for step in (2, 4, 6, 10):
        write_checkpoint(tmp_path, step)
        saving.keep(tmp_path, 2, str(tmp_path / "checkpoint-2"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-2", "checkpoint-6"]
    write_checkpoint(tmp_path, 10)  # written again after a run went on from before it
    assert saving.find(tmp_path) == (tmp_path / "checkpoint-10", [])


@pytest.mark.parametrize("name", ["weights.safetensors", "state.json", "optimizer.pt"])
def test_a_checkpoint_that_cant_be_opened_again_never_gets_its_name(tmp_path, name):
    saving.begin(tmp_path, 2)
    (saving.aside(tmp_path, 2) / name).write_bytes(b"half of it")
    with pytest.raises(OSError, match="can't be opened again"):
        saving.finish(tmp_path, 2)
    assert saving.find(tmp_path).checkpoint is None


def test_a_run_that_goes_on_in_other_batches_sees_the_rest_of_the_epoch_and_says_so(tmp_path, recipe):
    plan = recipe("epochs")
    seen: list[int] = []

    def note(trainer):
        take = trainer.data_collator
        trainer.data_collator = lambda samples: (
            seen.extend((s.episode_index, s.frame_index) for s in samples if not s.action_is_pad.all())
            or take(samples)
        )

    run = tmp_path / "run"
    trainer = build_trainer(plan, run)
    trainer.args.max_steps, trainer.args.save_strategy, trainer.args.eval_strategy = 2, "steps", "no"
    note(trainer)
    trainer.train()  # 2 of 4 steps of the first epoch
    samples = len(trainer.train_dataset)
    assert len(seen) == 12
    plan.data.batch_size, plan.training["gradient_accumulation_steps"], plan.training["eval_strategy"] = 2, 1, "no"
    trainer = build_trainer(plan, run)
    note(trainer)
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert len(set(seen[:samples])) == samples
    assert len(seen) == 2 * samples  # and the second epoch
    kinds = {event["kind"]: event["text"] for event in read_info(run)["events"]}
    assert "order differs" in kinds["resumed_differently"]


def test_data_that_changed_under_a_stopped_run_is_said(tmp_path):
    root = write_v3(tmp_path / "doors", lengths=(5, 7, 3, 6, 8, 4))
    data = {"dataset": str(root), "batch_size": 4, "eval_fraction": 0.0}
    plan = tiny_recipe(data=data, training={"max_steps": -1, "num_train_epochs": 2, "save_steps": 3})
    train_killed(plan, tmp_path / "run", KillAt(4))
    max((root / "data").rglob("*.parquet")).unlink()
    run = train(plan, tmp_path / "run", resume=True)
    (text,) = [event["text"] for event in read_info(run)["events"] if event["kind"] == "resumed_differently"]
    assert "data had 33 samples and has 21 now" in text


def test_skipped_samples_are_counted_in_the_runs_file(tmp_path):
    root = write_v3(tmp_path / "doors", lengths=(5, 7, 3, 6, 8, 4))
    file = root / "data/chunk-000/file-001.parquet"
    table = pq.read_table(file)
    nan = pa.array([[float("nan")] * 3] * len(table), pa.list_(pa.float32(), 3))
    pq.write_table(table.set_column(table.column_names.index("action"), "action", nan), file)
    data = {"dataset": str(root), "batch_size": 4, "eval_fraction": 0.0, "streaming": True}
    training = {"max_steps": -1, "num_train_epochs": 1}
    with pytest.raises(ValueError, match=r"action of episode [23] has values that aren't finite"):
        train(tiny_recipe(data=data, training=training), tmp_path / "raised")
    run = train(tiny_recipe(data={**data, "on_error": "skip"}, training=training), tmp_path / "skipped")
    skipped = read_info(run)["skipped"]
    assert skipped["samples"] == 3 + 6
    assert all("file-001.parquet" in text for text in skipped["first"])


def test_a_held_out_sample_that_is_left_out_is_told(tmp_path):
    trainer = build_trainer(tiny_recipe(data={"on_error": "skip"}), tmp_path)
    batch = next(iter(trainer.get_eval_dataloader()))
    assert batch[SKIPPED] == []
    batch[SKIPPED] = ["episode 3 is broken"]
    trainer.prediction_step(trainer.model, batch, prediction_loss_only=True)
    [event] = read_info(tmp_path)["events"]
    assert event["kind"] == "skipped_in_evaluation"
    assert "episode 3 is broken" in event["text"]
