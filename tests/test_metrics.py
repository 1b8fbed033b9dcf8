import math
import socket

import numpy as np
import pytest
from lerobot_folders import write_v3

from hf_vla.data.lerobot_format import open_dataset
from hf_vla.data.mixture import CameraView
from hf_vla.data.windows import WindowDataset
from hf_vla.evaluation import POLICY, SWAPPED, count, describe_counts
from hf_vla.rollout.baselines import commands_position, hold_still, mean_action, nearest_state
from hf_vla.rollout.loop import EpisodeResult
from hf_vla.rollout.metrics import (
    ActionError,
    GripperAccuracy,
    SuccessRate,
    difference_interval,
    gripper_dimension,
    offline_report,
    wilson_interval,
)


@pytest.fixture
def no_network_no_files(monkeypatch, tmp_path):
    """Refuse connections, and point home and every cache at a folder that must stay empty."""

    def refuse(*args, **kwargs):
        raise AssertionError("a metric opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    yield
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_network_no_files")
def test_action_error_is_per_dimension_and_blind_to_padding():
    recorded = np.zeros((2, 3, 2), np.float32)
    predicted = np.zeros((2, 3, 2), np.float32)
    predicted[0, 0] = [1.0, 4.0]
    predicted[1, 2] = [100.0, 100.0]  # padding
    is_pad = np.array([[False, False, False], [False, True, True]])
    result = ActionError().compute(predictions=predicted, references=recorded, action_is_pad=is_pad)
    assert result["mae"] == pytest.approx([1 / 4, 4 / 4])
    assert result["rmse"] == pytest.approx([math.sqrt(1 / 4), math.sqrt(16 / 4)])
    assert result["mean_mae"] == pytest.approx(0.625)
    assert result["mean_rmse"] == pytest.approx(1.25)


@pytest.mark.usefixtures("no_network_no_files")
def test_metrics_add_up_over_batches():
    metric = ActionError()
    for value in (1.0, 3.0):
        metric.add_batch(
            predictions=np.full((2, 1, 1), value), references=np.zeros((2, 1, 1)), action_is_pad=np.zeros((2, 1), bool)
        )
    assert metric.compute()["mae"] == [2.0]


@pytest.mark.usefixtures("no_network_no_files")
def test_gripper_accuracy_counts_agreement_about_the_threshold():
    values = {"predictions": [0.9, 0.2, 0.6, 0.4], "references": [1.0, 0.0, 0.0, 1.0]}
    assert GripperAccuracy().compute(**values, threshold=0.5) == {"gripper_accuracy": 0.5}
    assert GripperAccuracy().compute(**values, threshold=-1.0) == {"gripper_accuracy": 1.0}


@pytest.mark.usefixtures("no_network_no_files")
def test_success_rate_brings_its_interval():
    result = SuccessRate().compute(predictions=[True] * 8 + [False] * 2)
    assert (result["successes"], result["episodes"], result["success_rate"]) == (8, 10, 0.8)
    assert result["interval"] == wilson_interval(8, 10)


def test_wilson_interval_solves_its_own_equation():
    # Its ends are the p at which |successes / n - p| is 1.96 standard deviations of a binomial share with that p.
    for successes, n in ((8, 10), (1, 60), (59, 60), (30, 60)):
        for p in wilson_interval(successes, n):
            assert abs(successes / n - p) == pytest.approx(1.959963984540054 * math.sqrt(p * (1 - p) / n))
    assert wilson_interval(0, 20)[0] == 0
    assert wilson_interval(20, 20)[1] == 1
    assert wilson_interval(20, 20)[0] == pytest.approx(0.8389, abs=1e-4)
    with pytest.raises(ValueError, match="0 successes of 0 trials"):
        wilson_interval(0, 0)


def test_difference_interval_as_in_newcombes_table():
    # Newcombe 1998, table II, method 10: 56/70 - 48/80 and 9/10 - 3/10.
    assert difference_interval(56, 70, 48, 80) == pytest.approx((0.0524, 0.3339), abs=1e-4)
    assert difference_interval(9, 10, 3, 10) == pytest.approx((0.1705, 0.8090), abs=1e-4)
    low, high = difference_interval(3, 10, 9, 10)
    assert (low, high) == pytest.approx((-0.8090, -0.1705), abs=1e-4)


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    # State and action of a frame are [episode, frame, episode + frame / 100]; tasks alternate by episode.
    info = open_dataset(write_v3(tmp_path_factory.mktemp("data") / "doors"))
    views = [CameraView("front")]
    return WindowDataset(info, views, 3, [0, 1]), WindowDataset(info, views, 3, [2, 3])


def test_mean_action_is_training_s_not_the_held_out_one_s(split):
    train, held_out = split
    predicted = mean_action(train, held_out, np.array([0, 1]))
    assert predicted.shape == (2, 3, 3)
    np.testing.assert_allclose(predicted[1, 2], train.actions.mean(0))


def test_nearest_state_copies_the_chunk_of_the_nearest_state_of_the_same_task(split):
    train, held_out = split
    # Sample 1 of episode 2 is at frame 1 of task 0; the nearest state overall is in episode 1, which is of the other task.
    predicted = nearest_state(train, held_out, np.array([1]))
    assert (predicted[0, :, 0] == 0).all()
    frames = predicted[0, :, 1]
    assert frames.tolist() == [*range(int(frames[0]), 5), 4, 4][:3]


def test_nearest_state_of_a_training_window_is_itself(split):
    train, _ = split
    indices = np.arange(len(train))
    np.testing.assert_array_equal(nearest_state(train, train, indices), train.windows(indices).actions)


def test_hold_still_repeats_the_state_where_actions_are_positions_and_is_zero_where_they_are_changes(split):
    train, held_out = split
    predicted = hold_still(train, held_out, np.array([2]))
    np.testing.assert_array_equal(predicted[0], np.repeat(held_out.states[2:3], 3, axis=0))
    changes = WindowDataset(train.info, train.views, 3, [0, 1])
    changes.actions = changes.actions.copy()
    changes.actions[:, 1] = 0.001
    changes.states = changes.actions * [0.4, 5, -0.2]  # the first resembles the action, and yet doesn't follow it
    assert commands_position(changes).tolist() == [False, False, False]
    assert not hold_still(changes, held_out, np.array([2])).any()


def test_the_report_sets_the_policy_beside_baselines_on_the_same_windows(split):
    train, held_out = split
    off_by = np.array([0.5, 0, 0])
    report = offline_report(lambda samples: np.stack([s.actions for s in samples]) + off_by, held_out, train)
    assert report["names"] == ["x", "y", "gripper"]
    assert report["policy"]["mae"] == pytest.approx([0.5, 0, 0], abs=1e-6)
    assert report["policy"]["gripper_accuracy"] == 1.0
    assert report["policy"]["mean_scaled_mae"] == pytest.approx(0.5 / train.actions[:, 0].std() / 3, rel=1e-5)
    assert report["mean_action"]["mean_mae"] > report["policy"]["mean_mae"]
    predictors = {"policy", "mean_action", "hold_still", "nearest_state"}
    counts = {"windows": len(held_out), "episodes": 2, "left_out": 0, "train_left_out": 0}
    assert set(report) == {*predictors, "names", "hold_still_at_state", *counts}
    assert {name: report[name] for name in counts} == counts
    assert report["hold_still_at_state"] == ["x", "y", "gripper"]


def test_the_report_of_many_windows_takes_some_from_every_episode(split):
    train, held_out = split
    seen = []

    def predict(samples):
        seen.extend((s.episode_index, s.frame_index) for s in samples)
        return np.stack([s.actions for s in samples])

    assert offline_report(predict, held_out, train, max_windows=4, batch_size=3)["windows"] == 4
    assert seen == [(2, 0), (3, 0), (3, 2), (3, 5)]


def test_windows_that_cannot_be_read_end_the_report_or_are_left_out_and_counted(split, monkeypatch, caplog):
    train, held_out = split
    read = type(held_out).__getitem__
    predicted = []

    def broken(dataset, i):
        if i in (1, 2):
            raise ValueError(f"frame {i} can't be decoded")
        return read(dataset, i)

    def predict(samples):
        predicted.append(np.stack([s.actions for s in samples]))
        return predicted[-1]

    monkeypatch.setattr(type(held_out), "__getitem__", broken)
    with pytest.raises(ValueError, match="frame 1 can't be decoded"):
        offline_report(predict, held_out, train)
    report = offline_report(predict, held_out, train, batch_size=2, on_error="skip")
    assert (report["windows"], report["left_out"]) == (len(held_out) - 2, 2)
    assert report["policy"]["mae"] == [0, 0, 0]
    assert "frame 2 can't be decoded" in caplog.text
    monkeypatch.setattr(type(held_out), "__getitem__", lambda dataset, i: broken(dataset, 1))
    with pytest.raises(ValueError, match=r"none of \d+ held-out samples can be read"):
        offline_report(predict, held_out, train, on_error="skip")


def test_the_report_refuses_what_it_cannot_measure(split):
    train, held_out = split
    with pytest.raises(ValueError, match="Nothing is held out"):
        offline_report(None, None, train)
    with pytest.raises(ValueError, match=r"chunks of shape \(2, 3\), but the dataset's are \(3, 3\)"):
        offline_report(lambda samples: np.zeros((len(samples), 2, 3)), held_out, train)


def test_the_gripper_is_found_by_name_or_is_the_last_of_unnamed():
    assert gripper_dimension(["x", "gripper_left", "y"]) == 1
    assert gripper_dimension(["action_0", "action_1"]) == 1
    assert gripper_dimension(["shoulder", "thumb"]) is None


def test_rollouts_are_told_task_by_task():
    counts = count(POLICY, {"reach-v3": [EpisodeResult(0, True, 1, 0.0), EpisodeResult(1, False, 1, 0.0)]})
    assert describe_counts(counts) == "reach-v3 1/2"


def test_where_no_task_was_rolled_out_there_is_no_mean():
    counts = count(SWAPPED, {})
    assert (counts["mean_success"], describe_counts(counts)) == (None, "no task")
