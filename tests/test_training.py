"""Training end to end at tiny size: what moves, what stays, what is saved, and that cutting a run up changes nothing."""

import json
import subprocess
import sys
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainingArguments

import hf_vla.train
from hf_vla.checkpoint import load_checkpoint
from hf_vla.lora import trained_names
from hf_vla.policy import Policy
from hf_vla.recipe import RecipeError
from hf_vla.train import build_trainer, main, train
from tests import tiny_run
from tests.tiny_run import SAMPLE, released_weights, tiny_recipe

ROOT = Path(__file__).parent.parent


def weights(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def trained_weights(recipe, directory: Path) -> dict[str, torch.Tensor]:
    trainer = build_trainer(recipe, directory)
    trainer.train()
    return weights(trainer.bare_model())


def observation(seed: int = 0) -> dict:
    generator = np.random.default_rng(seed)
    pictures = {
        f"observation.images.{camera}": generator.integers(0, 256, (28, 28, 3), dtype=np.uint8)
        for camera in ("corner2", "gripperPOV")
    }
    return {**pictures, "observation.state": np.zeros(4, np.float32), "task": "Rotate the faucet counter-clockwise"}


FROZEN = {"freeze_vggt": True, "freeze_lang_encoder": True}
LORA = {"apply_to": ["lang_encoder", "vggt"], "r": 4, "lora_dropout": 0.1}


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"model": FROZEN},
        {"model": {**FROZEN, "dtype": "bfloat16"}, "lora": LORA, "training": {"bf16": True}},
        {"model": {**FROZEN, "fusion": {"type": "prefix"}}, "lora": LORA},
    ],
    ids=["full", "frozen", "lora_bf16", "lora_prefix"],
)
def test_what_trains_moves_what_is_frozen_stays_and_what_is_saved_is_what_trained(tmp_path, sections):
    recipe = tiny_recipe(**sections)
    trainer = build_trainer(recipe, tmp_path / "run")
    model = trainer.bare_model()
    before, trainable = weights(model), trained_names(model)
    trainer.train()
    moved = {name for name, tensor in weights(model).items() if not torch.equal(before[name], tensor)}
    assert moved == trainable
    trainer.save_model(str(tmp_path / "saved"))
    loaded, _, _ = load_checkpoint(tmp_path / "saved")
    after = weights(model)
    assert all(torch.equal(after[name], tensor) for name, tensor in weights(loaded).items())


def test_a_whole_model_in_two_precisions_opens_as_it_was_saved(tmp_path):
    recipe = tiny_recipe(model={"dtype": "bfloat16", "head": {"type": "discrete"}}, training={"bf16": True})
    run = train(recipe, tmp_path / "run")
    assert (run / "model/model.safetensors").is_file()
    saved = load_file(run / "model/model.safetensors")
    opened = load_checkpoint(run / "model")[0].state_dict()
    assert opened.keys() == saved.keys()
    for name, tensor in opened.items():
        is_backbone = name.startswith(("model.vggt.", "model.lang_encoder."))
        assert tensor.dtype == saved[name].dtype == (torch.bfloat16 if is_backbone else torch.float32)
        assert torch.equal(tensor, saved[name])


def test_released_weights_that_trained_in_full_are_saved_as_a_whole_model(tmp_path):
    run = train(tiny_recipe(model=released_weights(tmp_path)), tmp_path / "run")
    assert (run / "model/model.safetensors").is_file()
    assert not (run / "model/trained.safetensors").exists()


