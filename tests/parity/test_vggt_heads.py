"""Camera and depth heads give what their authors' code gives; reference numbers in references/vggt_tiny_a."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from vggt_fixture import DESCRIPTION, FIXTURE, REFERENCES, TOLERANCE, largest_difference, make_model

from hf_vla import weights
from hf_vla.model.configuration_vla import VGGTConfig
from hf_vla.model.vggt_heads import DPTHead, GeometryConfig, VGGTGeometry

HEADS = dict(DESCRIPTION["heads"])
CASES = HEADS.pop("cases")


@pytest.fixture(scope="module")
def theirs():
    return load_file(FIXTURE / "heads.safetensors")


@pytest.fixture(scope="module")
def tokens():
    """Each case's pictures and every layer's tokens of them."""
    model, inputs = make_model(), load_file(FIXTURE / "inputs.safetensors")
    with torch.no_grad():
        return {case: (inputs[case], model(inputs[case].float() / 255)) for case in CASES}


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    """The fixture in the form of a release."""
    folder = tmp_path_factory.mktemp("vggt")
    heads = {name: tensor for name, tensor in theirs.items() if not name.startswith("out.")}
    save_file({**load_file(FIXTURE / "aggregator_weights.safetensors"), **heads}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**DESCRIPTION["aggregator"], **HEADS}))
    return folder


@pytest.fixture(scope="module")
def heads(folder):
    return weights.load_geometry_heads(str(folder), weights.vggt_config(str(folder)))


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_depth_and_cameras(heads, tokens, theirs, case):
    pixels, layers = tokens[case]
    geometry = heads([layers[i] for i in heads.layers], *pixels.shape[-2:])
    assert largest_difference(geometry.depth, theirs[f"out.{case}.depth"][..., 0]) <= TOLERANCE
    assert largest_difference(geometry.depth_conf, theirs[f"out.{case}.depth_conf"]) <= TOLERANCE
    assert largest_difference(geometry.pose_enc, theirs[f"out.{case}.pose_enc_iter3"]) <= TOLERANCE


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_every_step_of_the_camera(heads, tokens, theirs, case):
    camera_tokens = tokens[case][1][-1][:, :, 0]
    for i, step in enumerate(heads.camera_head(camera_tokens)):
        assert largest_difference(step, theirs[f"out.{case}.pose_enc_iter{i}"]) <= TOLERANCE


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_point_head_is_the_same_network(tokens, theirs, case):
    """We don't build it, but its reference numbers test four channels of the same class."""
    pixels, layers = tokens[case]
    H, W = pixels.shape[-2:]
    head = DPTHead(128, GeometryConfig(**HEADS), channels=4)
    head.load_state_dict({n.removeprefix("point_head."): t for n, t in theirs.items() if n.startswith("point_head.")})
    patches = [layers[i][:, :, 5:].flatten(0, 1) for i in HEADS["dpt_layers"]]
    maps = head(patches, (H // 14, W // 14), (H, W)).unflatten(0, pixels.shape[:2]).movedim(2, -1)
    points, conf = maps[..., :3], maps[..., 3]
    assert largest_difference(points.sign() * points.abs().expm1(), theirs[f"out.{case}.world_points"]) <= TOLERANCE
    assert largest_difference(1 + conf.exp(), theirs[f"out.{case}.world_points_conf"]) <= TOLERANCE


@torch.no_grad()
def test_frames_do_not_meet_in_the_depth_head(heads, tokens):
    """So that it may take them a few at a time."""
    layers, size = tokens["single_frame"][1], (56, 56)
    many = [layers[i].expand(1, 10, -1, -1) for i in heads.layers]
    depth = heads(many, *size).depth
    assert depth.shape == (1, 10, 56, 56)
    assert torch.allclose(depth[:, 9:], heads([layers[i] for i in heads.layers], *size).depth, atol=1e-6)


def test_released_heads_have_the_published_keys():
    published = json.loads((REFERENCES / "vggt_1b_keys.json").read_text())
    published = {name: shape for name, shape in published.items() if name.startswith(("camera_head.", "depth_head."))}
    with torch.device("meta"):
        heads = VGGTGeometry(VGGTConfig(), GeometryConfig())
    assert {name: list(tensor.shape) for name, tensor in heads.state_dict().items()} == published


def test_heads_that_are_not_in_the_file(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    config = weights.vggt_config(str(copy))
    save_file(load_file(FIXTURE / "aggregator_weights.safetensors"), copy / "model.safetensors")
    with pytest.raises(ValueError, match=r"\d+ missing: camera_head\.embed_pose\.bias"):
        weights.load_geometry_heads(str(copy), config)
    (copy / "config.json").write_text(json.dumps(DESCRIPTION["aggregator"]))
    with pytest.raises(ValueError, match="must say camera_num_heads and dpt_layers"):
        weights.load_geometry_heads(str(copy), config)


def test_random_weights_have_no_heads():
    with pytest.raises(ValueError, match="its weights are random"):
        weights.load_geometry_heads({"embed_dim": 16}, VGGTConfig())
