"""The recording script as its user runs it, and its bookkeeping without a simulator."""

import importlib.util
import json
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

SCRIPT = Path(__file__).parent.parent / "data_scripts/record_metaworld.py"
SAMPLE = Path(__file__).parent / "data/metaworld_sample"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("record_metaworld", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def submit_from(outcomes, script, log):
    """Stand in for the pool: outcome i is whether attempt i succeeds."""

    def submit(seed):
        log.append(seed)
        future = Future()
        future.set_result(script.Attempt(outcomes[seed], {"seed": seed}))
        return future

    return submit


def test_the_first_successes_are_kept_in_the_order_of_their_seeds(script):
    log, tally = [], script.Tally()
    outcomes = {10: True, 11: False, 12: True, 13: False, 14: True, 15: True}
    kept = list(script.first_successes(submit_from(outcomes, script, log), seed=10, wanted=3, tally=tally))
    assert [done.columns["seed"] for done in kept] == [10, 12, 14]
    assert log == [10, 11, 12, 13, 14]  # nothing is tried that could not be wanted
    assert (tally.attempts, tally.successes) == (5, 3)


def test_an_expert_that_fails_too_often_is_an_error(script):
    outcomes = {seed: seed == 0 for seed in range(99)}
    with pytest.raises(RuntimeError, match="solved only 1 of 8 attempts"):
        list(script.first_successes(submit_from(outcomes, script, []), seed=0, wanted=2, tally=script.Tally()))


def settings(script, noise_share, noise_steps, **env):
    return script.Settings(env, 100, noise_share, noise_std=0.3, noise_steps=noise_steps, store="png")


def test_noise_has_the_spread_asked_for_remembers_and_ends(script):
    generator = script._noise(5, settings(script, 1.0, 20_000))
    noise = np.stack([next(generator) for _ in range(20_000)])
    assert np.allclose(noise.std(0), 0.3, atol=0.02)
    assert np.corrcoef(noise[1:, 0], noise[:-1, 0])[0, 1] == pytest.approx(script.NOISE_MEMORY, abs=0.02)
    assert not next(generator).any()


def test_the_seed_decides_which_attempts_are_disturbed(script):
    calm = [not next(script._noise(seed, settings(script, 0.7, 10))).any() for seed in range(500)]
    assert np.mean(calm) == pytest.approx(0.3, abs=0.06)
    assert calm == [not next(script._noise(seed, settings(script, 0.7, 10))).any() for seed in range(500)]


def record(out, *options):
    command = [sys.executable, SCRIPT, "--out", out, "--image-size", "32", *options]
    return subprocess.run([str(word) for word in command], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "reac-v3"], "no task 'reac-v3'. Did you mean reach-v3"),
        (["--task", "reach-v3=many"], "NAME=EPISODES"),
        (["--task", "reach-v3=0"], "NAME=EPISODES"),
        (["--task", "reach-v3", "--field-of-view", "30"], "takes CAMERA=DEGREES"),
        (["--task", "reach-v3", "--field-of-view", "corner2=wide"], "takes CAMERA=DEGREES"),
    ],
)
def test_a_wrong_option_is_one_clear_error(tmp_path, options, message):
    done = record(tmp_path / "out", *options)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def rows(root):
    return pq.read_table(root / "data/chunk-000/file-000.parquet")


@pytest.mark.sim
@pytest.mark.slow
def test_the_seed_decides_every_row_whatever_the_number_of_workers(tmp_path):
    options = ["--task", "reach-v3", "--task", "faucet-open-v3=1", "--episodes", "2", "--noise", "0.7", "--seed", "3"]
    for workers in (1, 2):
        done = record(tmp_path / str(workers), "--workers", workers, *options)
        assert done.returncode == 0, done.stderr
        assert "100%" in done.stdout and "EGLError" not in done.stderr
    one, two = rows(tmp_path / "1"), rows(tmp_path / "2")
    assert one.equals(two)
    info = json.loads((tmp_path / "1/meta/info.json").read_text())
    assert info["total_episodes"] == 3 and info["fps"] == 20
    again = record(tmp_path / "1", *options)
    assert again.returncode == 1 and "is already there" in again.stderr
    assert rows(tmp_path / "1").equals(one)


@pytest.mark.sim
@pytest.mark.slow
def test_what_is_stored_is_the_clean_expert_along_a_disturbed_path(script):
    env = {"image_size": 16, "cameras": ["corner2"], "action_repeat": 4}
    calm = script.attempt("reach-v3", 1, settings(script, 0.0, 10, **env)).columns
    pushed = script.attempt("reach-v3", 1, settings(script, 1.0, 10, **env)).columns
    script._kept.pop("reach-v3").close()
    assert np.array_equal(calm["action"][0], pushed["action"][0])  # same start, so the same clean command
    assert np.abs(calm["observation.state"][6] - pushed["observation.state"][6]).max() > 1e-2
    assert np.abs(pushed["action"]).max() <= 1


def test_the_committed_sample_is_small_and_of_the_four_tasks():
    size = sum(file.stat().st_size for file in SAMPLE.rglob("*") if file.is_file())
    assert size < 2_000_000
    recording = json.loads((SAMPLE / "meta/recording.json").read_text())
    assert {*recording["tasks"]} == {"button-press-topdown-v3", "reach-v3", "faucet-open-v3", "faucet-close-v3"}
    info = json.loads((SAMPLE / "meta/info.json").read_text())
    assert info["total_tasks"] == 4 and info["features"]["observation.images.corner2"]["shape"] == [84, 84, 3]
    table = rows(SAMPLE)
    assert len(table) == info["total_frames"]
    actions = np.stack(table["action"].to_numpy())
    assert actions.shape[1] == 4 and np.abs(actions).max() <= 1
