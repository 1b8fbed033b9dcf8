"""The reference numbers of references/vggt_tiny_a, and the model that they belong to."""

import json
from pathlib import Path

from safetensors.torch import load_file

from hf_vla.model.configuration_vla import VGGTConfig
from hf_vla.model.modeling_vggt import VGGTModel

REFERENCES = Path(__file__).parents[1] / "references"
FIXTURE = REFERENCES / "vggt_tiny_a"
DESCRIPTION = json.loads((FIXTURE / "config.json").read_text())
TOLERANCE = 1e-4
"""Mistakes tried on purpose give 5e-4 and more, other attention kernels 4e-6."""


def make_model():
    model = VGGTModel(VGGTConfig(**DESCRIPTION["aggregator"])).eval()
    weights = load_file(FIXTURE / "aggregator_weights.safetensors")
    model.load_state_dict({name.removeprefix("aggregator."): tensor for name, tensor in weights.items()})
    return model


def largest_difference(ours, theirs):
    assert ours.shape == theirs.shape
    return (ours - theirs).abs().max().item()
