"""The three scenarios of the memory guide that users know: its figures beside computed ones, and why they differ."""

from dataclasses import dataclass

from hf_vla.memory.planner import Plan, plan_recipe
from hf_vla.memory.shapes import Shapes
from hf_vla.recipe import make_recipe

GB = 10**9


@dataclass(frozen=True)
class Scenario:
    """One of the guide's, at its batch of 8 pairs of 518 pixels on one GPU."""

    name: str
    guide: dict[str, float]
    """The guide's estimate in GB (10**9 bytes), by its own lines."""
    plan: Plan
    why: str
    """Why the two differ."""


GUIDE = {
    "both frozen": (
        {"VGGT": 4, "LLaMA": 14, "fusion and head": 2, "data and activations": 4, "system": 2},
        (True, True),
    ),
    "LLaMA fine-tuned": (
        {"VGGT": 4, "LLaMA": 56, "fusion and head": 2, "data and activations": 4, "system": 2},
        (True, False),
    ),
    "end to end": (
        {"VGGT": 16, "LLaMA": 56, "fusion and head": 2, "data and activations": 4, "system": 2},
        (False, False),
    ),
}
WHY = {
    "both frozen": (
        "The guide's 4 GB for VGGT is neither bf16 (1.82) nor fp32 (3.64 for the aggregator). Frozen backbones save no "
        "activations, so the batch hardly counts."
    ),
    "LLaMA fine-tuned": (
        "The guide's 14 + 14 + 28 holds for pure bf16 alone, as here. Here LLaMA reads text only, so activations are small, "
        "and they are gone when the optimizer steps, where the peak is; with view tokens in its input they count by batch. "
        "With the optimizer in backward and paged states it fits one GPU: recipes/full_language.json."
    ),
    "end to end": (
        "The guide counts 4 GB of activations; a trained VGGT pair alone saves more than that for each sample. With "
        "checkpointing, the optimizer in backward and paged states it fits one GPU: recipes/end_to_end.json."
    ),
}


def scenarios(gpu: str | None = None) -> list[Scenario]:
    """Plan the guide's three scenarios as it describes them: plain AdamW, no checkpointing, batch 8."""
    return [Scenario(name, lines, _plan(*frozen, gpu), WHY[name]) for name, (lines, frozen) in GUIDE.items()]


def _plan(freeze_vggt: bool, freeze_lang_encoder: bool, gpu: str | None) -> Plan:
    model = {"freeze_vggt": freeze_vggt, "freeze_lang_encoder": freeze_lang_encoder}
    recipe = make_recipe({"model": model, "data": {"batch_size": 8, "image_size": 518}})
    return plan_recipe(recipe, budget="28GB", gpu=gpu, shapes=Shapes())
