"""Recipes: what is accepted, and that each mistake ends in one error that names the key and what to do."""

import json
from pathlib import Path

import pytest

from hf_vla.recipe import RecipeError, load_recipe, make_recipe

RECIPES = sorted(Path(__file__).parent.parent.joinpath("recipes").glob("*.json"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_of_the_house_can_be_read(path):
    assert load_recipe(path).about.purpose


def test_the_resolved_recipe_reproduces_itself(tmp_path):
    recipe = load_recipe(RECIPES[0], ["data.batch_size=3", "training.seed=7"])
    recipe.save(tmp_path / "recipe.json")
    assert load_recipe(tmp_path / "recipe.json") == recipe


def test_the_guides_six_lines_are_a_recipe(tmp_path):
    path = tmp_path / "template.yaml"
    path.write_text(
        "model:\n  freeze_vggt: true\n  freeze_lang_encoder: false\n\ndata:\n  batch_size: 2\n  image_size: 518\n\n"
        "training:\n  gradient_accumulation_steps: 4\n"
    )
    recipe = load_recipe(path)
    assert (recipe.model.freeze_lang_encoder, recipe.data.batch_size) == (False, 2)
    assert recipe.training["gradient_accumulation_steps"] == 4


def test_yaml_reads_a_learning_rate_as_a_number(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("training:\n  learning_rate: 1e-4\n")
    assert load_recipe(path).training["learning_rate"] == 1e-4


def test_views_may_be_names_or_moments():
    recipe = make_recipe({"data": {"views": ["top", {"camera": "top", "offset": "goal"}]}})
    assert [(view.camera, view.offset) for view in recipe.data.views] == [("top", 0), ("top", "goal")]


def test_overrides_reach_nested_keys(tmp_path):
    path = tmp_path / "recipe.json"
    path.write_text("{}")
    recipe = load_recipe(path, ["model.fusion.type=gated", "data.dataset=a/b", "model.freeze_vggt=false"])
    assert (recipe.model.fusion.type, recipe.data.dataset, recipe.model.freeze_vggt) == ("gated", "a/b", False)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"modle": {}}, ["'modle'", "'model'"]),
        ({"model": {"freze_vggt": True}}, ["model.freze_vggt", "'freeze_vggt'"]),
        ({"model": {"fusion": {"typ": "gated"}}}, ["model.fusion.typ", "'type'"]),
        ({"model": {"fusion": {"type": "cross"}}}, ["model.fusion.type", "'cross'", "'gated'"]),
        ({"data": {"batch_size": "8"}}, ["data.batch_size", "'8'", "integer"]),
        ({"data": {"views": [{"camra": "top"}]}}, ["data.views.0"]),
        ({"data": {"image_size": 384}}, ["384", "378 and 392"]),
        ({"data": []}, ["'data'", "object"]),
        ({"training": {"learning_rat": 1e-4}}, ["training.learning_rat", "'learning_rate'"]),
        ({"training": {"learning_rate": "1e-4"}}, ["training.learning_rate", "float"]),
        ({"training": {"per_device_train_batch_size": 4}}, ["data.batch_size"]),
        ({"training": {"fp16": True}}, ["training.bf16", "training.fp16"]),
        ({"model": {"freeze_lang_encoder": False}, "lora": {"apply_to": ["lang_encoder"]}}, ["lora.apply_to"]),
        ({"model": {"freeze_lang_encoder": False, "quantization": "nf4"}}, ["quantised weights can't be trained"]),
        ({"memory": {"embedding_state_bits": 8}}, ["training.optim is 'adamw_torch'", "choose one that does"]),
        ({"model": {"fusion": {"align_weight": 0.1}}}, ["align_weight", "prefix"]),
        ({"model": {"fusion": {"hidden_size": 100}}}, ["num_heads is 16", "hidden_size 100"]),
        (
            {"model": {"fusion": {"type": "prefix", "align_weight": 0.1}}, "memory": {"cache": ["vggt"]}},
            ["memory.cache names 'vggt'", "align_weight"],
        ),
        (
            {"model": {"fusion": {"type": "prefix"}}, "memory": {"cache": ["lang_encoder"]}},
            ["memory.cache names 'lang_encoder'", "prefix"],
        ),
        ({"model": {"vggt": {"depth": 2}, "outputs": "geometry"}}, ["model.outputs", "random", "facebook/VGGT-1B"]),
        ({"model": {"prompt": "do it"}}, ["{task}"]),
        ({"data": {"batch_size": 0}}, ["data.batch_size is 0", "greater than or equal to 1"]),
        ({"data": {"eval_fraction": 1.0}}, ["data.eval_fraction is 1.0", "less than 1"]),
        ({"data": {"image_size": 84}}, ["model.pool_grid is 8", "6 x 6 patches", "112"]),
        ({"memory": {"gpus": 0}}, ["memory.gpus is 0"]),
        ({"training": {"gradient_accumulation_steps": 0}}, ["training.gradient_accumulation_steps is 0"]),
        ({"training": {"max_steps": 0}}, ["training.max_steps is 0", "num_train_epochs"]),
    ],
)
def test_a_mistake_is_named(raw, words):
    with pytest.raises(RecipeError) as error:
        make_recipe(raw)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("override", ["batch_size=4", "data.batch_size", "data.batch_size.x=1"])
def test_an_override_that_names_no_key_is_refused(tmp_path, override):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({"data": {"batch_size": 2}}))
    with pytest.raises(RecipeError, match="--set"):
        load_recipe(path, [override])


def test_a_missing_or_broken_file_is_said(tmp_path):
    (tmp_path / "lora.json").write_text("{")
    with pytest.raises(RecipeError, match=r"no such recipe file.*lora\.json"):
        load_recipe(tmp_path / "lore.json")
    with pytest.raises(RecipeError, match="neither JSON nor YAML"):
        load_recipe(tmp_path / "lora.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(RecipeError, match="one object with the sections"):
        load_recipe(tmp_path / "list.json")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("pasted.yaml", "data:\n  batch_size: 4\ntraining:\n  max_steps: 9\ndata:\n  image_size: 518\n"),
        ("nested.yaml", "data:\n  batch_size: 4\n  batch_size: 8\n"),
        ("pasted.json", '{"data": {"batch_size": 4}, "data": {"batch_size": 8}}'),
    ],
)
def test_a_key_that_is_there_twice_is_refused(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(RecipeError, match=rf"{name}: '(data|batch_size)' is there twice"):
        load_recipe(tmp_path / name)
