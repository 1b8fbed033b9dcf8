"""The tiny checkpoints have the released ones' files and names, so that what loads one loads the other."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from hf_vla import weights

ROOT = Path(__file__).parent.parent
PUBLISHED = json.loads((ROOT / "tests/references/vggt_1b_keys.json").read_text())


def load_script():
    spec = importlib.util.spec_from_file_location(
        "make_tiny_checkpoint", ROOT / "data_scripts/make_tiny_checkpoint.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = load_script()


def write(folder, *options):
    app = script.typer.Typer()
    app.command()(script.main)
    return CliRunner().invoke(app, [str(folder), *options])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    result = write(folder)
    assert result.exit_code == 0, result.output
    return folder


def without_indices(name):
    return ".".join("N" if part.isdigit() else part for part in name.split("."))


def test_vggt_has_the_published_names(folder):
    ours = {without_indices(name) for name in load_file(folder / "vggt/model.safetensors")}
    published = {without_indices(name) for name in PUBLISHED}
    assert {name for name in ours if not name.startswith("track_head.")} == published


def test_vggt_loads_and_runs_at_any_size(folder):
    model = weights.load_vggt(str(folder / "vggt"), torch.bfloat16)
    assert model.config.img_size == 56
    assert model(torch.rand(1, 2, 3, 70, 84), layers=[-1])[0].shape == (1, 2, 5 + 30, 2 * model.config.embed_dim)
    heads = weights.load_geometry_heads(str(folder / "vggt"), model.config)
    geometry = heads(model(torch.rand(1, 2, 3, 28, 42), layers=heads.layers), 28, 42)
    assert geometry.depth.shape == (1, 2, 28, 42)


def test_llama_is_saved_with_its_lm_head(folder):
    assert "lm_head.weight" in load_file(folder / "llama/model.safetensors")
    assert json.loads((folder / "llama/config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert weights.load_lang_encoder(str(folder / "llama")).config.hidden_size == 32


@pytest.mark.parametrize("text", [script.SENTENCES[0], "Öffne die Schublade, 抽屉"])
def test_tokenizer_is_of_llamas_kind(folder, text):
    tokenizer = weights.load_tokenizer(str(folder / "llama"))
    assert tokenizer.pad_token is None
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id == 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.unk_token_id not in ids
    assert len(tokenizer) == weights.lang_encoder_config(str(folder / "llama")).vocab_size


def test_seed_decides_every_weight(folder, tmp_path):
    assert write(tmp_path, "--seed", "0").exit_code == 0
    for file in ("vggt/model.safetensors", "llama/model.safetensors", "llama/tokenizer.json"):
        assert (tmp_path / file).read_bytes() == (folder / file).read_bytes()
    assert write(tmp_path, "--seed", "1").exit_code == 0
    assert (tmp_path / "vggt/model.safetensors").read_bytes() != (folder / "vggt/model.safetensors").read_bytes()


def test_wrong_options(tmp_path):
    assert "the sizes are small, medium" in write(tmp_path, "--size", "huge").output
    assert "Nearest: 42 and 56" in write(tmp_path, "--image-size", "50").output
    assert not list(tmp_path.iterdir())
