"""A recipe small enough to trace in a second, with every part that a large one has."""

from hf_vla.memory.shapes import Shapes
from hf_vla.recipe import Recipe, make_recipe

SHAPES = Shapes(text_tokens=12, assumed=())

VGGT = {"embed_dim": 64, "depth": 1, "num_heads": 2, "encoder_depth": 1, "encoder_num_heads": 2}
LLAMA = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 300,
}


def tiny_recipe(**sections: dict) -> Recipe:
    """Make the recipe, with sections of keys laid over it."""
    raw = {
        "model": {
            "vggt": VGGT,
            "lang_encoder": LLAMA,
            "fusion": {"hidden_size": 64, "num_layers": 1, "num_heads": 2},
            "head": {"hidden_size": 64, "num_layers": 1},
            "pool_grid": 2,
        },
        "data": {"image_size": 28, "batch_size": 4},
    }
    for name, values in sections.items():
        raw[name] = {**raw.get(name, {}), **values}
    return make_recipe(raw)
