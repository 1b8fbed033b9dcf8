"""What trains: with VGGT read below its top, exactly what a gradient can reach."""

import bitsandbytes
import pytest
import torch
from peft.tuners.lora import bnb, layer

from hf_vla.assemble import build_config, build_model, build_on_meta
from hf_vla.lora import trained_names
from hf_vla.recipe import RecipeError
from tests.tiny_run import TINY_VGGT, tiny_recipe

DEPTH = 3
FROZEN = {"freeze_vggt": True, "freeze_lang_encoder": True}
LORA = {"apply_to": ["vggt", "lang_encoder"], "r": 2}


def batch_of(config) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "pixel_values": torch.rand(2, 2, 3, 28, 28, generator=generator),
        "input_ids": torch.randint(1, 200, (2, 5), generator=generator),
        "state": torch.randn(2, config.state_dim, generator=generator),
        "actions": torch.randn(2, config.chunk_size, config.action_dim, generator=generator),
    }


@pytest.mark.parametrize("top", [-1, -2, 0])
@pytest.mark.parametrize("outputs", ["actions", "geometry"])
@pytest.mark.parametrize("sections", [{}, {"model": FROZEN, "lora": LORA}], ids=["full", "lora"])
def test_every_trainable_parameter_gets_a_gradient(sections, outputs, top):
    vggt = {"vggt": {**TINY_VGGT, "depth": DEPTH}, "vggt_layer": top}
    recipe = tiny_recipe(**{**sections, "model": {**sections.get("model", {}), **vggt}})
    recipe.model.outputs = outputs
    config = build_config(recipe, num_views=2, state_dim=4, action_dim=4)
    model = build_model(recipe, config).train()
    model(**batch_of(config)).loss.backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached == trained_names(model)
    blocks = {name.split(".")[3] for name in reached if name.startswith("model.vggt.global_blocks.")}
    assert blocks == {str(i) for i in range(top % DEPTH + 1)}
    built = len(blocks) if outputs == "actions" else DEPTH  # geometry reads the last one
    assert len(model.model.vggt.global_blocks) == len(model.model.vggt.frame_blocks) == built


def test_a_layer_that_is_not_there():
    recipe = tiny_recipe(model={"vggt": {**TINY_VGGT, "depth": DEPTH}, "vggt_layer": DEPTH})
    with pytest.raises(RecipeError, match=rf"vggt_layer is {DEPTH}; this VGGT has layers 0 to {DEPTH - 1}"):
        build_config(recipe, 2, 4, 4)


@pytest.mark.parametrize("build", [build_model, build_on_meta])
@pytest.mark.parametrize(
    ("quantization", "base", "adapter"),
    [
        ("none", torch.nn.Linear, layer.Linear),
        ("nf4", bitsandbytes.nn.Linear4bit, bnb.Linear4bit),
        ("int8", bitsandbytes.nn.Linear8bitLt, bnb.Linear8bitLt),
    ],
)
def test_quantised_layers_get_the_adapters_made_for_them(quantization, base, adapter, build):
    recipe = tiny_recipe(model={**FROZEN, "quantization": quantization}, lora=LORA)
    model = build(recipe, build_config(recipe, 2, 4, 4))
    kinds = {
        name.split(".")[1]: (type(module.base_layer), type(module))
        for name, module in model.named_modules()
        if isinstance(module, layer.LoraLayer)
    }
    assert kinds == {"vggt": (torch.nn.Linear, layer.Linear), "lang_encoder": (base, adapter)}
    assert not {"is_loaded_in_4bit", "is_loaded_in_8bit"} & set(vars(model))


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_adapters_of_quantised_layers_train(quantization):
    recipe = tiny_recipe(model={**FROZEN, "quantization": quantization}, lora=LORA)
    config = build_config(recipe, num_views=2, state_dim=4, action_dim=4)
    model = build_model(recipe, config).train()
    model(**batch_of(config)).loss.backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == trained_names(model)


def test_adapters_stay_below_the_layer_that_is_read():
    recipe = tiny_recipe(
        model={**FROZEN, "vggt": {**TINY_VGGT, "depth": DEPTH}, "vggt_layer": 0},
        lora={**LORA, "target_modules": ["qkv"]},
    )
    recipe.lora.apply_to = ["vggt"]
    model = build_model(recipe, build_config(recipe, 2, 4, 4))
    adapted = {name.rpartition(".attn.")[0] for name, _ in model.named_parameters() if "lora_A" in name}
    assert adapted == {
        "model.vggt.patch_embed.blocks.0",
        "model.vggt.frame_blocks.0",
        "model.vggt.global_blocks.0",
    }
