"""An optimizer's paged states back from a checkpoint: into pages again, and not onto the GPU.

There bitsandbytes puts whatever it reads (`Optimizer8bit.load_state_dict`, 0.50.2), and a run that was planned without them
has no room: LLaMA-2-7B's two moments take 13 GB in 8 bits.
"""

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

PAGED = ("state1", "state2")
"""Names of a parameter's states that bitsandbytes pages, where they are large; their scales and tables it doesn't."""


def load_into_pages(optimizer: torch.optim.Optimizer) -> None:
    """Let a paged optimizer of bitsandbytes read its states into what it would have made for new ones."""
    load = optimizer.load_state_dict

    def load_state_dict(_, state_dict: dict[str, Any]) -> None:
        load(state_dict, move_to_device=False)
        for parameter, states in optimizer.state.items():
            for name, value in states.items():
                if isinstance(value, Tensor):
                    states[name] = _place(optimizer, parameter, name, value)

    optimizer.load_state_dict = MethodType(load_state_dict, optimizer)


def _place(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, name: str, value: Tensor) -> Tensor:
    if name not in PAGED:
        return value.to(parameter.device)
    return optimizer.get_state_buffer(parameter, value.dtype).copy_(value)
