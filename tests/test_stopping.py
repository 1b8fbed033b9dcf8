"""Asked to stop, a training ends its step and leaves a checkpoint that it goes on from to the last bit."""

import functools
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from transformers import TrainerControl, TrainerState

from benchmarks.killed import compare
from hf_vla import saving
from hf_vla.prepare import build_trainer
from hf_vla.recipe import Recipe
from hf_vla.run import INFO, LOCK, add_event, read_info
from hf_vla.stopping import StopWhenAsked
from hf_vla.train import train
from tests.tiny_run import tiny_recipe

torch.set_num_threads(1)  # as in the process that is stopped: more threads sum in another order

STEPS, SEEN = 60, 2 * 90 + 14 * 4
"""Optimizer steps of 4 samples, and the samples of 2 whole epochs and 14 steps: an epoch's last step has only 2."""


def recipe(**training) -> Recipe:
    plan = {"max_steps": STEPS, "logging_steps": 7, "save_steps": STEPS, "lr_scheduler_type": "cosine"}
    return tiny_recipe(
        model={"fusion": {"dropout": 0.2}},
        data={"num_workers": 1},
        training={**plan, "save_total_limit": 1, **training},
    )


def start(directory: Path, wanted: Recipe, **options) -> subprocess.Popen:
    """Train in a process of its own, as a user would, and wait until it has done some steps."""
    file = directory.with_suffix(".json")
    file.write_text(json.dumps(wanted.to_dict()))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "hf_vla.train", file, "--output", directory],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        **options,
    )
    steps = directory / "memory.jsonl"
    while process.poll() is None and not (steps.exists() and steps.read_text().count("\n") >= 3):
        time.sleep(0.01)
    return process


def signal_group(process: subprocess.Popen, number: int) -> None:
    """As torchrun does, and a terminal."""
    os.killpg(process.pid, number)


def signal_all(process: subprocess.Popen, number: int) -> None:
    """As a scheduler may: the loader's workers first."""
    for one in [*psutil.Process(process.pid).children(recursive=True), process]:
        one.send_signal(number)


