"""Is the plan right? The trace on fake tensors against the same steps on real ones.

    python -m benchmarks.memory_fake_vs_real          # on the CPU: the tracker on real tensors, and the process's own peak
    python -m benchmarks.memory_fake_vs_real --gpu    # on a GPU: PyTorch's allocator and NVML, full-size models

Every configuration runs in a process of its own: two optimizer steps, an evaluation batch, a checkpoint's state. Models have
random weights; nothing is downloaded. Results go to benchmarks/results/.
"""

import argparse
import copy
import ctypes
import gc
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn

from benchmarks.random_weights import fill_with_random
from benchmarks.result import write_result
from hf_vla.assemble import build_config, build_on_meta
from hf_vla.memory.cuda_rules import cuda_autocast, offloading
from hf_vla.memory.ledger import Ledger
from hf_vla.memory.nvml import read_gpus
from hf_vla.memory.planner import plan_recipe
from hf_vla.memory.shapes import Shapes
from hf_vla.memory.trace import rehearse, trace, without_cycles
from hf_vla.memory.tracker import MemoryTracker
from hf_vla.recipe import Recipe, make_recipe

TEXT_TOKENS = 48
LEAN = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MKL_DISABLE_FAST_MM": "1",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0",
    "LRU_CACHE_CAPACITY": "1",
}
"""Environment in which what is freed goes back to the system at once, so that the process holds what its tensors hold.

The last two are oneDNN's own cache of kernels and ATen's (ideep, lru_cache.hpp): 20 MB for bfloat16 products of this size.
"""
PROC_RESET = Path("/proc/self/clear_refs")
"""Takes a 5 to begin VmHWM, the process's highest resident memory, anew."""

MIDDLE = {
    "model": {
        "vggt": {"embed_dim": 512, "depth": 4, "num_heads": 8, "encoder_depth": 4, "encoder_num_heads": 8},
        "lang_encoder": {
            "hidden_size": 1024,
            "num_hidden_layers": 8,
            "intermediate_size": 2816,
            "num_attention_heads": 8,
            "vocab_size": 8000,
        },
        "fusion": {"type": "cross_attention", "hidden_size": 512, "num_layers": 2, "num_heads": 8},
        "head": {"hidden_size": 512},
        "dtype": "float32",
    },
    "data": {"image_size": 224, "batch_size": 4},
    "lora": {"apply_to": ["lang_encoder"]},
    "training": {"bf16": False},
}
FULL_LLAMA = {"model": {"freeze_lang_encoder": False}, "lora": {"apply_to": []}}
ALL_TRAINS = {"model": {"freeze_lang_encoder": False, "freeze_vggt": False}, "lora": {"apply_to": []}}
CHECKPOINTED = {"activation_checkpointing": True}
WIDE_LLAMA = {"hidden_size": 1536, "intermediate_size": 4096, "num_attention_heads": 12, "num_hidden_layers": 12}

HALF = {"model": {"dtype": "bfloat16"}, "training": {"bf16": True}}

