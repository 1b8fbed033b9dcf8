"""Moments of embeddings beside 8-bit ones: in 32 bits as Trainer has them, or in 8 too, where the recipe says so.

Trainer keeps both moments of every embedding in 32 bits (transformers, `create_optimizer`), through a list of exceptions
that bitsandbytes has for the whole process. For LLaMA-2-7B they take 0.79 GB more than two bytes a parameter.
"""

import torch
from torch import nn


def forget_earlier_training() -> None:
    """Empty bitsandbytes' list: it keeps a model alive, and takes whatever stands in its embeddings' place for them."""
    from bitsandbytes.optim import GlobalOptimManager

    GlobalOptimManager.get_instance().initialize()


def keep_in_8_bits(model: nn.Module) -> None:
    """Take back Trainer's exception; of what bitsandbytes is told of a parameter, the last counts."""
    from bitsandbytes.optim import GlobalOptimManager

    for module in _embeddings(model):
        GlobalOptimManager.get_instance().register_module_override(module, "weight", {"optim_bits": 8})


def plan_states(model: nn.Module, optimizer: torch.optim.Optimizer, embedding_bits: int) -> None:
    """Give an 8-bit optimizer the states of a training, past the process-wide list that Trainer would put this model on."""
    weights = {id(module.weight) for module in _embeddings(model)}
    config_of = optimizer.get_config

    def get_config(gindex: int, pindex: int, group: dict) -> dict:
        is_embedding = id(group["params"][pindex]) in weights
        return config_of(gindex, pindex, group) | {"optim_bits": embedding_bits if is_embedding else 8}

    optimizer.get_config = get_config


def _embeddings(model: nn.Module) -> list[nn.Embedding]:
    return [module for module in model.modules() if isinstance(module, nn.Embedding)]
