"""Actions learned as changes from the observed state, and given back as they were recorded."""

import numpy as np
import pytest
import torch

from hf_vla.evaluation import evaluate_offline
from hf_vla.hub.card import model_card
from hf_vla.model.processing_vla import VLAProcessor
from hf_vla.policy import Policy
from hf_vla.recipe import RecipeError
from hf_vla.train import train
from tests.test_training import observation
from tests.tiny_policy import tiny_processor, tiny_stats
from tests.tiny_run import tiny_recipe

STATE = torch.randn(2, 4)
ACTIONS = torch.randn(2, 5, 4)


@pytest.fixture
def relative():
    return tiny_processor(stats=tiny_stats(state_dim=4), action_form="relative")


def test_holding_still_is_zero_and_recorded_actions_come_back(relative, tmp_path):
    still = relative(state=STATE, actions=STATE[:, None].expand(2, 5, 4))["actions"]
    assert still.abs().max() == 0
    relative.save_pretrained(tmp_path)
    for processor in (relative, VLAProcessor.from_pretrained(tmp_path)):
        learned = processor(state=STATE, actions=ACTIONS)["actions"]
        torch.testing.assert_close(processor.unnormalize_actions(learned, state=STATE), ACTIONS)


def test_one_scale_holds_for_both_forms(relative):
    recorded = tiny_processor(stats=tiny_stats(state_dim=4))
    steps = [processor(state=STATE, actions=ACTIONS)["actions"].diff(dim=1) for processor in (relative, recorded)]
    torch.testing.assert_close(*steps)


def test_each_dataset_of_a_mixture_starts_from_its_own_state():
    stats = {"a": tiny_stats(state_dim=4), "b": tiny_stats(state_dim=4, seed=1)}
    processor = tiny_processor(stats=stats, action_form="relative")
    learned = processor(state=STATE, actions=ACTIONS, dataset=["a", "b"])["actions"]
    back = processor.unnormalize_actions(learned, ["a", "b"], STATE)
    torch.testing.assert_close(back, ACTIONS)


def test_what_it_needs_is_said(relative):
    with pytest.raises(ValueError, match=r"changes from the observed state: give state"):
        relative.unnormalize_actions(ACTIONS)
    with pytest.raises(ValueError, match=r"the state has 3 dimensions and an action 4.*Take 'recorded'"):
        tiny_processor(action_form="relative")
    with pytest.raises(ValueError, match="Unknown action_form 'delta'"):
        tiny_processor(action_form="delta")
    with pytest.raises(RecipeError, match=r"data\.action_form is 'relative'.*'discrete'"):
        tiny_recipe(data={"action_form": "relative"}, model={"head": {"type": "discrete"}})


def test_a_trained_policy_acts_from_where_the_robot_is(tmp_path, caplog):
    run = train(tiny_recipe(data={"action_form": "relative"}), tmp_path / "run")
    policy, seen = Policy.from_pretrained(run / "model"), observation()
    policy.model.head.sample = lambda context, generator=None: torch.zeros(len(context), 4, 4)
    chunk = policy.predict_action_chunk(seen)
    np.testing.assert_allclose(chunk, np.tile(seen["observation.state"], (4, 1)), atol=1e-5)
    with caplog.at_level("INFO"):
        offline = evaluate_offline(run)
    assert offline["windows"] > 0
    assert f"nearest_state {offline['nearest_state']['mean_mae']:.3g}" in caplog.text
    assert "unnormalize_actions(predicted, state=state[None])" in model_card(run, run / "model", "me/it")
