"""The recipes that a run from a cache is compared with a run without one by: small backbones in the released proportion."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModel

from benchmarks.longer_sample import SAMPLE
from hf_vla.caching import cacheable, with_cache
from hf_vla.model.configuration_vla import VGGTConfig
from hf_vla.model.modeling_vggt import VGGTModel
from hf_vla.recipe import Recipe, make_recipe
from hf_vla.weights import byte_tokenizer, lang_encoder_config

SIZES = {
    "vggt": {"img_size": 84, "embed_dim": 192, "depth": 4, "num_heads": 4, "encoder_depth": 4, "encoder_num_heads": 4},
    "lang_encoder": {
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "intermediate_size": 344,
        "num_attention_heads": 4,
        "vocab_size": 384,
    },
}
"""About 0.9 GFLOP for VGGT's pair and 0.3 for a LoRA step of LLaMA on 96 tokens; the real ones take 6500 and 2500."""
WAYS = {
    "lora": {"lora": {"apply_to": ["lang_encoder"]}, "model": {"fusion": {"type": "prefix", "hidden_size": 64}}},
    "both_frozen": {"model": {"fusion": {"type": "cross_attention", "hidden_size": 64, "num_heads": 2}}},
}
PRECISIONS = {
    "float32": {"model": {"dtype": "float32"}, "training": {"bf16": False}},
    "bfloat16": {"model": {"dtype": "bfloat16"}, "training": {"bf16": True}},
}
"""What a run computes in."""
BATCH = 4


def make_case(
    way: str, folder: Path, stored: str = "auto", precision: str = "float32", dataset: Path = SAMPLE
) -> Recipe:
    """Make a way's recipe on random weights of `SIZES`, all that can be cached named in it."""
    own, run = copy.deepcopy(WAYS[way]), PRECISIONS[precision]
    model = {**write_weights(folder / "weights"), **run["model"], "pool_grid": 4, "head": {"hidden_size": 64}}
    recipe = make_recipe(
        {
            "model": {**model, **own["model"]},
            "lora": own.get("lora", {}),
            "data": {
                "dataset": str(dataset),
                "batch_size": BATCH,
                "image_size": 84,
                "eval_fraction": 0.0,
                "num_workers": 0,
            },
            "memory": {"cache_dir": str(folder / f"cache_{precision}_{stored}"), "cache_dtype": stored},
            "training": {
                "learning_rate": 1e-3,
                **run["training"],
                "use_cpu": True,
                "save_strategy": "no",
                "logging_steps": 1,
                "report_to": [],
                "disable_tqdm": True,
            },
        }
    )
    return with_cache(recipe, cacheable(recipe))


def write_weights(folder: Path) -> dict[str, Any]:
    """Write random weights of both backbones in the released files' formats, and give the recipe's keys for them."""
    torch.manual_seed(0)
    places = {name: folder / name for name in ("vggt", "lang_encoder")}
    keys = {name: str(place) for name, place in places.items()}
    if folder.exists():
        return keys
    for place in places.values():
        place.mkdir(parents=True)
    vggt = VGGTModel(VGGTConfig(**SIZES["vggt"]))
    save_file(
        {f"aggregator.{n}": t.contiguous() for n, t in vggt.state_dict().items()}, places["vggt"] / "model.safetensors"
    )
    (places["vggt"] / "config.json").write_text(json.dumps(SIZES["vggt"]))
    AutoModel.from_config(lang_encoder_config(SIZES["lang_encoder"])).save_pretrained(places["lang_encoder"])
    byte_tokenizer().save_pretrained(places["lang_encoder"])
    return keys
