"""The error of a budget that can't be kept."""


class MemoryBudgetError(RuntimeError):
    """More memory is needed than there is; the message says how much, and what would fit."""
