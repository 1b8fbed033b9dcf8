"""Acting: the queue, views of other moments, and what an observation must hold."""

import numpy as np
import pytest
import torch

from hf_vla.evaluation import device_of
from hf_vla.policy import Policy
from hf_vla.sample import parse_view, view_name
from hf_vla.train import train
from tests.tiny_run import tiny_recipe


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train(tiny_recipe(), tmp_path_factory.mktemp("policy") / "run")


@pytest.fixture(scope="module")
def run_of_moments(tmp_path_factory):
    views = ["corner2", {"camera": "corner2", "offset": -2}, {"camera": "gripperPOV", "offset": "goal"}]
    return train(tiny_recipe(data={"views": views}), tmp_path_factory.mktemp("moments") / "run")


def look(seed: int, *cameras: str) -> dict:
    generator = np.random.default_rng(seed)
    pictures = {
        f"observation.images.{camera}": generator.integers(0, 256, (28, 28, 3), dtype=np.uint8) for camera in cameras
    }
    return {**pictures, "observation.state": np.zeros(4, np.float32), "task": "reach the goal"}


def test_a_chunk_is_carried_out_before_the_next_look(run):
    policy = Policy.from_pretrained(run / "model", n_action_steps=3)
    seen = look(0, "corner2", "gripperPOV")
    first = policy.select_action(seen)
    assert not policy.needs_observation
    actions = [first, policy.select_action(None), policy.select_action(None)]
    assert policy.needs_observation
    np.testing.assert_array_equal(actions, policy.predict_action_chunk(seen)[:3])


def test_without_an_observation_where_one_is_needed_it_says_so(run):
    with pytest.raises(ValueError, match="needs an observation"):
        Policy.from_pretrained(run / "model").select_action(None)


def test_a_missing_camera_is_named(run):
    with pytest.raises(ValueError, match="gripperPOV"):
        Policy.from_pretrained(run / "model").select_action(look(0, "corner2"))


@pytest.mark.parametrize("sections", [{}, {"model": {"freeze_vggt": True}, "lora": {"apply_to": ["vggt"], "r": 2}}])
def test_damaged_weights_are_said(tmp_path, sections):
    model = train(tiny_recipe(**sections), tmp_path / "run") / "model"
    for file in model.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"model: its weights are damaged .*Copy or fetch"):
        Policy.from_pretrained(model)


def test_a_run_directory_in_place_of_its_model_is_told_from_what_is_none(run):
    with pytest.raises(FileNotFoundError, match=f"Give {run}/model"):
        Policy.from_pretrained(run)


def test_view_order_travels_with_the_checkpoint(run_of_moments):
    assert Policy.from_pretrained(run_of_moments / "model").processor.views == [
        "corner2",
        "corner2@-2",
        "gripperPOV@goal",
    ]


def test_a_view_of_the_past_shows_what_was_seen_then(run_of_moments):
    policy = Policy.from_pretrained(run_of_moments / "model", n_action_steps=1)
    frames = [look(seed, "corner2") for seed in range(4)]
    goal = look(9, "gripperPOV@goal")
    for frame in frames:
        assert policy.needs_observation
        action = policy.select_action({**goal, **frame})
    shown = [frames[3]["observation.images.corner2"], frames[1]["observation.images.corner2"]]
    shown.append(goal["observation.images.gripperPOV@goal"])
    expected = policy._predict([shown], ["reach the goal"], np.zeros((1, 4), np.float32))[0, 0]
    np.testing.assert_array_equal(action, expected)


@pytest.mark.parametrize("view", [("top", 0), ("top", -5), ("top", "goal")])
def test_a_views_name_says_all_of_it(view):
    assert parse_view(view_name(*view)) == view


@pytest.mark.parametrize(
    ("has_gpu", "use_cpu", "device"), [(True, False, "cuda"), (True, True, "cpu"), (False, False, "cpu")]
)
def test_a_policy_is_tried_where_it_was_trained(monkeypatch, has_gpu, use_cpu, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert device_of(tiny_recipe(training={"use_cpu": use_cpu})) == device
