"""The memory guide's three templates are recipes as they stand: each can be planned, and trained on tiny weights."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_vla import weights
from hf_vla.memory.planner import plan_recipe
from hf_vla.memory.shapes import Shapes
from hf_vla.recipe import load_recipe
from hf_vla.run import read_info
from hf_vla.train import train
from tests.tiny_run import SAMPLE

ROOT = Path(__file__).parent.parent
TEMPLATES = sorted((ROOT / "recipes/guide").glob("*.yaml"))
GIB = 2**30


@pytest.fixture(scope="module")
def tiny_weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    command = [sys.executable, ROOT / "data_scripts/make_tiny_checkpoint.py", folder]
    subprocess.run(command, check=True, capture_output=True)
    return [f"model.vggt={folder / 'vggt'}", f"model.lang_encoder={folder / 'llama'}"]


def load_vggt(override: str):
    return weights.load_vggt(override.partition("=")[2], torch.float32).parameters()


def load_llama(override: str):
    return weights.load_lang_encoder(override.partition("=")[2], torch.float32).parameters()


@pytest.mark.slow
@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_a_template_trains_on_tiny_weights(path, tiny_weights, tmp_path):
    here = [f"data.dataset={SAMPLE}", "data.image_size=112", "data.num_workers=0", "training.max_steps=1"]
    recipe = load_recipe(path, [*tiny_weights, *here, "training.use_cpu=true", 'training.report_to="none"'])
    info = read_info(train(recipe, tmp_path / "run"))
    assert info["steps"] == 1
    vggt, llama = (sum(p.numel() for p in load(tiny_weights[i])) for i, load in enumerate((load_vggt, load_llama)))
    assert info["parameters"]["frozen"] == vggt + llama * recipe.model.freeze_lang_encoder


@pytest.mark.slow
@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_a_template_is_planned_at_full_size(path):
    recipe = load_recipe(path)
    plan = plan_recipe(recipe, budget="28GiB", gpus=8, gpu="RTX 6000 Ada", shapes=Shapes())
    assert plan.parameters  # 7B of them: see test_planner for the arithmetic
    assert plan.effective_batch == 64
    assert plan.fits == recipe.model.freeze_lang_encoder, plan.total / GIB
