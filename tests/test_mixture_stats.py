"""A policy of several datasets: each normalised by its own statistics, and acting in the units of the one that is named."""

import json
import shutil

import numpy as np
import pytest
import torch

from hf_vla.data.collator import VLACollator
from hf_vla.data.mixture import build_datasets, stats_of
from hf_vla.evaluation import evaluate_offline
from hf_vla.hub.card import model_card
from hf_vla.merge import merge
from hf_vla.policy import Policy
from hf_vla.prepare import build_trainer
from hf_vla.recipe import RecipeError
from hf_vla.report import write_report
from hf_vla.train import train
from tests.test_training import FROZEN, observation
from tests.tiny_policy import tiny_processor, tiny_stats
from tests.tiny_run import SAMPLE, SCALE, SHIFT, tiny_recipe, with_other_units


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return with_other_units(tmp_path_factory.mktemp("data") / "other_units")


@pytest.fixture(scope="module")
def mixture(other):
    return {"dataset": None, "mixture": [{"dataset": str(SAMPLE)}, {"dataset": str(other)}]}


@pytest.fixture(scope="module")
def run(mixture, tmp_path_factory):
    model = {**FROZEN, "head": {"type": "discrete"}}
    recipe = tiny_recipe(data=mixture, model=model, lora={"apply_to": ["lang_encoder"], "r": 4})
    return train(recipe, tmp_path_factory.mktemp("runs") / "mixed")


def normalised(data, mixture_stats):
    """Normalised state and first action of every sample, (n, S + A), of the one dataset and of the other."""
    train_data, _ = build_datasets(tiny_recipe(data={**data, "eval_fraction": 0.0}).data, chunk_size=3, seed=0)
    stats = stats_of(train_data, mixture_stats)
    processor = tiny_processor(views=["a", "b"], stats=stats, normalization="mean_std")
    samples = [train_data[i]._replace(view_features=torch.zeros(1), images=[]) for i in range(len(train_data))]
    batch = VLACollator(processor)(samples)
    values, half = torch.cat([batch["state"], batch["actions"][:, 0]], dim=1), len(samples) // 2
    return values[:half], values[half:]


def test_each_datasets_targets_have_the_same_range(mixture):
    small, large = normalised(mixture, "per_dataset")
    torch.testing.assert_close(small, large, atol=1e-3, rtol=1e-3)
    merged_small, merged_large = normalised(mixture, "merged")
    torch.testing.assert_close(
        merged_large.std(0) / merged_small.std(0), torch.full((8,), float(SCALE)), rtol=1e-2, atol=0
    )


def test_a_policy_acts_in_the_units_of_the_dataset_that_is_named(run, other):
    seen = observation()
    state = seen["observation.state"]
    small = Policy.from_pretrained(run / "model", dataset=SAMPLE.name).predict_action_chunk(seen)
    scaled = {**seen, "observation.state": SCALE * state + SHIFT}
    large = Policy.from_pretrained(run / "model", dataset=other.name).predict_action_chunk(scaled)
    np.testing.assert_allclose(large, SCALE * small + SHIFT, rtol=1e-3, atol=1e-2)


def test_held_out_samples_are_judged_each_in_its_own_units(run, other):
    report = evaluate_offline(run)
    small, large = (report["by_dataset"][name] for name in (SAMPLE.name, other.name))
    assert report["windows"] == small["windows"] + large["windows"]
    for predictor in ("policy", "mean_action", "nearest_state"):
        np.testing.assert_allclose(large[predictor]["mae"], SCALE * np.array(small[predictor]["mae"]), rtol=1e-2)
    shown = json.loads((run / "episode.json").read_text())
    assert len(shown["recorded"]) == len(shown["predicted"])
    write_report(run)


def test_merged_checkpoint_and_card_keep_the_choice(run, other, tmp_path):
    merge(run / "model", tmp_path / "merged")
    assert Policy.from_pretrained(tmp_path / "merged").processor.datasets == [SAMPLE.name, other.name]
    card = model_card(run, tmp_path / "merged", "me/mixed")
    assert f'Policy.from_pretrained("me/mixed", dataset="{SAMPLE.name}")' in card
    assert f'unnormalize_actions(predicted, dataset="{SAMPLE.name}")' in card
    assert f"`{SAMPLE.name}`, `{other.name}`" in card


def test_who_acts_without_a_name_or_with_a_wrong_one_is_told_the_names(run, other):
    known = f"'{SAMPLE.name}', '{other.name}'"
    with pytest.raises(ValueError, match=rf"dataset is None.*trained on 2 datasets.*{known}"):
        Policy.from_pretrained(run / "model").predict_action_chunk(observation())
    with pytest.raises(ValueError, match=rf"dataset is 'sawyer'.*{known}.*evaluation\.dataset"):
        Policy.from_pretrained(run / "model", dataset="sawyer")


def test_a_policy_of_one_dataset_takes_no_name():
    processor = tiny_processor()
    assert (processor.datasets, set(processor.stats)) == ([], {"observation.state", "action"})
    with pytest.raises(ValueError, match="dataset is 'a', but this policy's statistics are of one dataset"):
        processor(state=np.zeros((1, 3)), dataset="a")


def test_names_for_another_number_of_rows_are_refused():
    processor = tiny_processor(stats={"a": tiny_stats(), "b": tiny_stats(seed=1)})
    with pytest.raises(ValueError, match=r"dataset names 2 datasets, for 3 rows of observation\.state"):
        processor(state=np.zeros((3, 3)), dataset=["a", "b"])


def test_two_datasets_of_one_name_are_refused(other, tmp_path):
    shutil.copytree(other, tmp_path / other.name)
    mixture = [{"dataset": str(other)}, {"dataset": str(tmp_path / other.name)}]
    with pytest.raises(ValueError, match=f"two datasets are named '{other.name}'"):
        build_datasets(tiny_recipe(data={"dataset": None, "mixture": mixture}).data, 3, 0)


def test_a_simulator_needs_the_name_and_a_wrong_one_fails_before_training(mixture, tmp_path):
    simulator = {"simulator": "metaworld", "tasks": ["reach-v3"]}
    with pytest.raises(RecipeError, match=r"name the simulated robot's as evaluation\.dataset"):
        tiny_recipe(data=mixture, evaluation=simulator)
    with pytest.raises(RecipeError, match=r"evaluation\.dataset is 'a'.*leave it out"):
        tiny_recipe(evaluation={"dataset": "a"})
    with pytest.raises(RecipeError, match=r"evaluation\.dataset is 'a'.*leave it out"):
        tiny_recipe(data={**mixture, "mixture_stats": "merged"}, evaluation={"dataset": "a"})
    with pytest.raises(RecipeError, match="mixture_stats"):
        tiny_recipe(data={**mixture, "mixture_stats": "own"})
    with pytest.raises(ValueError, match=r"dataset is 'a'.*It knows"):
        build_trainer(tiny_recipe(data=mixture, evaluation={"dataset": "a"}), tmp_path)
