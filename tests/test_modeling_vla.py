"""The invariants of the whole policy, for every fusion and head."""

import copy
import itertools
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch
from peft import LoraConfig
from tiny_policy import (
    FUSION_TYPES,
    HEAD_TYPES,
    observation_of,
    rows,
    tiny_batch,
    tiny_config,
    tiny_model,
    tiny_processor,
    without,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModel, AutoProcessor

from hf_vla import VLAConfig, VLAForActionPrediction, VLAProcessor

KINDS = [*itertools.product(FUSION_TYPES, HEAD_TYPES), ({"type": "prefix", "align_weight": 0.5}, "l1")]
BACKBONE_UNUSED = {"model.vggt.patch_embed.mask_token"}  # in VGGT's checkpoint, read by no one


def name_of(kind):
    fusion, head = kind
    return f"{fusion if isinstance(fusion, str) else 'aligned'}-{head}"


@pytest.fixture(params=KINDS, ids=name_of)
def kind(request):
    return request.param


@pytest.fixture
def model(kind):
    return tiny_model(*kind)


@pytest.fixture
def batch(model):
    return tiny_batch(model.config)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def act(model, batch):
    return model.predict_action(**observation_of(batch), generator=seeded())


def loss_of(model, batch, **kwargs):
    with torch.no_grad():
        return model(**batch, generator=seeded(), **kwargs).loss


def valid_entries(batch):
    return (~batch["action_is_pad"]).sum() * batch["actions"].shape[-1]


def test_actions_have_the_contracts_shape(model, batch):
    actions = act(model, batch)
    assert actions.shape == (4, 5, 4)
    assert actions.dtype == torch.float32


@pytest.mark.parametrize("view", [0, 1])
def test_changing_one_view_changes_the_action(kind, view):
    model = tiny_model(*kind, seed=1)
    if kind[1] == "discrete":
        model.head.fit_levels(torch.randn(1000, 4))
    batch = tiny_batch(model.config)
    before = act(model, batch)
    batch["pixel_values"][:, view] = 1 - batch["pixel_values"][:, view].round()
    assert not torch.equal(act(model, batch), before)


def test_batch_order_does_not_matter(model, batch):
    draws = model.draws(batch["actions"], seeded())
    order = torch.tensor([2, 0, 3, 1])
    straight = loss_of(model, batch, draws=draws)
    shuffled = loss_of(model, rows(batch, order), draws=rows(draws, order))
    assert torch.allclose(straight, shuffled, rtol=1e-5)
    with torch.no_grad():
        context = model(**observation_of(batch)).context
        assert torch.allclose(model(**observation_of(rows(batch, order))).context, context[order], atol=1e-6)


def test_padded_steps_do_not_move_the_loss(model, batch):
    before = loss_of(model, batch)
    is_pad = batch["action_is_pad"][..., None]
    batch["actions"] = torch.where(is_pad, torch.rand_like(batch["actions"]), batch["actions"])
    assert torch.equal(loss_of(model, batch), before)
    batch["actions"] = torch.where(is_pad, batch["actions"], torch.rand_like(batch["actions"]))
    assert not torch.equal(loss_of(model, batch), before)


def test_a_batch_of_eight_equals_eight_batches_of_one(model):
    batch = tiny_batch(model.config, size=8)
    draws, count = model.draws(batch["actions"], seeded()), valid_entries(batch)
    whole = model(**batch, draws=draws)
    whole.loss.backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    losses = []
    for i in range(8):
        one = slice(i, i + 1)
        losses.append(model(**rows(batch, one), draws=rows(draws, one), num_items_in_batch=count).loss)
        losses[-1].backward()
    assert torch.allclose(sum(losses), whole.loss, rtol=1e-5)
    for name, parameter in model.named_parameters():
        if name in expected:
            assert torch.allclose(parameter.grad, expected[name], atol=1e-5), name


def test_gradients_reach_every_parameter(kind, model, batch):
    is_aligned = isinstance(kind[0], dict)
    if is_aligned:
        model.model.vggt.requires_grad_(False)  # it only gives the target
    model.train()(**batch, generator=seeded()).loss.backward()
    dead = {n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())}
    assert dead <= BACKBONE_UNUSED


def test_the_loss_halves_on_a_tiny_batch(model, batch):
    model.model.vggt.requires_grad_(False)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    draws, losses = model.draws(batch["actions"], seeded()), []
    for _ in range(60):
        output = model(**batch, draws=draws)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss.item())
        if losses[-1] < losses[0] / 2:
            return
    pytest.fail(f"from {losses[0]:.3f} to only {losses[-1]:.3f} in 60 steps")


