"""Merging: one checkpoint that acts alike, opens alone, and is refused where there is nothing to merge."""

import numpy as np
import pytest

from hf_vla.checkpoint import load_checkpoint
from hf_vla.merge import merge
from hf_vla.policy import Policy
from hf_vla.train import train
from tests.test_training import FROZEN, observation
from tests.tiny_run import released_weights, tiny_recipe


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_a_merged_checkpoint_acts_as_its_adapters_did(tmp_path, quantization):
    lora = {"apply_to": ["lang_encoder"], "r": 4}
    model = {**FROZEN, "quantization": quantization, "dtype": "float32"}
    run = train(tiny_recipe(model=model, lora=lora), tmp_path / "run")
    assert merge(run / "model", tmp_path / "merged") < 1e-4
    merged, _, recipe = load_checkpoint(tmp_path / "merged")
    assert recipe.lora.apply_to == []
    assert not [name for name, _ in merged.named_parameters() if "lora_" in name]
    if quantization == "none":
        chunks = [
            Policy.from_pretrained(d).predict_action_chunk(observation()) for d in (run / "model", tmp_path / "merged")
        ]
        np.testing.assert_allclose(*chunks, atol=1e-3)


def test_what_trained_without_adapters_is_put_beside_its_backbones(tmp_path):
    run = train(tiny_recipe(model={**FROZEN, **released_weights(tmp_path)}), tmp_path / "run")
    assert (run / "model/trained.safetensors").is_file()
    assert merge(run / "model", tmp_path / "merged") == 0
    chunks = [
        Policy.from_pretrained(d).predict_action_chunk(observation()) for d in (run / "model", tmp_path / "merged")
    ]
    assert chunks[0].tobytes() == chunks[1].tobytes()
    assert (tmp_path / "merged/model.safetensors").is_file()


def test_nothing_to_merge_is_said(tmp_path):
    run = train(tiny_recipe(), tmp_path / "run")
    with pytest.raises(ValueError, match="no adapters to merge"):
        merge(run / "model", tmp_path / "merged")
    with pytest.raises(FileExistsError, match="isn't empty"):
        merge(run / "model", run)
