"""The checklist before a training: memory, batch, precision, what trains, and whether all that it needs is at hand.

It only looks and reports: no process is ever ended, and no weights are downloaded. A dataset of the Hub is fetched, as
training would, since only decoded pictures tell whether it can be read.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from hf_vla.assemble import build_config, build_on_meta
from hf_vla.data.windows import WindowDataset
from hf_vla.memory.check import Check
from hf_vla.memory.nvml import Holder, Inventory, VisibleGPU, read_gpus
from hf_vla.memory.preflight_sources import check_caches, check_versions, check_weights, open_data
from hf_vla.memory.sizes import GIB, format_size
from hf_vla.model.modeling_vla import VLAForActionPrediction
from hf_vla.recipe import Recipe

LEAST_FREE = GIB
"""Below this not even the CUDA context and a first tensor fit."""
TIGHT = 0.9
"""Share of what is free past which others' next allocation ends the run."""
BF16_CAPABILITY = (8, 0)
"""First compute capability with bf16 in hardware (Ampere)."""
SHOWN_HOLDERS = 5
SHOWN_COMMAND = 60
SHARED_MEMORY = Path("/dev/shm")
PREFETCHED = 2
"""Batches that each worker has ready, unless the recipe says otherwise: PyTorch's default."""

BACKBONES = ("vggt", "lang_encoder")


def run_checks(
    recipe: Recipe,
    output: str | Path = "runs",
    planned_peak: int | None = None,
    budget: int | None = None,
    processes: int | None = None,
) -> list[Check]:
    """Go through the checklist of a recipe on this machine.

    Args:
        recipe: the run.
        output: directory that it will be written into; needn't exist.
        planned_peak: bytes that the plan foresees on each GPU; None where nothing was planned.
        budget: bytes that it may use there; None leaves the plan against what is free.
        processes: of the whole run, one a GPU; None takes the recipe's, the launcher's, or one for each visible GPU.
    """
    inventory = Inventory((), None) if recipe.training.get("use_cpu") else read_gpus()
    processes = processes or count_processes(recipe, len(inventory.gpus))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    used = inventory.gpus[:here]
    data_check, dataset = open_data(recipe)
    trained_check, model = check_trained(recipe, dataset)
    cache_checks, cached = check_caches(recipe, dataset)
    return [
        check_gpus(inventory, here),
        *([] if planned_peak is None or budget is None else [check_plan(planned_peak, budget)]),
        *(check_memory(gpu, planned_peak or budget, inventory.gpus[here:]) for gpu in used),
        check_batch(recipe, processes),
        check_precision(recipe, used),
        trained_check,
        *check_weights(recipe, cached),
        *cache_checks,
        data_check,
        check_disk(recipe, output, model),
        *([check_shared_memory(recipe, model, cached, here)] if model and recipe.data.num_workers else []),
        check_versions(recipe),
    ]


def count_processes(recipe: Recipe, num_gpus: int) -> int:
    """Count the processes of the run: the recipe's, the launcher's, or as many as `accelerate launch` would start."""
    return recipe.memory.gpus or int(os.environ.get("WORLD_SIZE", 0)) or max(1, num_gpus)