@pytest.mark.parametrize(
    ("send", "number"),
    [
        (signal_group, signal.SIGTERM),
        (signal_all, signal.SIGTERM),
        pytest.param(signal_group, signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_a_training_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path, send, number):
    process = start(tmp_path / "run", recipe())
    send(process, number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, output
    info = read_info(tmp_path / "run")
    assert "finished" not in info and not (tmp_path / "run/model").exists()
    assert info["events"][-1]["kind"] == "stopped"
    step = int(saving.find(tmp_path / "run").checkpoint.name.removeprefix("checkpoint-"))
    assert 3 <= step < STEPS
    assert f"Stopped at step {step} of {STEPS}, as asked: --resume goes on from there." in output
    assert "Traceback" not in output

    before = json.loads((tmp_path / f"run/checkpoint-{step}/progress.json").read_text())["seconds"]
    begun = time.monotonic()
    train(recipe(), tmp_path / "run", resume=True)
    info = read_info(tmp_path / "run")
    assert 0 < before < info["seconds"] < before + time.monotonic() - begun
    assert info["samples_per_second"] * info["seconds"] == pytest.approx(SEEN, rel=0.01)
    expected = train(recipe(), tmp_path / "expected")
    assert compare(tmp_path / "run", expected) == []


def test_workers_of_the_evaluation_outlive_it_too(tmp_path):
    loader = build_trainer(recipe(), tmp_path).get_eval_dataloader()
    others = set(multiprocessing.active_children())
    batches = iter(loader)
    next(batches)
    (worker,) = set(multiprocessing.active_children()) - others
    assert os.getpgid(worker.pid) == worker.pid


def test_a_run_that_is_being_trained_is_not_gone_on_with(tmp_path):
    process = start(tmp_path / "run", recipe())
    process.send_signal(signal.SIGSTOP)  # or it may end first
    with pytest.raises(FileExistsError, match="another training is at work in it"):
        train(recipe(), tmp_path / "run", resume=True)
    process.send_signal(signal.SIGCONT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert not (tmp_path / "run" / LOCK).exists()


@pytest.mark.parametrize("limit", [200_000, 600_000], ids=["weights", "optimizer"])
def test_a_disk_that_is_full_is_said_and_the_run_goes_on_when_there_is_room(tmp_path, limit):
    few = recipe(max_steps=4, save_steps=4)
    full = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit))
    process = start(tmp_path / "run", few, preexec_fn=full)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"Error: {tmp_path / 'run'} can't be written into (" in output and "Traceback" not in output
    assert saving.find(tmp_path / "run").checkpoint is None
    train(few, tmp_path / "run", resume=True)
    assert compare(tmp_path / "run", train(few, tmp_path / "expected")) == []


def test_logs_that_cannot_be_written_end_no_training(tmp_path):
    training = {"max_steps": STEPS, "logging_steps": 1, "save_strategy": "no", "report_to": ["tensorboard"]}
    wanted = tiny_recipe(training=training)  # without workers: what they hand over are files to the system, too
    full = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (5_000, 5_000))
    process = start(tmp_path / "run", wanted, preexec_fn=full)
    output, _ = process.communicate(timeout=60)
    assert output.count("memory.jsonl lacks lines from here on") == 1
    assert output.count("TensorBoard's curves end here") == 1
    assert "'epoch': '2.609'" in output  # the last step's
    assert f"Error: {tmp_path / 'run'} can't be written into (" in output  # the trained model, which is larger
    lines = [json.loads(line) for line in (tmp_path / "run/memory.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1)) and 3 <= len(lines) < STEPS


def test_an_event_that_cannot_be_written_is_logged_and_leaves_run_json_whole(tmp_path, caplog):
    add_event(tmp_path, 1, "skipped", "first")
    before = (tmp_path / INFO).read_text()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before), limits[1]))
    try:
        add_event(tmp_path, 2, "skipped", "second")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "second" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == [INFO] and (tmp_path / INFO).read_text() == before


@pytest.mark.slow
def test_an_epoch_that_was_left_halfway_is_neither_evaluated_nor_counted_as_done(tmp_path):
    by_epoch = {"max_steps": -1, "num_train_epochs": 4, "save_strategy": "epoch", "eval_strategy": "epoch"}
    process = start(tmp_path / "run", recipe(**by_epoch))
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, output
    train(recipe(**by_epoch), tmp_path / "run", resume=True)
    assert compare(tmp_path / "run", train(recipe(**by_epoch), tmp_path / "expected")) == []


@pytest.mark.parametrize(("step", "stops"), [(STEPS - 1, True), (STEPS, False)])
def test_after_the_last_step_there_is_nothing_left_to_stop(step, stops):
    asked, control = StopWhenAsked(), TrainerControl()
    asked.signal = signal.SIGTERM
    asked.on_step_end(SimpleNamespace(device="cpu"), state_at(step), control)
    assert (asked.has_stopped, control.should_save, control.should_training_stop) == (stops, stops, stops)
    control.should_evaluate = True
    asked.on_epoch_end(None, state_at(step), control)
    assert control.should_evaluate != stops


def state_at(step: int) -> TrainerState:
    return TrainerState(global_step=step, max_steps=STEPS)


def test_a_second_time_stops_at_once_and_what_was_there_before_comes_back():
    before = signal.getsignal(signal.SIGINT)
    with StopWhenAsked() as asked:
        signal.raise_signal(signal.SIGINT)
        assert asked.signal == signal.SIGINT and asked.exit_code == 130
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_worker_that_inherits_it_ends_as_ever():
    with StopWhenAsked() as asked:
        pid = os.fork()
        if pid == 0:
            signal.raise_signal(signal.SIGTERM)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM
    assert asked.signal is None
