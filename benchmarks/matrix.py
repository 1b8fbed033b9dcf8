"""Every fusion, head and way of training, as recipes of a size that trains in seconds; and what one such training shows.

Backbones come from tiny checkpoints in the released files' formats, as adapters and quantisation want them; data is the
committed sample.
"""

import itertools
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import TrainerCallback

from data_scripts.make_tiny_checkpoint import write_llama, write_vggt
from hf_vla.lora import count_parameters
from hf_vla.memory.trace import Shapes, trace
from hf_vla.policy import Policy
from hf_vla.prepare import build_trainer
from hf_vla.recipe import Recipe, RecipeError, make_recipe
from hf_vla.rollout.metrics import offline_report
from hf_vla.trainer import VLATrainer

WIDTH = 32
SAMPLE = Path(__file__).parent.parent / "tests/data/metaworld_sample"
FUSIONS = ("cross_attention", "gated", "prefix")
HEADS = ("l1", "flow", "discrete")
FROZEN = {"freeze_vggt": True, "freeze_lang_encoder": True}
MODES = {
    "frozen": {"model": FROZEN},
    "lora": {"model": FROZEN, "lora": {"apply_to": ["lang_encoder", "vggt"], "r": 4}},
    "qlora": {"model": {**FROZEN, "quantization": "nf4"}, "lora": {"apply_to": ["lang_encoder"], "r": 4}},
    "full": {"model": {"freeze_vggt": False, "freeze_lang_encoder": False}},
}
"""What trains beside fusion and head."""
REFUSED = {
    "a quantised language encoder trained in full": {"model": {"quantization": "nf4", "freeze_lang_encoder": False}},
    "adapters on a backbone that trains itself": {"model": {"freeze_vggt": False}, "lora": {"apply_to": ["vggt"]}},
    "alignment where LLaMA reads no views": {"model": {"fusion": {"type": "gated", "align_weight": 0.5}}},
    "alignment to a VGGT that moves": {
        "model": {"freeze_vggt": False, "fusion": {"type": "prefix", "align_weight": 0.5}}
    },
    "alignment from cached features": {
        "model": {"fusion": {"type": "prefix", "align_weight": 0.5}},
        "memory": {"cache": ["vggt"]},
    },
    "a cache of what trains": {"model": {"freeze_vggt": False}, "memory": {"cache": ["vggt"]}},
    "a cache of what adapters change": {"lora": {"apply_to": ["lang_encoder"]}, "memory": {"cache": ["lang_encoder"]}},
    "a cache of LLaMA where it reads the views": {
        "model": {"fusion": {"type": "prefix"}},
        "memory": {"cache": ["lang_encoder"]},
    },
    "geometry from random heads": {"model": {"vggt": {"depth": 2}, "outputs": "geometry"}},
}
"""Combinations that make no sense, as the sections of a recipe."""
FIRST_STEPS, LAST_STEPS = 2, 6
"""Steps whose mean loss stands for the beginning and for the end: single batches are noisy."""


class Case(NamedTuple):
    """One cell of the matrix."""

    fusion: str
    head: str
    mode: str


STEPS = 150
"""Within which every case's loss must fall by half."""

ALL = [Case(*parts) for parts in itertools.product(FUSIONS, HEADS, MODES)]


def write_weights(folder: Path) -> Path:
    """Write both backbones of the cases, as `data_scripts/make_tiny_checkpoint.py` does, and return where."""
    torch.manual_seed(0)
    write_vggt(folder / "vggt", WIDTH)
    write_llama(folder / "llama", WIDTH)
    return folder


def recipe_of(case: Case, weights: Path, steps: int) -> Recipe:
    """Make a case's recipe, on the backbones that `write_weights` wrote."""
    mode = MODES[case.mode]
    model = {
        "vggt": str(weights / "vggt"),
        "lang_encoder": str(weights / "llama"),
        "dtype": "float32",
        "fusion": {"type": case.fusion, "hidden_size": WIDTH, "num_layers": 1, "num_heads": 2},
        "head": {"type": case.head, "hidden_size": WIDTH, "num_layers": 1},
        "prompt": "{task}",
        "pool_grid": 2,
        "chunk_size": 4,
        **mode["model"],
    }
    data = {"dataset": str(SAMPLE), "batch_size": 8, "image_size": 28, "eval_fraction": 0.3, "num_workers": 0}
    training = {
        "max_steps": steps,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "bf16": False,
        "use_cpu": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
    }
    return make_recipe({"model": model, "lora": mode.get("lora", {}), "data": data, "training": training})


def train_case(case: Case, weights: Path, steps: int, folder: Path) -> VLATrainer:
    """Train one case on one thread, and give back its trainer."""
    torch.set_num_threads(1)
    trainer = build_trainer(recipe_of(case, weights, steps), folder)
    trainer.add_callback(StepClock())
    trainer.train()
    return trainer


def losses_of(trainer: VLATrainer) -> tuple[float, float]:
    """Give the loss that training began with, and the one it ended with."""
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return statistics.fmean(losses[:FIRST_STEPS]), statistics.fmean(losses[-LAST_STEPS:])


def measure_case(case: Case, weights: Path, steps: int, folder: Path) -> dict[str, Any]:
    """Train one case, and say what it took and what came out."""
    trainer = train_case(case, weights, steps, folder / "-".join(case))
    model, (first, last) = trainer.bare_model(), losses_of(trainer)
    [clock] = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, StepClock)]
    predict = Policy(model, trainer.processing_class).predict_samples
    errors = offline_report(predict, trainer.eval_dataset, trainer.train_dataset)
    return {
        **case._asdict(),
        "parameters": count_parameters(model),
        "step_ms": round(1000 * statistics.median(clock.seconds), 1),
        "peak_bytes": peak_bytes(trainer.recipe),
        "loss": {"first": first, "last": last, "halved": last <= first / 2},
        "action_error": errors["policy"]["mean_mae"],
        "action_error_of_mean_action": errors["mean_action"]["mean_mae"],
    }


def peak_bytes(recipe: Recipe) -> int:
    """Give the most bytes that tensors of one training hold at once, traced; a process's own size would drown them."""
    peak, _ = trace(recipe, Shapes(num_views=2, state_dim=4, action_dim=4, text_tokens=24)).ledger.peak()
    return peak


def reason_of_refusal(sections: dict[str, Any]) -> str:
    """Give the message that a combination is refused with.

    Raises:
        ValueError: if it isn't refused.
    """
    try:
        make_recipe(sections)
    except RecipeError as error:
        return str(error)
    raise ValueError(f"{sections} makes a recipe, though it makes no sense.")


class StepClock(TrainerCallback):
    """Take the time of each optimizer step."""

    def __init__(self):
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        """Start the clock."""
        self._start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        """Stop it."""
        self.seconds.append(time.perf_counter() - self._start)
