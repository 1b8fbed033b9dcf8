"""Fine-tune a geometry-aware vision-language-action policy inside a GPU memory budget."""

__version__ = "0.1.0"