def test_save_and_load_predict_the_same(model, batch, tmp_path):
    if "levels" in model.head.state_dict():
        model.head.fit_levels(torch.randn(1000, 4))
    model.save_pretrained(tmp_path)
    loaded = VLAForActionPrediction.from_pretrained(tmp_path)
    state = model.state_dict()
    assert state.keys() == loaded.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in loaded.state_dict().items())
    assert torch.equal(act(loaded, batch), act(model, batch))


def test_save_and_load_keep_bf16_backbones_and_a_float32_rest(tmp_path):
    model = tiny_model(head="discrete")
    model.model.vggt.bfloat16()
    model.model.lang_encoder.bfloat16()
    model.save_pretrained(tmp_path)
    loaded = VLAForActionPrediction.from_pretrained(tmp_path)
    assert {n: t.dtype for n, t in loaded.state_dict().items()} == {n: t.dtype for n, t in model.state_dict().items()}
    batch = tiny_batch(model.config)
    assert torch.equal(act(loaded, batch), act(model, batch))


def test_activation_checkpointing_changes_nothing(model, batch):
    def gradients():
        model.zero_grad()
        model.train()(**batch, generator=seeded()).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    checkpointed = gradients()
    assert plain.keys() == checkpointed.keys()
    assert all(torch.allclose(plain[name], checkpointed[name], atol=1e-6) for name in plain)


def test_it_runs_under_fake_tensors(kind):
    with torch.device("meta"):
        model = VLAForActionPrediction(tiny_config(*kind))
    batch = tiny_batch(model.config)
    with FakeTensorMode() as mode:
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = torch.nn.Parameter(torch.empty(parameter.shape))
            for name, buffer in module._buffers.items():
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
        fake = {name: mode.from_tensor(tensor) for name, tensor in batch.items()}
        loss = model.train()(**fake).loss
        loss.backward()
        assert loss.shape == ()
        assert model.predict_action(**observation_of(fake)).shape == (4, 5, 4)


class TestCachedFeatures:
    @pytest.fixture(params=FUSION_TYPES)
    def model(self, request):
        return tiny_model(request.param)

    @pytest.fixture
    def batch(self, model):
        return tiny_batch(model.config)

    @pytest.fixture
    def features(self, model, batch):
        with torch.no_grad():
            return model.model.encode_views(batch["pixel_values"])

    def test_they_give_the_loss_that_pixels_give(self, model, batch, features):
        assert features.shape == (4, 2, 4, 64)
        cached = {**without(batch, "pixel_values"), "view_features": features}
        assert torch.equal(loss_of(model, cached), loss_of(model, batch))
        rounded = {**cached, "view_features": features.bfloat16()}
        assert torch.allclose(loss_of(model, rounded), loss_of(model, batch), rtol=1e-2)

    def test_vggt_may_be_left_out(self, model, batch, features):
        cached = {**without(batch, "pixel_values"), "view_features": features}
        expected = loss_of(model, cached)
        model.model.vggt = None
        assert torch.equal(loss_of(model, cached), expected)
        with pytest.raises(ValueError, match="without its VGGT"):
            model(**batch)

    def test_exactly_one_of_pixels_and_features(self, model, batch, features):
        with pytest.raises(
            ValueError, match="exactly one of pixel_values and view_features, got pixel_values and view"
        ):
            model(**batch, view_features=features)
        with pytest.raises(ValueError, match="exactly one of pixel_values and view_features, got neither"):
            model(**without(batch, "pixel_values"))
        with pytest.raises(ValueError, match="exactly one of input_ids and text_features, got neither"):
            model(**without(batch, "input_ids"))


@pytest.mark.parametrize("fusion", ["cross_attention", "gated"])
def test_cached_text_gives_the_loss_that_ids_give_and_llama_may_be_left_out(fusion):
    model = tiny_model(fusion)
    batch = tiny_batch(model.config)
    with torch.no_grad():
        cached = {**without(batch, "input_ids"), "text_features": model.model.encode_text(batch["input_ids"])}
    expected = loss_of(model, batch)
    model.model.lang_encoder = None
    assert torch.equal(loss_of(model, cached), expected)
    assert model.get_input_embeddings() is None
    with pytest.raises(ValueError, match="without its language encoder"):
        model(**batch)


