"""Training at full size without weights or data: random numbers take the memory and the time that real ones take.

Letters: B batch, V views, L text tokens, T chunk length.
"""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from transformers import TrainerCallback

from benchmarks.random_weights import fill_with_random
from benchmarks.training_cost import WARM_UP, device, now
from hf_vla.arguments import training_arguments
from hf_vla.assemble import build_config, build_on_meta
from hf_vla.memory.planner import Plan, plan_recipe
from hf_vla.memory.shapes import Shapes
from hf_vla.memory.trace import leave_out_cached, make_batch
from hf_vla.model.configuration_vla import VLAConfig
from hf_vla.recipe import Recipe, make_recipe
from hf_vla.trainer import VLATrainer

RECIPES = Path(__file__).parent.parent / "recipes"

SMALL = {
    "model": {
        "vggt": {"embed_dim": 64, "depth": 2, "num_heads": 2, "encoder_depth": 2, "encoder_num_heads": 2},
        "lang_encoder": {
            "hidden_size": 128,
            "num_hidden_layers": 2,
            "intermediate_size": 256,
            "num_attention_heads": 2,
            "vocab_size": 384,
        },
        "fusion": {"hidden_size": 64, "num_heads": 2},
        "head": {"hidden_size": 64},
        "pool_grid": 2,
    },
    "data": {"image_size": 56},
}
"""As small as it gets, to see on a CPU that it runs."""

PROPORTIONAL = {
    "model": {
        "vggt": {
            "img_size": 84,
            "embed_dim": 384,
            "depth": 7,
            "num_heads": 6,
            "encoder_depth": 8,
            "encoder_num_heads": 6,
        },
        "lang_encoder": {
            "hidden_size": 256,
            "num_hidden_layers": 8,
            "intermediate_size": 688,
            "num_attention_heads": 4,
            "vocab_size": 384,
        },
        "fusion": {"hidden_size": 64, "num_heads": 2},
        "head": {"hidden_size": 64},
        "pool_grid": 4,
    },
    "data": {"image_size": 84},
}
"""A thousandth of the arithmetic, in proportion: 6.5 GFLOP for VGGT's pair, 2.5 for a LoRA step of LLaMA on 96 tokens."""

SCALES = {"full": {}, "proportional": PROPORTIONAL, "small": SMALL}


@dataclass(frozen=True)
class Case:
    """One recipe at one setting."""

    recipe: str
    """File in `recipes/`."""
    changes: dict[str, dict[str, Any]]
    """Section to keys that are laid over it."""
    text_tokens: int = 64

    def load(self, scale: str) -> Recipe:
        """Read the recipe with this case's keys, at one of `SCALES`, for the device that is here."""
        raw = json.loads((RECIPES / self.recipe).read_text())
        quiet = {"training": {"report_to": [], "save_strategy": "no", "eval_strategy": "no", "disable_tqdm": True}}
        for changes in (self.changes, quiet, SCALES[scale]):
            lay_over(raw, changes)
        if not torch.cuda.is_available():
            raw["training"]["use_cpu"] = True
        return make_recipe(raw)

    @property
    def shapes(self) -> Shapes:
        """What its data brings."""
        return Shapes(text_tokens=self.text_tokens)


def lay_over(raw: dict, changes: dict) -> None:
    """Put keys over those of a recipe, in place; a dict over a dict key by key, anything else as it is."""
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(raw.get(key), dict):
            lay_over(raw[key], value)
        else:
            raw[key] = copy.deepcopy(value)


class RandomSamples(Dataset):
    """Rows of one random batch, over and over: already what the collator would give."""

    def __init__(self, config: VLAConfig, shapes: Shapes, recipe: Recipe, length: int):
        self.rows = make_batch(config, shapes, recipe, recipe.data.batch_size)
        self._length = length
        generator = torch.Generator().manual_seed(0)
        for tensor in filter(Tensor.is_floating_point, self.rows.values()):
            tensor.uniform_(generator=generator)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {key: rows[i % len(rows)] for key, rows in self.rows.items()}


class Stopwatch(TrainerCallback):
    """Times the steps after the warm-up; the device is waited for at both ends, and not between."""

    def __init__(self):
        self.steps, self.seconds, self._began = 0, 0.0, 0.0

    def on_step_end(self, args, state, control, **kwargs):
        """Start after the warm-up, and stop with the last step."""
        if state.global_step == WARM_UP:
            self._began = now()
        if state.global_step == state.max_steps:
            self.steps, self.seconds = state.max_steps - WARM_UP, now() - self._began


def make_trainer(recipe: Recipe, shapes: Shapes, folder: Path, steps: int) -> VLATrainer:
    """Make the project's own trainer around a model of random weights and samples of random numbers."""
    recipe.training["max_steps"] = steps
    config = build_config(recipe, shapes.num_views, shapes.state_dim, shapes.action_dim)
    model = build_on_meta(recipe, config)
    leave_out_cached(model, recipe)
    with torch.device(device()):
        fill_with_random(model)
    # Of one step more, which memory.encode_overlap encodes beside the last: else the clock would miss a step's VGGT.
    length = recipe.data.batch_size * recipe.training["gradient_accumulation_steps"] * (steps + 1)
    return VLATrainer(
        recipe=recipe,
        processor=None,
        model=model,
        args=training_arguments(recipe, str(folder)),
        train_dataset=RandomSamples(config, shapes, recipe, length),
        eval_dataset=RandomSamples(config, shapes, recipe, recipe.data.batch_size),
        data_collator=default_collate,
    )


def train(trainer: VLATrainer) -> dict[str, float]:
    """Train, evaluate a batch, and give the speed."""
    watch = Stopwatch()
    trainer.add_callback(watch)
    trainer.train()
    trainer.evaluate()
    samples = trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps
    return {
        "steps": watch.steps,
        "seconds_a_step": watch.seconds / watch.steps,
        "samples_per_second": samples * watch.steps / watch.seconds,
    }


def plan(case: Case, recipe: Recipe, gpu: str, budget: int | None) -> Plan:
    """Plan what is about to be measured."""
    return plan_recipe(recipe, budget=budget, gpus=1, gpu=gpu, shapes=case.shapes)


def model_flops(case: Case, recipe: Recipe, gpu: str) -> float:
    """Count forward and backward of one sample, without what checkpointing computes twice."""
    plain = copy.deepcopy(recipe)
    plain.training["activation_checkpointing"] = False
    return sum(plan(case, plain, gpu, None).flops.values())
