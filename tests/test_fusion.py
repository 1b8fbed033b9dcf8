import pytest
import torch
from tiny_policy import FUSION_TYPES, observation_of, rows, tiny_batch, tiny_config, tiny_model, without

from hf_vla.model.fusion import FUSIONS, PatchTokens, pool_patches

ALIGNED = {"type": "prefix", "align_weight": 0.5}


@pytest.fixture(params=FUSION_TYPES)
def model(request):
    return tiny_model(request.param)


def context_of(model, batch):
    with torch.no_grad():
        return model(**observation_of(batch)).context


def test_every_kind_of_fusion_is_tested_here():
    assert set(FUSION_TYPES) == set(FUSIONS)


@pytest.mark.parametrize("view", [0, 1])
def test_each_view_reaches_the_context(model, view):
    batch = tiny_batch(model.config)
    before = context_of(model, batch)
    batch["pixel_values"][:, view] = torch.rand_like(batch["pixel_values"][:, view])
    assert (context_of(model, batch) - before).abs().amax((1, 2)).min() > 1e-4


@pytest.mark.parametrize("name", ["input_ids", "state"])
def test_text_and_state_reach_the_context(model, name):
    batch = tiny_batch(model.config)
    before = context_of(model, batch)
    batch[name] = batch[name].flip(0)
    assert (context_of(model, batch) - before).abs().amax((1, 2)).min() > 1e-4


def test_padding_that_a_batch_mate_brings_changes_nothing(model):
    batch = tiny_batch(model.config)
    together = context_of(model, batch)
    for i, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        alone = rows(batch, slice(i, i + 1))
        alone = {**alone, "input_ids": alone["input_ids"][:, :length], "attention_mask": None}
        assert torch.allclose(context_of(model, alone), together[i : i + 1], atol=1e-5)


def test_what_stands_in_the_padding_changes_nothing(model):
    batch = tiny_batch(model.config)
    before = context_of(model, batch)
    batch["input_ids"] = torch.where(batch["attention_mask"].bool(), batch["input_ids"], 7)
    assert torch.allclose(context_of(model, batch), before, atol=1e-6)


def test_view_order_matters_even_to_equal_pictures_features(model):
    features = torch.randn(1, 2, 4, 64)
    rest = without(rows(tiny_batch(model.config), slice(0, 1)), "pixel_values")
    straight = context_of(model, {**rest, "view_features": features})
    swapped = context_of(model, {**rest, "view_features": features.flip(1)})
    assert (straight - swapped).abs().max() > 1e-4


@pytest.mark.parametrize("shape", [(1, 4), (3, 4), (2, 1), (2, 9)])
def test_lost_or_surplus_view_tokens_are_an_error_with_both_counts(model, shape):
    batch = without(tiny_batch(model.config), "pixel_values")
    message = rf"placeholders for 2 x 4 = 8 tokens.*bring {shape[0]} x {shape[1]} = {shape[0] * shape[1]}"
    with pytest.raises(ValueError, match=message):
        model(**batch, view_features=torch.randn(4, *shape, 64))


def test_a_frozen_language_encoder_that_reads_text_only_records_no_graph():
    model = tiny_model("cross_attention")
    model.model.lang_encoder.requires_grad_(False)
    model.model.lang_encoder.enable_input_require_grads()  # what activation checkpointing with adapters does
    assert not model.model.encode_text(torch.ones(1, 3, dtype=torch.long)).requires_grad


def test_a_frozen_vggt_records_no_graph():
    model = tiny_model()
    pixels = torch.rand(1, 2, 3, 28, 28, requires_grad=True)
    assert model.model.encode_views(pixels).requires_grad
    model.model.vggt.requires_grad_(False)
    assert not model.model.encode_views(pixels).requires_grad


def test_bf16_backbones_feed_a_float32_fusion(model):
    model.model.vggt.bfloat16()
    model.model.lang_encoder.bfloat16()
    model.model.vggt.requires_grad_(False)
    model.model.lang_encoder.requires_grad_(False)
    output = model.train()(**tiny_batch(model.config))
    assert output.context.dtype == output.loss.dtype == torch.float32
    output.loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_the_gate_closes_on_what_the_text_makes_irrelevant():
    gate = tiny_model("gated").model.fusion.gate
    views, mask = torch.randn(2, 8, 32), torch.tensor([[True, False], [True, True]])
    text = torch.randn(2, 2, 32)
    gated = gate(views, text, mask)
    assert ((gated / views > 0) & (gated / views < 1)).all()
    other = gate(views, torch.where(mask[..., None], text, 9.0), mask)
    assert torch.equal(gated, other), "padding has no say"


class TestAlignment:
    def test_it_is_not_built_at_weight_zero(self):
        fusion = tiny_model("prefix").model.fusion
        assert fusion.patches is None
        assert fusion.aligner is None

    def test_acting_does_without_vggt(self):
        model = tiny_model(ALIGNED)
        observation = observation_of(tiny_batch(model.config))
        expected = model.predict_action(**observation)
        model.model.vggt = None
        assert torch.equal(model.predict_action(**observation), expected)

    def test_training_needs_vggt(self):
        model = tiny_model(ALIGNED)
        model.model.vggt = None
        with pytest.raises(ValueError, match="without its VGGT"):
            model(**tiny_batch(model.config))

    def test_the_loss_holds_it_by_its_weight(self):
        model = tiny_model(ALIGNED)
        batch = tiny_batch(model.config)
        output = model(**batch)
        assert 0 < output.align_loss < 2
        model.config.view_fusion_config.align_weight = 0.0
        assert torch.allclose(output.loss - 0.5 * output.align_loss, model(**batch).loss)

    def test_it_draws_the_states_towards_vggts_tokens(self):
        model = tiny_model(ALIGNED)
        model.model.vggt.requires_grad_(False)
        batch = tiny_batch(model.config)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        losses = []
        for _ in range(30):
            output = model(**batch)
            output.align_loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(output.align_loss.item())
        assert losses[-1] < losses[0] / 2

    def test_cached_features_are_refused(self):
        model = tiny_model(ALIGNED)
        batch = without(tiny_batch(model.config), "pixel_values")
        with pytest.raises(ValueError, match="give pixel_values"):
            model(**batch, view_features=torch.randn(4, 2, 4, 64))

    def test_bad_settings_are_refused(self):
        with pytest.raises(ValueError, match="only `prefix` has"):
            tiny_model({"type": "gated", "align_weight": 0.5})
        with pytest.raises(ValueError, match="align_layer must be 1 to 2"):
            tiny_model({**ALIGNED, "align_layer": 3})


def test_prefix_needs_ids():
    model = tiny_model("prefix")
    batch = without(tiny_batch(model.config), "input_ids")
    with pytest.raises(ValueError, match="LLaMA reads the views too"):
        model(**batch, text_features=torch.randn(4, 6, 32))


def test_patch_tokens_see_where_things_are():
    tokens = PatchTokens(tiny_config(ALIGNED))
    pixels = torch.zeros(1, 2, 3, 28, 28)
    blank = tokens(pixels)
    pixels[0, 1, :, 20, 4] = 1  # view 1, lower left
    changed = (tokens(pixels) - blank).abs().sum(-1).nonzero().tolist()
    assert changed == [[0, 1, 2]]


def test_pooling_averages_row_by_row():
    grid = torch.arange(16.0).view(1, 1, 4, 4)
    assert pool_patches(grid, 2).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    with pytest.raises(ValueError, match="4 x 4 patches can't be pooled to 5 x 5"):
        pool_patches(grid, 5)