def test_features_are_the_pooled_patches_of_the_chosen_layer():
    model = tiny_model(vggt_layer=0, pool_grid=1)
    pixels = torch.rand(2, 2, 3, 28, 42)
    with torch.no_grad():
        tokens = model.model.vggt(pixels, layers=[0])[0]
        features = model.model.encode_views(pixels)
    assert torch.allclose(features, tokens[:, :, 3:].mean(2, keepdim=True), atol=1e-6)


def test_the_fusion_drops_out_only_in_training():
    model = tiny_model({"type": "cross_attention", "dropout": 0.5})
    batch = tiny_batch(model.config)
    assert torch.equal(loss_of(model, batch), loss_of(model, batch))
    model.train()
    assert not torch.equal(loss_of(model, batch), loss_of(model, batch))


@pytest.mark.parametrize("part", ["", "model", "model.vggt", "model.lang_encoder.layers.0.self_attn", "head"])
def test_training_reaches_a_part_that_was_switched_alone(part):
    model = tiny_model().train()
    model.get_submodule(part).eval()
    assert all(module.training for module in model.train().modules())
    assert not any(module.training for module in model.eval().modules())
    assert all(module.training for module in model.train().modules())


def test_a_model_that_trained_is_freed_once_nobody_holds_it():
    model = tiny_model().train()
    held = weakref.ref(model.train())
    del model
    assert held() is None


def test_it_holds_llama_2_7b_without_its_language_head():
    vggt = tiny_config().vggt_config
    with torch.device("meta"):
        model = VLAForActionPrediction(VLAConfig(vggt_config=vggt, text_config=AutoConfig.for_model("llama")))
    assert sum(p.numel() for p in model.model.lang_encoder.parameters()) == 6_607_343_616


@pytest.mark.parametrize("fusion", FUSION_TYPES)
def test_adapters_train_under_autocast_and_checkpointing_on_frozen_bf16_backbones(fusion):
    model = tiny_model(fusion)
    batch = tiny_batch(model.config)
    for backbone in (model.model.vggt, model.model.lang_encoder):
        backbone.bfloat16().requires_grad_(False)
    own = [*model.model.fusion.parameters(), *model.head.parameters()]
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    for parameter in own:
        parameter.requires_grad_(True)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    with torch.autocast("cpu", torch.bfloat16):
        output = model.train()(**batch)
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert sum("lora_" in name for name in trained) == 8
    assert all(p.grad is not None and p.grad.any() for p in trained.values())
    with torch.inference_mode():
        assert act(model.eval(), batch).isfinite().all()


def test_the_trainer_leaves_counting_to_the_model():
    assert VLAForActionPrediction.accepts_loss_kwargs
    assert VLAForActionPrediction.main_input_name == "state"


def test_auto_classes_know_the_policy(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), VLAConfig)
    assert isinstance(AutoModel.from_pretrained(tmp_path), VLAForActionPrediction)
    assert isinstance(AutoProcessor.from_pretrained(tmp_path), VLAProcessor)


def test_importing_the_package_is_cheap():
    code = "import sys, hf_vla; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


STRANGER = """
import sys
sys.modules["hf_vla"] = None  # not importable, as in an environment without this package
import numpy as np, torch
from transformers import AutoModel, AutoProcessor
folder = sys.argv[1]
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
inputs = np.load(folder + "/inputs.npz")
batch = processor(images=list(inputs["images"]), task=["push it", "go"], state=inputs["state"])
actions = processor.unnormalize_actions(model.predict_action(**batch, generator=torch.Generator().manual_seed(0)))
np.save(folder + "/stranger.npy", actions.numpy())
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", [("cross_attention", "l1"), ("prefix", "flow"), ("gated", "discrete")], ids=name_of)
def test_a_saved_directory_opens_in_a_process_without_this_package(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    rng = np.random.default_rng(0)
    inputs = {
        "images": rng.integers(0, 256, (2, 2, 28, 28, 3), dtype=np.uint8),
        "state": rng.normal(size=(2, 3)).astype(np.float32),
    }
    processor, model, folder = tiny_processor(), tiny_model(*kind), tmp_path / "policy"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    np.savez(folder / "inputs.npz", **inputs)
    batch = processor(images=list(inputs["images"]), task=["push it", "go"], state=inputs["state"])
    expected = processor.unnormalize_actions(model.predict_action(**batch, generator=seeded()))
    command = [sys.executable, "-I", "-c", STRANGER, str(folder)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert np.array_equal(np.load(folder / "stranger.npy"), expected.numpy())


def test_deep_copies_train_alike():
    model = tiny_model(head="flow")
    twin, batch = copy.deepcopy(model), tiny_batch(model.config)
    assert torch.equal(loss_of(model, batch), loss_of(twin, batch))
