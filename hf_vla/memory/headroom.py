"""Whether a larger piece of a batch may be tried: what the last step took, against what the process may take."""

import torch

SHARE = 0.9
"""Of what may be used; the rest is for what scales otherwise than activations do."""


def has_headroom(size: int, larger: int) -> bool:
    """Say whether the last step's peak, its activations scaled from `size` rows at once to `larger`, would fit this GPU.

    True without a GPU, where nothing can be measured: trying is then the only way to know.
    """
    if not torch.cuda.is_initialized():
        return True
    resting, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    free, total = torch.cuda.mem_get_info()
    limit = min(torch.cuda.memory_reserved() + free, torch.cuda.get_per_process_memory_fraction() * total)
    return resting + (peak - resting) * larger / size < SHARE * limit