def check_gpus(inventory: Inventory, wanted: int) -> Check:
    """Look whether there is a GPU for each process of this machine, and whether PyTorch can use it."""
    gpus, problem = inventory
    but = f". {problem}" if problem else ""
    if not gpus:
        advice = "Install NVIDIA's driver if there is a GPU; else set training.use_cpu true." if problem else ""
        return Check("warn" if problem else "ok", "GPUs", f"none, so this trains on the CPU{but}", advice)
    names = f"{len(gpus)} visible: {', '.join(sorted({gpu.name for gpu in gpus}))}"
    if len(gpus) < wanted:
        advice = f"Set memory.gpus to {len(gpus)}, or make {wanted} visible through CUDA_VISIBLE_DEVICES."
        return Check("fail", "GPUs", f"{names}; {wanted} are wanted{but}", advice)
    if torch.version.cuda is None:
        detail = (
            f"{names}; but this PyTorch ({torch.__version__}) is built without CUDA, so this trains on the CPU{but}"
        )
        advice = "Install PyTorch's CUDA build: see `make install`. To train on the CPU, set training.use_cpu true."
        return Check("fail", "GPUs", detail, advice)
    if not torch.cuda.is_available():
        detail = f"{names}; but this PyTorch, built for CUDA {torch.version.cuda}, finds none that it can use{but}"
        advice = (
            "Compare the CUDA version that nvidia-smi shows: if it is lower, the driver is too old for this PyTorch. Update "
            "it, or install PyTorch's build for that CUDA. To train on the CPU, set training.use_cpu true."
        )
        return Check("fail", "GPUs", detail, advice)
    return Check("warn" if problem else "ok", "GPUs", f"{names}{but}")


def check_plan(planned_peak: int, budget: int) -> Check:
    """Compare the plan with the budget that the recipe or its user states."""
    detail = f"planned peak {format_size(planned_peak)}, budget {format_size(budget)} a GPU"
    if planned_peak <= budget:
        return Check("ok", "Plan", detail)
    return Check("fail", "Plan", detail, f"`hf-vla plan RECIPE --budget {_argument(budget)}` shows what would fit.")


def check_memory(gpu: VisibleGPU, needed: int | None, spare: Sequence[VisibleGPU] = ()) -> Check:
    """Compare what one GPU has free with what a run needs, and say who holds the rest.

    Args:
        gpu: to be used by one process.
        needed: bytes; None where nothing was planned.
        spare: visible GPUs that the run would leave idle.
    """
    title = f"Memory of GPU {gpu.number}"
    if gpu.free is None:
        return Check("warn", title, f"{gpu.name}: its driver doesn't tell", "Look at nvidia-smi before you start.")
    free = gpu.free + sum(h.bytes or 0 for h in gpu.holders or () if h.pid == os.getpid())
    detail = f"{format_size(free)} of {format_size(gpu.total)} free{_held(gpu)}"
    if free < max(needed or 0, LEAST_FREE):
        detail += f". {format_size(needed or LEAST_FREE)} are needed"
        return Check("fail", title, detail, _make_room(free, needed, spare))
    if needed is None:
        return Check("warn", title, detail, "Nothing was planned: `hf-vla plan RECIPE` says what the run needs.")
    detail += f". {format_size(needed)} are needed"
    if needed > TIGHT * free:
        return Check("warn", title, detail, "It is tight: if others take more, steps run again in smaller pieces.")
    return Check("ok", title, detail)


def _held(gpu: VisibleGPU) -> str:
    if gpu.holders is None:
        return "; its driver doesn't list who holds the rest"
    others = [holder for holder in gpu.holders if holder.pid != os.getpid()]
    unlisted = gpu.used - sum(holder.bytes or 0 for holder in gpu.holders)
    parts = [_describe(holder) for holder in others[:SHOWN_HOLDERS]]
    if len(others) > SHOWN_HOLDERS:
        rest = sum(holder.bytes or 0 for holder in others[SHOWN_HOLDERS:])
        parts.append(f"{format_size(rest)} by {len(others) - SHOWN_HOLDERS} more")
    if unlisted > GIB:
        parts.append(f"{format_size(unlisted)} by the driver and by processes that it doesn't list")
    return f"; held: {'; '.join(parts)}" if parts else ""


def _describe(holder: Holder) -> str:
    size = "an unknown part" if holder.bytes is None else format_size(holder.bytes)
    command = "" if holder.command is None else f", {holder.command[:SHOWN_COMMAND]}"
    return f"{size} by {holder.user or 'an unknown user'} (pid {holder.pid}{command})"


