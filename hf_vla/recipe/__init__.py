"""One JSON or YAML file that fully describes a run, as typed dataclasses.

Every key has a default, so that a six-line template is a recipe; an unknown key, a wrong type, or two answers to one
question is an error that names the key and the nearest one that exists.
"""

from hf_vla.recipe.reading import load_recipe, make_recipe
from hf_vla.recipe.sections import (
    TRAINING_DEFAULTS,
    Augmentation,
    Data,
    Evaluation,
    Fusion,
    Head,
    Lora,
    Memory,
    Model,
    Recipe,
    RecipeError,
    View,
)

__all__ = [
    "TRAINING_DEFAULTS",
    "Augmentation",
    "Data",
    "Evaluation",
    "Fusion",
    "Head",
    "Lora",
    "Memory",
    "Model",
    "Recipe",
    "RecipeError",
    "View",
    "load_recipe",
    "make_recipe",
]
