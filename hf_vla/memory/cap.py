"""The recipe's budget, kept: on a shared GPU a run takes no more than it promised, even where more is free."""

import torch

from hf_vla.memory.budget import MemoryBudgetError
from hf_vla.memory.gpus import facts_of
from hf_vla.memory.sizes import format_size, parse_size
from hf_vla.recipe import Recipe


def keep_to_budget(recipe: Recipe, processes: int = 1) -> int | None:
    """Let what this process allocates beyond `memory.budget` fail as on a smaller GPU; a step that fails so is recovered.

    To be called once, when the process has its GPU and nothing is on it yet. PyTorch's allocator is what can be capped; the
    CUDA context, and NCCL's buffers with several processes, lie beside it and come off the budget as the plan counts them.

    Returns:
        Bytes that the allocator may reserve; None where nothing is capped: without a budget in the recipe, or on a CPU.

    Raises:
        MemoryBudgetError: if the budget doesn't even hold what lies beside the allocator.
    """
    if recipe.memory.budget is None or recipe.training.get("use_cpu") or not torch.cuda.is_available():
        return None
    gpu = facts_of(torch.cuda.get_device_name())
    outside = gpu.context_bytes + (gpu.nccl_bytes if processes > 1 else 0)
    allowed = parse_size(recipe.memory.budget) - outside
    if allowed <= 0:
        raise MemoryBudgetError(
            f"memory.budget is {recipe.memory.budget}, and CUDA alone takes {format_size(outside)} of it on {gpu.name}: "
            "give more, or see the smallest that works with `hf-vla plan`."
        )
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / total))
    return allowed