def _make_room(free: int, needed: int | None, spare: Sequence[VisibleGPU]) -> str:
    enough = [gpu.uuid for gpu in spare if gpu.free is not None and gpu.free >= (needed or LEAST_FREE)]
    if enough:
        return f"These have enough; name them first in CUDA_VISIBLE_DEVICES: {', '.join(enough)}."
    plan = f"See what fits now with `hf-vla plan RECIPE --budget {_argument(free * TIGHT)}`. " if free > GIB else ""
    return f"{plan}Ask those who hold the rest to make room; nobody's process is ended for you."


def check_batch(recipe: Recipe, processes: int) -> Check:
    """Say how many samples one optimizer step is over."""
    micro, accumulation = recipe.data.batch_size, recipe.training["gradient_accumulation_steps"]
    product = f"batch {micro} x accumulation {accumulation} x GPUs {processes}"
    return Check("ok", "Effective batch", f"{product} = {micro * accumulation * processes} samples a step")


def check_precision(recipe: Recipe, gpus: Sequence[VisibleGPU]) -> Check:
    """Look whether the hardware has the number format that the recipe asks for."""
    title, training = "Mixed precision", recipe.training
    old = [g.name for g in gpus if g.compute_capability is not None and g.compute_capability < BF16_CAPABILITY]
    if training.get("fp16") and not gpus:
        advice = "Set training.fp16 false; training.bf16 works on a CPU."
        return Check("fail", title, "fp16, which a CPU doesn't train in: it would go on in float32 unsaid", advice)
    if training.get("bf16") and not gpus and not training.get("use_cpu"):
        advice = "Set training.use_cpu true to train on the CPU."
        return Check("fail", title, "bf16 without a GPU, which Trainer refuses unless it is to use the CPU", advice)
    if training.get("bf16") and old:
        advice = "Set training.bf16 false and training.fp16 true."
        return Check("fail", title, f"bf16, which {old[0]} has not (it came with compute capability 8.0)", advice)
    if training.get("bf16") or training.get("fp16"):
        return Check("ok", title, "bf16" if training.get("bf16") else "fp16")
    if old and recipe.model.dtype == "bfloat16":
        advice = "Set model.dtype to float32, or training.fp16 true."
        return Check("warn", title, f"none, over bfloat16 weights, which {old[0]} computes slowly", advice)
    if gpus:
        return Check("warn", title, "none, so activations take twice the memory", "Set training.bf16 true.")
    return Check("ok", title, "none")


def check_trained(recipe: Recipe, dataset: WindowDataset | None) -> tuple[Check, VLAForActionPrediction | None]:
    """Build the recipe's model without its weights, and compare what would train in it with what the recipe says.

    Returns:
        The check, and the model on the meta device; None where it can't be built.
    """
    title = "What trains"
    if dataset is None:
        return Check(
            "warn", title, "not known without the dataset's shapes", "Mend what the dataset's line says."
        ), None
    info = dataset.info
    try:
        model = build_on_meta(recipe, build_config(recipe, len(dataset.views), info.state_dim, info.action_dim))
    except (ValueError, OSError, ImportError) as error:
        return Check("fail", title, f"the model can't be built: {error}"), None
    wrong = [text for name in BACKBONES if (text := _not_as_asked(recipe, model, name))]
    wrong += [f"{name} is frozen" for name in ("model.fusion", "head") if not _trained(model, name)]
    if wrong:
        return Check("fail", title, "; ".join(wrong), "This is a fault of hf_vla: please report it."), model
    parts = {**{name: f"model.{name}" for name in BACKBONES}, "fusion": "model.fusion", "head": "head"}
    return Check("ok", title, "; ".join(f"{name} {_share(model, prefix)}" for name, prefix in parts.items())), model


def _trained(model: nn.Module, prefix: str) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if n.startswith(f"{prefix}.") and p.requires_grad}