CPU_CASES = {
    "both frozen": {"lora": {"apply_to": []}},
    "LoRA": {},
    "LoRA, batch 8, one view, 12 tokens": {"data": {"batch_size": 8}, "shapes": {"num_views": 1, "text_tokens": 12}},
    "LoRA, 336 pixels": {"data": {"image_size": 336, "batch_size": 2}},
    "LoRA r64, accumulating": {"lora": {"r": 64}, "training": {"gradient_accumulation_steps": 2}},
    "LoRA, bfloat16": HALF,
    "LoRA on VGGT, checkpointed": {"lora": {"apply_to": ["vggt"]}, "training": CHECKPOINTED},
    "LoRA, every second layer checkpointed": {
        "training": {**CHECKPOINTED, "activation_checkpointing_kwargs": {"every_n_layers": 2}}
    },
    "LoRA, offloaded checkpointing": {
        "training": {**CHECKPOINTED, "activation_checkpointing_kwargs": {"offload": True}}
    },
    "QLoRA, bfloat16": {"model": {**HALF["model"], "quantization": "nf4"}, "training": HALF["training"]},
    "8-bit LoRA": {"model": {"quantization": "int8"}},
    "LoRA, prefix fusion": {"model": {"fusion": {"type": "prefix"}}},
    "cached VGGT": {"memory": {"cache": ["vggt"]}},
    "full LLaMA, AdamW foreach": {**FULL_LLAMA, "training": {"optim": "adamw_torch"}},
    "full LLaMA, 8-bit AdamW, checkpointed": {**FULL_LLAMA, "training": {"optim": "adamw_bnb_8bit", **CHECKPOINTED}},
    "full LLaMA, paged 8-bit AdamW": {**FULL_LLAMA, "training": {"optim": "paged_adamw_8bit"}},
    "VGGT trains, LLaMA frozen": {"model": {"freeze_vggt": False}, "lora": {"apply_to": []}},
    "end to end, in backward": {
        **ALL_TRAINS,
        "training": {"max_grad_norm": 0.0, **CHECKPOINTED},
        "memory": {"optimizer_in_backward": True},
    },
    "end to end, 500 M, checkpointed": {
        **ALL_TRAINS,
        "model": {**ALL_TRAINS["model"], "lang_encoder": WIDE_LLAMA},
        "training": CHECKPOINTED,
    },
}
GPU_CASES = {
    "both frozen, batch 8": {},
    "LoRA, batch 8": {"lora": {"apply_to": ["lang_encoder"]}},
    "LoRA, checkpointed, batch 8": {"lora": {"apply_to": ["lang_encoder"]}, "training": CHECKPOINTED},
    "QLoRA, batch 8": {"lora": {"apply_to": ["lang_encoder"]}, "model": {"quantization": "nf4"}},
    "LoRA, offloaded, batch 8": {
        "lora": {"apply_to": ["lang_encoder"]},
        "training": {**CHECKPOINTED, "activation_checkpointing_kwargs": {"offload": True}},
    },
    "full LLaMA, paged, in backward, batch 4": {
        "data": {"batch_size": 4},
        "model": {"freeze_lang_encoder": False},
        "training": {"max_grad_norm": 0.0, "optim": "paged_adamw_8bit", **CHECKPOINTED},
        "memory": {"optimizer_in_backward": True},
    },
}


def make_case(base: dict, changes: dict) -> tuple[Recipe, Shapes]:
    """Lay a case's keys over a base recipe."""
    raw = copy.deepcopy(base)
    for section, keys in changes.items():
        target = raw.setdefault(section, {})
        for key, value in keys.items():
            target[key] = {**target[key], **value} if isinstance(target.get(key), dict) else value
    shapes = raw.pop("shapes", {})
    return make_recipe(raw), Shapes(**{"text_tokens": TEXT_TOKENS, **shapes})


class Unwatched(MemoryTracker):
    """Lets all pass without a log, whose own size would count as the process's."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run an operation."""
        return func(*args, **(kwargs or {}))

    def label(self, tensors, component: str, kind: str) -> None:
        """Forget what tensors are."""


def run_real(recipe: Recipe, shapes: Shapes, tracker: MemoryTracker) -> MemoryTracker:
    """Go through the run on real tensors of the default device, under a tracker."""
    config = build_config(recipe, shapes.num_views, shapes.state_dim, shapes.action_dim)
    model = build_on_meta(recipe, config)
    on_cpu = torch.get_default_device().type == "cpu"
    with (
        without_cycles(),
        cuda_autocast() if on_cpu else nullcontext(),
        offloading(tracker) if on_cpu else nullcontext(),
    ):
        rehearse(recipe, model, shapes, recipe.data.batch_size, tracker, fill_with_real, extent="two steps")
    return tracker


def fill_with_real(model: nn.Module) -> None:
    """Give a model random weights; then let the process's peak start anew."""
    fill_with_random(model)
    PROC_RESET.write_text("5")


def everywhere(ledger: Ledger) -> int:
    """Give the most bytes held on device and host together, as one process on a CPU holds them."""
    return int((ledger.rounded().cumsum() * (ledger.phase > 0)).max())


