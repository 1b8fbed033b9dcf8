"""What the data brings to a plan that the recipe doesn't say: views, dimensions, the longest prompt; or stated defaults."""

from dataclasses import dataclass
from pathlib import Path

from hf_vla.assemble import load_tokenizer
from hf_vla.data.lerobot_format import DatasetInfo, open_dataset
from hf_vla.recipe import Recipe


@dataclass(frozen=True)
class Shapes:
    """Sizes of one sample."""

    num_views: int = 2
    state_dim: int = 8
    action_dim: int = 7
    text_tokens: int = 64
    """Of the longest prompt."""
    assumed: tuple[str, ...] = ("num_views", "state_dim", "action_dim", "text_tokens")
    """Which of these are defaults, for want of the dataset or the tokenizer."""


def read_shapes(recipe: Recipe) -> Shapes:
    """Read the sizes from the recipe's dataset where that is on this machine, and take defaults where not.

    Nothing is downloaded: a plan is asked for before anything is.
    """
    num_views = len(recipe.data.views) if recipe.data.views else Shapes.num_views
    known = {"num_views"} if recipe.data.views else set()
    sizes = {"num_views": num_views}
    if recipe.data.dataset and Path(recipe.data.dataset).is_dir():
        info = open_dataset(recipe.data.dataset, on_error=recipe.data.on_error)
        sizes |= {"state_dim": info.state_dim, "action_dim": info.action_dim}
        sizes["num_views"] = num_views if recipe.data.views else min(num_views, len(info.cameras))
        known |= {"state_dim", "action_dim", "num_views"}
        if _has_tokenizer(recipe):
            sizes["text_tokens"] = longest_prompt(recipe, info)
            known.add("text_tokens")
    return Shapes(**sizes, assumed=tuple(name for name in Shapes().assumed if name not in known))


def longest_prompt(recipe: Recipe, info: DatasetInfo) -> int:
    """Count the tokens of the dataset's longest prompt."""
    prompts = [recipe.model.prompt.format(task=task) for task in info.tasks.values()]
    return max(len(ids) for ids in load_tokenizer(recipe, info.tasks.values())(prompts)["input_ids"])


def _has_tokenizer(recipe: Recipe) -> bool:
    source = recipe.model.tokenizer or recipe.model.lang_encoder
    return isinstance(source, dict) or Path(source).is_dir()
