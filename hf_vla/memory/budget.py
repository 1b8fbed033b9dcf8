"""The error of a budget that can't be kept."""

from hf_vla.recipe import Recipe


class MemoryBudgetError(RuntimeError):
    """More memory is needed than there is; the message says how much, and what would fit.

    Args:
        message: for people.
        recipe: the recipe of the smallest budget that works, if one was looked for; its `memory.budget` is that budget.
    """

    def __init__(self, message: str, recipe: Recipe | None = None):
        super().__init__(message)
        self.recipe = recipe
