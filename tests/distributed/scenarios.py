"""What two ranks train, and where memory runs out."""

from typing import NamedTuple

import torch

from hf_vla.memory.budget import MemoryBudgetError
from hf_vla.recipe import Recipe
from tests.tiny_run import tiny_recipe

PLAN = {
    "max_steps": 2,
    "logging_steps": 1,
    "save_strategy": "no",
    "adam_epsilon": 1e-3,  # a key's bias has no gradient but rounding errors, which a smaller one would blow up
}


class Scenario(NamedTuple):
    """One training."""

    recipe: Recipe
    rank: int | None = None
    """The rank that is short of memory."""
    place: str = ""
    rows: int = 0
    """Rows at once that fit it."""
    first: int = 1
    """The first call that fails, counted from 0."""


def plain(accumulation: int) -> Recipe:
    """A recipe without randomness, so that one process can repeat what two have done."""
    return tiny_recipe(training={**PLAN, "gradient_accumulation_steps": accumulation})


def random(accumulation: int = 2) -> Recipe:
    """A recipe with dropout and draws."""
    model = {"fusion": {"dropout": 0.2}, "head": {"type": "flow"}}
    return tiny_recipe(model=model, training={**PLAN, "gradient_accumulation_steps": accumulation})


SCENARIOS = {
    "plain": Scenario(plain(1)),
    "undisturbed": Scenario(random()),
    "forward": Scenario(random(), 1, "forward", 2, first=0),
    "backward": Scenario(random(), 0, "backward", 1),
    "exhausted": Scenario(random(), 1, "backward", 0),
}


def outcome_of(trainer) -> dict:
    """Train, and give what came of it, as plain values."""
    error = None
    try:
        trainer.train()
    except MemoryBudgetError as caught:
        error = str(caught)
    return {
        "weights": {name: p.detach().clone() for name, p in trainer.bare_model().named_parameters()},
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "size": trainer.batcher.fit.size,
        "steps": trainer.state.global_step,
        "error": error,
        "draw": torch.rand(()).item(),
    }