def _not_as_asked(recipe: Recipe, model: nn.Module, backbone: str) -> str | None:
    """Say how a backbone isn't frozen, adapted or trained as the recipe has it; None where it is."""
    names = _trained(model, f"model.{backbone}")
    adapters = [name for name in names if "lora_" in name]
    is_frozen, is_adapted = getattr(recipe.model, f"freeze_{backbone}"), backbone in recipe.lora.apply_to
    if is_frozen == (len(names) > len(adapters)):
        return f"{backbone} should be {'frozen' if is_frozen else 'trained'}, and isn't"
    if is_adapted != bool(adapters):
        return f"{backbone} should have {'adapters' if is_adapted else 'no adapters'}"
    return None


def _share(model: nn.Module, prefix: str) -> str:
    trained = _trained(model, prefix)
    if not trained:
        return "frozen"
    count = sum(parameter.numel() for parameter in trained.values())
    kind = "LoRA" if any("lora_" in name for name in trained) else "trained"
    shown = f"{count / 1e6:,.1f} M" if count >= 1e5 else f"{count:,}"
    return f"{kind} ({shown} parameters)"


def check_disk(recipe: Recipe, output: str | Path, model: nn.Module | None) -> Check:
    """Compare what the disk has free with what the run's checkpoints may take."""
    title, folder = "Disk", Path(output).resolve()
    folder = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        return Check("fail", title, f"{folder} can't be written into", "Choose another --output.")
    free = shutil.disk_usage(folder).free
    detail = f"{format_size(free)} free at {folder}"
    needed = GIB if model is None else run_bytes(recipe, model)
    if model is not None:
        detail += f"; the checkpoints take up to {format_size(needed)}"
    if needed > free:
        advice = "Make room, choose another --output, or set training.save_total_limit lower or save_only_model true."
        return Check("fail", title, detail, advice)
    return Check("warn" if needed > TIGHT * free else "ok", title, detail)


def check_shared_memory(
    recipe: Recipe, model: VLAForActionPrediction, cached: Sequence[str], processes: int, folder: Path = SHARED_MEMORY
) -> Check:
    """Compare what the loader's workers hand over at a time with the shared memory that it goes through.

    A container has 64 MiB of it unless told otherwise. Where it ends, PyTorch loses the batch and waits for it for ever.
    """
    title, config = "Shared memory", model.config
    if not folder.is_dir():
        return Check("ok", title, "this system has no limit of its own to it")
    row = recipe.data.image_size**2 * 3
    if "vggt" in cached:
        row = config.pool_grid**2 * 2 * config.vggt_config.embed_dim * 2
    ahead = recipe.training.get("dataloader_prefetch_factor") or PREFETCHED
    batches = processes * recipe.data.num_workers * ahead
    needed, free = batches * recipe.data.batch_size * config.num_views * row, shutil.disk_usage(folder).free
    detail = (
        f"{format_size(free)} free in {folder}; {batches} batches that workers hand over take {format_size(needed)}"
    )
    if needed > free:
        advice = (
            "Start the container with more (docker run --shm-size=8g, or --ipc=host), or set data.num_workers lower."
        )
        return Check("fail", title, detail, advice)
    return Check("ok", title, detail)


def run_bytes(recipe: Recipe, model: nn.Module) -> int:
    """Bound what a run writes: the checkpoints that it keeps, one more while it is written, and the model at the end.

    A checkpoint holds what trains, whatever began as random numbers, and two moments of AdamW for each that trains.
    """
    training = recipe.training
    new = tuple(f"model.{name}." for name in BACKBONES if isinstance(getattr(recipe.model, name), dict))
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    weights = trained + sum(p.nbytes for n, p in model.named_parameters() if n.startswith(new) and not p.requires_grad)
    if training.get("save_strategy") == "no":
        return weights
    checkpoint = weights + (0 if training.get("save_only_model") else 2 * trained)
    return checkpoint * (_kept_checkpoints(training) + 1) + weights


def _kept_checkpoints(training: dict) -> int:
    limit, steps, every = training["save_total_limit"], training["max_steps"], training["save_steps"]
    written = 1 / every if every < 1 else steps / every
    return max(1, int(min(written, limit or written) if steps > 0 else limit or 1))


def _argument(size: float) -> str:
    return f"{size / GIB:.1f}GiB"