def status(key: str) -> int:
    """Read a size of this process, in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0]) * 1024


def give_back() -> None:
    """Return to the system whatever this process holds free."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def cpu_workspace(func, args: tuple) -> int:
    """Give what a CPU kernel takes beside its results, where that is much; a GPU's kernels make no such copies."""
    copies = _COPIES.get(str(func._overloadpacket))
    if copies is None:
        return 0
    parameter = args[2]
    return (copies if parameter.dtype == torch.float32 else copies + 1) * 4 * parameter.numel()


_COPIES = {"bitsandbytes.optimizer_update_8bit_blockwise": 5, "bitsandbytes.optimizer_update_32bit": 3}
"""Float32 copies of a float32 parameter that bitsandbytes' updates make on a CPU (backends/cpu/ops.py).

In 8 bits: both moments, the gradient, the root of the second and the denominator; in 32 the last three. Of a 16-bit
parameter, also that itself.
"""


def run_cpu_case(name: str) -> dict:
    """Compare one case on the CPU, in this process: fake tensors, real ones, and the process's own peak.

    The real run under the tracker comes first, so that the libraries' code is there when the run without one begins. What
    else it leaves behind could hide a part of that run's peak: it is given back where it can be, and the rest is reported.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    recipe, shapes = make_case(MIDDLE, CPU_CASES[name])
    fake = trace(recipe, shapes, extent="two steps", workspace=cpu_workspace)
    give_back()
    fresh = status("RssAnon")
    real = run_real(recipe, shapes, MemoryTracker(cpu_workspace)).ledger()
    give_back()
    before, left_behind = status("VmRSS"), status("RssAnon") - fresh
    run_real(recipe, shapes, Unwatched())
    process = status("VmHWM") - before
    return {
        "case": name,
        "parameters": sum(fake.parameters.values()),
        "fake_bytes": fake.ledger.peak()[0],
        "real_bytes": real.peak()[0],
        "fake_with_host_bytes": everywhere(fake.ledger),
        "process_bytes": process,
        "left_behind_bytes": left_behind,
        "fake_over_real": fake.ledger.peak()[0] / real.peak()[0] - 1,
        "fake_over_process": everywhere(fake.ledger) / process - 1,
    }


def run_gpu_case(name: str) -> dict:
    """Compare one full-size case on the GPU: the plan, PyTorch's allocator, and NVML."""
    recipe, shapes = make_case({}, GPU_CASES[name])
    gpu = read_gpus().gpus[0]
    plan = plan_recipe(recipe, gpu=gpu.name, shapes=shapes)
    free = gpu.free
    with torch.device("cuda"):
        tracked = run_real(recipe, shapes, MemoryTracker()).ledger()
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return {
        "case": name,
        "gpu": gpu.name,
        "planned_tensor_bytes": plan.tensor_peak,
        "planned_total_bytes": plan.total,
        "tracked_bytes": tracked.peak()[0],
        "max_memory_allocated": allocated,
        "max_memory_reserved": reserved,
        "nvml_used_by_this_run": free - read_gpus().gpus[0].free,
        "plan_over_allocated": plan.tensor_peak / allocated - 1,
    }


def run_alone(name: str, on_gpu: bool) -> dict:
    """Run a case in a process of its own, whose freed tensors go back to the system at once."""
    command = [sys.executable, "-m", "benchmarks.memory_fake_vs_real", "--case", name, *(["--gpu"] if on_gpu else [])]
    done = subprocess.run(command, env={**os.environ, **LEAN}, capture_output=True, text=True)
    if done.returncode:
        return {"case": name, "error": done.stderr.strip().splitlines()[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Run every case, print what came out, and write it to benchmarks/results/."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="full-size models on the GPU")
    parser.add_argument("--case", help="run this one here, and print its result as JSON")
    options = parser.parse_args()
    if options.case:
        print(json.dumps((run_gpu_case if options.gpu else run_cpu_case)(options.case)))
        return
    if options.gpu and not torch.cuda.is_available():
        raise SystemExit("There is no GPU here, so its half stays unmeasured.")
    rows = []
    for name in GPU_CASES if options.gpu else CPU_CASES:
        rows.append(run_alone(name, options.gpu))
        print(json.dumps(rows[-1]), flush=True)
    write_result("memory_planned_vs_gpu" if options.gpu else "memory_fake_vs_real", {"cases": rows})


if __name__ == "__main__":
    main()
