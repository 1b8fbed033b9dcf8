"""The plan beside what Trainer itself does: a trained run's tensors, all of them, seen by the same tracker."""

import pytest
import torch

from hf_vla.memory.cuda_rules import cuda_autocast, no_workspace, offloading
from hf_vla.memory.rehearsal import parts_of, weights_of
from hf_vla.memory.shapes import read_shapes
from hf_vla.memory.trace import trace, without_cycles
from hf_vla.memory.tracker import MemoryTracker
from hf_vla.prepare import build_trainer
from hf_vla.recipe import Recipe
from tests.tiny_run import tiny_recipe

MODEL = {
    "vggt": {"img_size": 56, "embed_dim": 128, "depth": 2, "num_heads": 4, "encoder_depth": 2, "encoder_num_heads": 4},
    "lang_encoder": {
        "vocab_size": 300,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    },
    "dtype": "bfloat16",
    "fusion": {"hidden_size": 128, "num_layers": 2, "num_heads": 4},
    "head": {"hidden_size": 128, "num_layers": 2},
    "pool_grid": 4,
}
FROZEN = {"freeze_vggt": True, "freeze_lang_encoder": True}
LORA = {"apply_to": ["lang_encoder"]}
CHECKPOINTED = {"activation_checkpointing": True}

CASES = {
    "both frozen": {"model": FROZEN},
    "LoRA": {"model": FROZEN, "lora": LORA},
    "LoRA, accumulating": {"model": FROZEN, "lora": LORA, "training": {"gradient_accumulation_steps": 3}},
    "LoRA, VGGT ahead": {
        "model": FROZEN,
        "lora": LORA,
        "training": {"gradient_accumulation_steps": 2},
        "memory": {"encode_ahead": 16},
    },
    "LoRA, VGGT overlapped": {
        "model": FROZEN,
        "lora": LORA,
        "training": {"gradient_accumulation_steps": 2},
        "memory": {"encode_ahead": 16, "encode_overlap": True},
    },
    "LoRA, offloaded": {
        "model": FROZEN,
        "lora": LORA,
        "training": {**CHECKPOINTED, "activation_checkpointing_kwargs": {"offload": True}},
    },
    "QLoRA": {"model": {**FROZEN, "quantization": "nf4"}, "lora": LORA},
    "full LLaMA, 8-bit states": {"model": {"freeze_vggt": True}, "training": {"optim": "adamw_bnb_8bit"}},
    "full LLaMA, 8-bit states of embeddings too": {
        "model": {"freeze_vggt": True},
        "training": {"optim": "adamw_bnb_8bit"},
        "memory": {"embedding_state_bits": 8},
    },
    "end to end, prefix": {"model": {"fusion": {"type": "prefix", "num_layers": 0}}},
    "end to end, checkpointed": {"training": CHECKPOINTED},
    "end to end, float32": {"model": {"dtype": "float32"}, "training": {"bf16": False}},
    "end to end, in backward": {"training": {"max_grad_norm": 0.0}, "memory": {"optimizer_in_backward": True}},
    "end to end, evaluated and saved": {
        "training": {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    },
}


def recipe_of(case: str) -> Recipe:
    training = {"bf16": True, "save_strategy": "no", "eval_strategy": "no"}
    base = tiny_recipe(model=MODEL, data={"image_size": 56, "batch_size": 8}, training=training).to_dict()
    changes = CASES[case]
    sections = {name: base[name] | changes.get(name, {}) for name in ("model", "lora", "data", "training", "memory")}
    sections["model"]["fusion"] = base["model"]["fusion"] | changes.get("model", {}).get("fusion", {})
    return tiny_recipe(**sections)


def trained_peak(recipe: Recipe, folder) -> int:
    """Train, and give the most bytes that weights and whatever training makes take together."""
    tracker = MemoryTracker()
    with without_cycles(), cuda_autocast(), offloading(tracker):
        trainer = build_trainer(recipe, folder)
        with tracker, tracker.phase("step"):
            for component, part in parts_of(trainer.bare_model()).items():
                tracker.label(weights_of(part), component, "weights")
            trainer.train()
    return tracker.ledger().peak()[0]


@pytest.mark.parametrize("case", CASES)
def test_trainer_holds_what_the_plan_says(tmp_path, case):
    if "8-bit" in case or case == "QLoRA":
        pytest.importorskip("bitsandbytes")
    recipe = recipe_of(case)
    planned = trace(recipe, read_shapes(recipe), extent="two steps", workspace=no_workspace).ledger.peak()[0]
    assert planned == pytest.approx(trained_peak(recipe, tmp_path), rel=1e-3)


def test_a_second_training_of_a_process_has_its_own_8_bit_states(tmp_path):
    pytest.importorskip("bitsandbytes")
    first, second = (recipe_of(f"full LLaMA, 8-bit states{more}") for more in ("", " of embeddings too"))
    first.model.freeze_vggt = False  # so that its embeddings have another place among what trains
    for k, recipe in enumerate((first, second)):
        trainer = build_trainer(recipe, tmp_path / str(k))
        trainer.train()
        states = {p: s["state1"].dtype for p, s in trainer.optimizer.state.items() if p.numel() >= 4096}
        embeddings = trainer.bare_model().get_input_embeddings().weight
        assert states.pop(embeddings) == (torch.uint8 if recipe is second else torch.float32)
        assert set(states.values()) == {torch.uint8}
