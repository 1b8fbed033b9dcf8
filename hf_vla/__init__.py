"""Fine-tune a geometry-aware vision-language-action policy inside a GPU memory budget."""

from importlib import import_module

__version__ = "0.1.0"

_HOMES = {
    "VLAConfig": "model.configuration_vla",
    "VLAForActionPrediction": "model.modeling_vla",
    "VLAProcessor": "model.processing_vla",
    "Policy": "policy",
}

__all__ = ["Policy", "VLAConfig", "VLAForActionPrediction", "VLAProcessor", "register_auto_classes"]


def __getattr__(name: str):
    """Import a public name when it is first asked for: torch and transformers take seconds, this package doesn't."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    register_auto_classes()
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def register_auto_classes() -> None:
    """Make AutoConfig, AutoModel and AutoProcessor know this model type; asking for any public name does it too."""
    from transformers import AutoConfig, AutoModel, AutoProcessor

    from .model.configuration_vla import VLAConfig
    from .model.modeling_vla import VLAForActionPrediction
    from .model.processing_vla import VLAProcessor

    AutoConfig.register(VLAConfig.model_type, VLAConfig, exist_ok=True)
    AutoModel.register(VLAConfig, VLAForActionPrediction, exist_ok=True)
    AutoProcessor.register(VLAConfig, VLAProcessor, exist_ok=True)
