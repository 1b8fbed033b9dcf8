"""VGGT gives what its authors' code gives, on every layer; reference numbers in references/vggt_tiny_a."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch._subclasses import FakeTensorMode
from vggt_fixture import DESCRIPTION, FIXTURE, REFERENCES, TOLERANCE, largest_difference, make_model

from hf_vla.model.configuration_vla import VGGTConfig
from hf_vla.model.modeling_vggt import VGGTModel, normalize_pixels

CASES = list(DESCRIPTION["cases"])


def make_small_model(**changes):
    torch.manual_seed(0)
    sizes = {"img_size": 28, "embed_dim": 16, "depth": 3, "num_heads": 2, "encoder_depth": 1, "encoder_num_heads": 2}
    return VGGTModel(VGGTConfig(**{**sizes, **changes})).eval()


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def pixels():
    return {case: u8.float() / 255 for case, u8 in load_file(FIXTURE / "inputs.safetensors").items()}


@pytest.fixture(scope="module")
def expected():
    return load_file(FIXTURE / "outputs.safetensors")


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_every_layer(model, pixels, expected, case):
    outputs = model(pixels[case])
    assert len(outputs) == model.config.depth
    for i, layer in enumerate(outputs):
        assert largest_difference(layer, expected[f"{case}.layer_{i}"]) <= TOLERANCE


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_encoder(model, pixels, case):
    theirs = load_file(FIXTURE / "intermediates.safetensors")
    h, w = (side // 14 for side in pixels[case].shape[-2:])
    tokens = model.patch_embed(normalize_pixels(pixels[case]).flatten(0, 1), h, w)
    assert largest_difference(tokens, theirs[f"{case}.encoder_x_norm_patchtokens"]) <= TOLERANCE
    assert largest_difference(model.patch_embed.positions(h, w), theirs[f"{case}.encoder_pos_embed"]) <= TOLERANCE


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_norms(pixels, checkpointing):
    theirs = json.loads((FIXTURE / "grad_norms.json").read_text())
    model = make_model().train()
    if checkpointing:
        model.activation_checkpointing_enable()
    images = pixels[theirs["case"]].clone().requires_grad_()

    loss = torch.stack([layer.square().mean() for layer in model(images)]).mean()
    loss.backward()

    assert loss.item() == pytest.approx(theirs["loss_value"], rel=1e-5)
    assert images.grad.norm().item() == pytest.approx(theirs["input_grad_norm"], rel=1e-4)
    norms = {f"aggregator.{n}": p.grad.norm().item() for n, p in model.named_parameters() if p.grad is not None}
    assert norms == pytest.approx(
        {n: norm for n, norm in theirs["grad_l2_norm"].items() if norm is not None}, rel=1e-3
    )


def test_activation_checkpointing_recomputes_only_when_switched_on(pixels):
    calls = []
    model = make_small_model().train()
    model.frame_blocks[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    pictures = torch.rand(1, 2, 3, 28, 28)
    model(pictures)[-1].sum().backward()
    assert len(calls) == 1
    model.activation_checkpointing_enable()
    model(pictures)[-1].sum().backward()
    assert len(calls) == 3
    model.activation_checkpointing_disable()
    model(pictures)[-1].sum().backward()
    assert len(calls) == 4


@torch.no_grad()
def test_layers_come_in_the_order_asked_for(model, pixels, expected):
    outputs = model(pixels["downsample"], layers=[-1, 0, 3])
    for layer, i in zip(outputs, [3, 0, 3], strict=True):
        assert largest_difference(layer, expected[f"downsample.layer_{i}"]) <= TOLERANCE
    assert model(pixels["downsample"], layers=[]) == []


@torch.no_grad()
def test_stack_stops_after_the_last_layer_needed():
    model = make_small_model()
    ran = []
    for i in range(3):
        model.frame_blocks[i].register_forward_hook(lambda *_, i=i: ran.append(i))
    model(torch.rand(1, 2, 3, 28, 28), layers=[1])
    assert ran == [0, 1]


def test_layer_that_is_not_there():
    with pytest.raises(ValueError, match=r"layers 0 to 2 \(or -3 to -1\); 3 isn't one"):
        make_small_model()(torch.rand(1, 2, 3, 28, 28), layers=[3])


def test_wrong_pictures_are_one_clear_error():
    model = make_small_model()
    with pytest.raises(ValueError, match=r"width of pixel_values must be a multiple of 14.*30 isn't.*28 and 42"):
        model(torch.rand(1, 2, 3, 28, 30))
    with pytest.raises(ValueError, match=r"pixel_values \(B, V, 3, H, W\); these are \(2, 3, 28, 28\)"):
        model(torch.rand(2, 3, 28, 28))


def test_heads_that_do_not_divide_the_width():
    with pytest.raises(ValueError, match="num_heads = 3 heads"):
        make_small_model(num_heads=3)
    with pytest.raises(ValueError, match="multiple of 4"):
        make_small_model(num_heads=8)


@torch.no_grad()
def test_only_view_0_is_the_reference():
    model = make_small_model(init_values=1.0)
    model.camera_token.normal_()
    pictures = torch.rand(1, 3, 3, 28, 28)
    last = model(pictures)[-1]
    swapped = model(pictures[:, [0, 2, 1]])[-1]
    assert torch.allclose(last[:, [0, 2, 1]], swapped, atol=1e-5)
    rotated = model(pictures[:, [1, 2, 0]])[-1]
    assert not torch.allclose(last[:, [1, 2, 0]], rotated, atol=1e-3)


@torch.no_grad()
def test_bfloat16_weights_stay_near_float32(pixels, expected):
    model = make_model().to(torch.bfloat16)
    outputs = model(pixels["native"])
    for i, layer in enumerate(outputs):
        reference = expected[f"native.layer_{i}"]
        assert layer.dtype == torch.float32
        assert (layer - reference).square().mean().sqrt() / reference.std() < 0.008


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trains_in_full_under_bfloat16_autocast(dtype):
    model = make_small_model(init_values=0.5).to(dtype).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        last = model(torch.rand(2, 2, 3, 28, 42), layers=[-1])[0]
    assert last.dtype == torch.float32
    last.square().mean().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().sum() > 0 or name.endswith("k_norm.bias"), name


def test_released_model_has_the_published_keys():
    published = json.loads((REFERENCES / "vggt_1b_keys.json").read_text())
    published = {name: shape for name, shape in published.items() if name.startswith("aggregator.")}
    with torch.device("meta"):
        model = VGGTModel(VGGTConfig())
    assert {f"aggregator.{n}": list(t.shape) for n, t in model.state_dict().items()} == published
    assert len(published) == 1210
    assert sum(p.numel() for p in model.parameters()) == 909_112_320


def test_no_step_waits_for_a_value():
    """A fake tensor has no values: reading one, which on a GPU is a host sync, raises."""
    with FakeTensorMode():
        model = make_small_model()
        outputs = model(torch.rand(2, 2, 3, 28, 42))
        sum(layer.mean() for layer in outputs).backward()
    assert outputs[0].shape == (2, 2, 5 + 6, 32)


def test_runs_on_the_meta_device():
    with torch.device("meta"):
        model = VGGTModel(VGGTConfig())
        (last,) = model(torch.rand(1, 2, 3, 224, 224), layers=[-1])
    assert last.shape == (1, 2, model.num_special_tokens + 256, 2048)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@torch.no_grad()
def test_compiles_to_one_graph(backend):
    model = make_small_model(depth=1)
    pictures = torch.rand(1, 2, 3, 28, 42)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    assert torch.allclose(compiled(pictures)[0], model(pictures)[0], atol=1e-5)


def test_initial_values():
    model = make_small_model(embed_dim=64, init_values=0.3, encoder_init_values=0.7)
    assert (model.frame_blocks[0].ls1.gamma == 0.3).all()
    assert (model.patch_embed.blocks[0].ls2.gamma == 0.7).all()
    assert model.camera_token.std().item() == pytest.approx(0.02, rel=0.2)
    assert model.patch_embed.pos_embed.std().item() == pytest.approx(0.5, rel=0.1)
    assert model.global_blocks[2].mlp.fc1.weight.std().item() == pytest.approx((3 * 64) ** -0.5, rel=0.1)
    assert model.patch_embed.patch_embed.proj.weight.std().item() == pytest.approx((3 * 14 * 14) ** -0.5, rel=0.15)
    assert not model.patch_embed.mask_token.requires_grad


def test_save_and_load_is_bit_equal(tmp_path):
    model = make_small_model()
    model.save_pretrained(tmp_path)
    loaded = VGGTModel.from_pretrained(tmp_path).eval()
    pictures = torch.rand(1, 2, 3, 28, 28)
    for ours, theirs in zip(model(pictures), loaded(pictures), strict=True):
        assert torch.equal(ours, theirs)