def test_accumulation_follows_the_whole_batch(tmp_path):
    calm = {"adam_epsilon": 1e-3}  # Adam blows rounding errors up to whole steps where the true gradient is zero
    whole = trained_weights(tiny_recipe(data={"batch_size": 8}, training=calm), tmp_path / "whole")
    cut = tiny_recipe(data={"batch_size": 1}, training={**calm, "gradient_accumulation_steps": 8})
    for name, tensor in trained_weights(cut, tmp_path / "cut").items():
        torch.testing.assert_close(
            tensor, whole[name], rtol=1e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_one_process_trains_on_one_gpu_of_all_that_it_sees(tmp_path, monkeypatch):
    found = TrainingArguments._setup_devices.func

    def see_eight(arguments):  # as on a server of eight, which transformers gives to a process that runs alone
        device = found(arguments)
        arguments._n_gpu = 8
        return device

    see = cached_property(see_eight)
    see.__set_name__(TrainingArguments, "_setup_devices")
    monkeypatch.setattr(TrainingArguments, "_setup_devices", see)
    trainer = build_trainer(tiny_recipe(), tmp_path)
    assert len(next(iter(trainer.get_train_dataloader()))["actions"]) == 4
    assert len(next(iter(trainer.get_eval_dataloader()))["actions"]) == 4


def test_resuming_equals_going_straight(tmp_path):
    dropout = {"fusion": {"dropout": 0.1}}
    straight = train(tiny_recipe(model=dropout, training={"max_steps": 4}), tmp_path / "straight")
    cut = train(tiny_recipe(model=dropout, training={"max_steps": 2, "save_steps": 2}), tmp_path / "cut")
    train(tiny_recipe(model=dropout, training={"max_steps": 4, "save_steps": 2}), cut, resume=True)
    a, b = (weights(load_checkpoint(run / "model")[0]) for run in (straight, cut))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_run_directory_says_what_happened(tmp_path):
    run = train(tiny_recipe(training={"logging_steps": 1}), tmp_path / "run")
    info = json.loads((run / "run.json").read_text())
    assert info["steps"] == 2
    assert info["parameters"]["frozen"] == tiny_run.TINY_VGGT["embed_dim"]  # VGGT's mask token, which nothing reads
    assert info["parameters"]["trained"] > 50_000
    assert info["versions"]["torch"] == torch.__version__
    assert (run / "report.html").is_file()
    logged = [entry for entry in json.loads((run / "log_history.json").read_text()) if "loss" in entry]
    assert [entry["step"] for entry in logged] == [1, 2]
    assert all("memory/host_rss_gib" in entry for entry in logged)
    assert json.loads((run / "recipe.json").read_text())["data"]["batch_size"] == 4


def test_the_held_out_loss_is_the_last_one(tmp_path):
    run = train(tiny_recipe(training={"eval_strategy": "steps", "eval_steps": 1}), tmp_path / "run")
    losses = [e["eval_loss"] for e in json.loads((run / "log_history.json").read_text()) if "eval_loss" in e]
    assert len(set(losses)) == 2
    assert json.loads((run / "run.json").read_text())["train"]["eval_loss"] == losses[-1]


def test_a_run_that_goes_on_by_another_recipe_says_so_and_keeps_that(tmp_path):
    train(tiny_recipe(training={"save_steps": 2}), tmp_path / "run")
    train(tiny_recipe(training={"max_steps": 3, "save_steps": 2}), tmp_path / "run", resume=True)
    events = [event["text"] for event in json.loads((tmp_path / "run/run.json").read_text())["events"]]
    assert "The run goes on by another recipe: training.max_steps was 2 and is 3." in events
    assert len(events) == 2  # and where it goes on from
    assert json.loads((tmp_path / "run/recipe.json").read_text())["training"]["max_steps"] == 3


def test_a_finished_run_without_a_checkpoint_isnt_trained_again(tmp_path):
    run = train(tiny_recipe(training={"save_strategy": "no"}), tmp_path / "run")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(FileExistsError, match="kept no checkpoint"):
        train(tiny_recipe(training={"save_strategy": "no"}), run, resume=True)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory):
    """`accelerate launch` on the released recipe, with tiny checkpoints in the released ones' formats."""
    folder = tmp_path_factory.mktemp("lora")
    make = [sys.executable, ROOT / "data_scripts/make_tiny_checkpoint.py", folder / "weights"]
    subprocess.run(make, check=True, capture_output=True)
    keys = {
        "model.vggt": folder / "weights/vggt",
        "model.lang_encoder": folder / "weights/llama",
        "data.dataset": SAMPLE,
        "data.image_size": 28,
        "data.batch_size": 2,
        "data.num_workers": 0,
        "data.eval_fraction": 0.3,
        "model.pool_grid": 2,
        "model.chunk_size": 4,
        "model.fusion.hidden_size": 32,
        "model.head.hidden_size": 32,
        "memory.budget": "null",
        "training.use_cpu": "true",
        "training.max_steps": 2,
        "training.save_steps": 2,
    }
    overrides = [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]
    launch = ["-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1", "--cpu"]
    plain = ["--mixed_precision", "no", "--dynamo_backend", "no"]
    script = [ROOT / "hf_vla/train.py", ROOT / "recipes/lora.json", "--output", folder / "run", *overrides]
    done = subprocess.run([sys.executable, *launch, *plain, *script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder / "run"


@pytest.mark.slow
def test_the_released_recipe_trains_and_saves_an_adapter(lora_run):
    saved = {path.name for path in (lora_run / "model").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "trained.safetensors", "config.json"} <= saved
    assert "model.safetensors" not in saved
    assert json.loads((lora_run / "run.json").read_text())["steps"] == 2


@pytest.mark.slow
def test_a_new_process_predicts_the_same_action(lora_run):
    code = (
        "import sys; from hf_vla.policy import Policy; from tests.test_training import observation;"
        f"policy = Policy.from_pretrained({str(lora_run / 'model')!r});"
        "sys.stdout.buffer.write(policy.predict_action_chunk(observation()).tobytes())"
    )
    there = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True).stdout
    here = Policy.from_pretrained(lora_run / "model").predict_action_chunk(observation())
    assert here.tobytes() == there


def test_changing_either_picture_changes_the_action(tmp_path):
    run = train(tiny_recipe(), tmp_path / "run")
    policy = Policy.from_pretrained(run / "model")
    seen, other = observation(0), observation(1)
    before = policy.predict_action_chunk(seen)
    for camera in ("corner2", "gripperPOV"):
        key = f"observation.images.{camera}"
        assert not np.array_equal(before, policy.predict_action_chunk({**seen, key: other[key]}))


def test_a_users_accelerate_config_has_no_say_in_the_precision(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # as its launcher passes it on
    assert build_trainer(tiny_recipe(), tmp_path / "none").accelerator.mixed_precision == "no"
    assert build_trainer(tiny_recipe(training={"bf16": True}), tmp_path / "bf16").accelerator.mixed_precision == "bf16"


def test_a_directory_that_holds_a_run_is_left_alone(tmp_path):
    (tmp_path / "recipe.json").write_text("{}")
    with pytest.raises(FileExistsError, match="already holds a run"):
        train(tiny_recipe(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.json"]


def test_a_directory_that_is_taken_is_refused_before_anything_is_looked_at(tmp_path, monkeypatch):
    (tmp_path / "recipe.json").write_text("{}")
    monkeypatch.setattr(hf_vla.train, "run_checks", lambda *arguments: pytest.fail("went through the checklist"))
    with pytest.raises(SystemExit, match="already holds a run"):
        main(ROOT / "recipes/tiny.json", output=tmp_path, resume=False, anyway=False)
    with pytest.raises(SystemExit, match="holds no run to resume"):
        main(ROOT / "recipes/tiny.json", output=tmp_path / "none", resume=True, anyway=False)


@pytest.mark.parametrize(
    ("sections", "error", "words"),
    [
        ({"data": {"dataset": "nowhere/at_all/x"}}, FileNotFoundError, "no folder"),
        ({"data": {"dataset": None}}, ValueError, "data.dataset isn't set"),
        ({"data": {"views": ["corner2", "wrist"]}}, ValueError, "no camera 'wrist'"),
        ({"training": {"bf16": False, "fp16": True}}, RecipeError, "there is no GPU"),
        ({"memory": {"gpus": 2}}, RecipeError, "2 processes were asked for"),
        ({"memory": {"cache": ["vggt"]}, "model": FROZEN}, RecipeError, "makes at random"),
        ({"training": {"save_strategy": "sometimes"}}, RecipeError, "sometimes"),
        ({"training": {"dataloader_drop_last": True}}, RecipeError, "every sample is seen once"),
        ({"training": {"enable_jit_checkpoint": True}}, RecipeError, "every sample is seen once"),
        ({"model": {"vggt": "no/such/weights.safetensors"}}, FileNotFoundError, "no/such"),
    ],
)
def test_what_cant_run_is_said_and_nothing_is_written(tmp_path, sections, error, words):
    if words == "there is no GPU" and torch.cuda.is_available():
        pytest.skip("there is a GPU, so fp16 runs")
    with pytest.raises(error, match=words):
        train(tiny_recipe(**sections), tmp_path / "run")
    assert not (tmp_path / "run").exists()
