"""What is true on this GPU? One command, under ten minutes, no network, no weights.

    python -m benchmarks.gpu_suite                       # results: benchmarks/results/gpu_suite/<part>.json
    python -m benchmarks.gpu_suite --only lora qlora     # some parts
    python -m benchmarks.gpu_suite --small --only lora --results DIR    # to see on a CPU that it runs

Each part runs in a process of its own, the most important first, and writes its file as soon as it is done, so that a run
that is cut short still counts. Training parts use the project's own trainer on full-size models with random weights and
pairs of noise, the allocator capped at 28 GiB. Predicted are the plan's bytes, measured the allocator's and NVML's.
`calibration` turns what was measured into the constants that the next plan for this GPU uses.
"""

import argparse
import dataclasses
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.full_size import Case, device, make_trainer, model_flops, now, plan, train
from benchmarks.random_weights import fill_with_random
from benchmarks.result import RESULTS, write_result
from hf_vla.arguments import training_arguments
from hf_vla.assemble import build_config, build_on_meta
from hf_vla.memory.gpus import facts_of, write_calibration
from hf_vla.memory.meter import GPUMeter, HostMeter, Meter
from hf_vla.memory.microbatch import Fit
from hf_vla.trainer import VLATrainer

BUDGET = 28 * 2**30
SECONDS = 570
"""Of the whole suite: no part is started later than this less what the longest has taken."""
STEPS = 8
SHORT = {"model": {"pool_grid": 4}}
"""2 views x 16 tokens, 47 of text, state, 16 action queries: 96 LLaMA tokens."""
CACHED = {"memory": {"cache": ["vggt"]}, "model": {"freeze_vggt": True}}
BOTH_CACHED = {"memory": {"cache": ["vggt", "lang_encoder"]}}
ONE_BY_EIGHT = {"data": {"batch_size": 1}, "training": {"gradient_accumulation_steps": 8}}
"""Where VGGT ahead of the step has most to win: eight micro-steps of one pair each."""

TRAININGS = {
    "lora": Case("lora.json", {"data": {"batch_size": 8}}),
    "safe": Case("safe.json", {"memory": {"cache": []}}),
    "safe_cached": Case("safe.json", BOTH_CACHED),
    "lora_96": Case("lora.json", SHORT, text_tokens=47),
    "lora_96_cached": Case("lora.json", {**CACHED, "model": SHORT["model"]}, text_tokens=47),
    "qlora": Case("qlora.json", {}),
    "full_language": Case("full_language.json", {}),
    "end_to_end": Case("end_to_end.json", {}),
    "lora_batch_16": Case("lora.json", {"data": {"batch_size": 16}}),
    "lora_batch_1": Case("lora.json", {"data": {"batch_size": 1}}),
    "lora_1x8": Case("lora.json", ONE_BY_EIGHT),
    "lora_1x8_ahead": Case("lora.json", {**ONE_BY_EIGHT, "memory": {"encode_ahead": 8}}),
    "lora_1x8_overlapped": Case("lora.json", {**ONE_BY_EIGHT, "memory": {"encode_ahead": 8, "encode_overlap": True}}),
    "lora_flow": Case("lora_flow.json", {}),
    "lora_discrete": Case("lora_discrete.json", {}),
}
VGGT_PAIRS = (1, 2, 4, 8, 16)
MATRIX, SMALL_MATRIX = 8192, 1024
"""Side of the matrices whose product gives the rate that utilisation is counted against."""
ATTENTION = "aten::_scaled_dot_product_"
"""How PyTorch's kernels of attention begin: flash, efficient, cudnn, and `attention_math`, which is none."""


def main() -> None:
    """Run the parts, one process each, as long as there is time."""
    options = parse()
    if options.part:
        write_result(options.part, run_part(options.part, options), options.results)
        return
    if not torch.cuda.is_available() and not options.small:
        raise SystemExit("There is no GPU here: nothing is measured. --small shows on a CPU that the suite runs.")
    began, longest = time.perf_counter(), 0.0
    for part in options.only or PARTS:
        left = math.inf if options.small else SECONDS - (time.perf_counter() - began)
        if left < longest:
            print(f"{part}: not run, for want of time", flush=True)
            continue
        seconds = run_alone(part, options, left)
        longest = max(longest, seconds)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, help="these parts")
    parser.add_argument("--small", action="store_true", help="a thousandth of the size, on the CPU too")
    parser.add_argument("--results", type=Path, default=RESULTS / "gpu_suite")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    return parser.parse_args()


def run_alone(part: str, options: argparse.Namespace, seconds: float) -> float:
    """Run one part in a process of its own and say what came of it; returns the seconds it took."""
    command = [sys.executable, "-m", "benchmarks.gpu_suite", "--part", part, "--results", str(options.results)]
    began = time.perf_counter()
    try:
        done = subprocess.run(
            command + ["--small"] * options.small,
            timeout=None if math.isinf(seconds) else seconds,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        failed = done.stdout.strip().splitlines()[-1:] if done.returncode else []
    except subprocess.TimeoutExpired:
        failed = ["ran out of time"]
    took = time.perf_counter() - began
    print(f"{part}: {took:.0f} s {' '.join(failed) or read_summary(options.results / f'{part}.json')}", flush=True)
    return took


def read_summary(file: Path) -> str:
    """Give a part's main numbers."""
    result = json.loads(file.read_text())
    return json.dumps({key: value for key, value in result.items() if isinstance(value, int | float)})


def run_part(part: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one part in this process."""
    if part == "calibration":
        return calibrate(options.results)
    meter = this_meter()
    if part in TRAININGS:
        return measure_training(TRAININGS[part], meter, options.small)
    return MEASUREMENTS[part](meter, options.small)


def calibrate(results: Path) -> dict[str, Any]:
    """Make the planner's constants of what `device` and `lora` measured; on a GPU, store them for its next plan."""
    measured, lora = (json.loads((results / f"{part}.json").read_text()) for part in ("device", "lora"))
    sheet = facts_of(measured["gpu"])
    speed = lora["utilisation"] * lora["matrix_rate"] / sheet.half_flops
    constants = {
        "context_bytes": lora["outside_allocator_bytes"],
        "compute_efficiency": speed,
        "bandwidth_efficiency": measured["bandwidth"] / sheet.bandwidth,
        "source": f"measured by benchmarks.gpu_suite, {measured['date']}",
    }
    if torch.cuda.is_available():
        write_calibration(dataclasses.replace(sheet, **constants))
    return {"measured_on": measured["measured_on"], "gpu": sheet.name, **constants}


def measure_training(case: Case, meter: Meter, is_small: bool) -> dict[str, Any]:
    """Plan a training, run it under the budget, and set one beside the other."""
    recipe = case.load(scale_of(is_small))
    planned = plan(case, recipe, gpu_name(meter), BUDGET)
    flops = model_flops(case, recipe, gpu_name(meter))
    meter.cap(BUDGET)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(recipe, case.shapes, Path(folder), STEPS)
        meter.start()
        speed = train(trainer)
    usage = meter.peak()
    rate = matrix_rate(is_small)
    return {
        "recipe": case.recipe,
        "changes": case.changes,
        "text_tokens": case.text_tokens,
        "micro_batch": recipe.data.batch_size,
        "measured_on": meter.name,
        "ran_uncut": trainer.is_uncut,
        "predicted_peak_bytes": planned.tensor_peak,
        "predicted_total_bytes": planned.total,
        "measured_peak_bytes": usage.allocated,
        "reserved_bytes": usage.reserved,
        "outside_allocator_bytes": usage.outside,
        "nvml_bytes": usage.total if torch.cuda.is_available() else None,
        "budget_bytes": BUDGET if torch.cuda.is_available() else None,
        "predicted_over_measured": planned.tensor_peak / usage.allocated - 1,
        "predicted_over_total": planned.total / usage.total - 1,
        "predicted_samples_per_second": planned.samples_per_second,
        "model_flops_a_sample": flops,
        "utilisation": flops * speed["samples_per_second"] / rate,
        "matrix_rate": rate,
        **speed,
    }


def measure_device(meter: Meter, is_small: bool) -> dict[str, Any]:
    """Measure what the planner takes as constants: rates of arithmetic and memory, the context's bytes."""
    rate, bandwidth = matrix_rate(is_small), memory_rate(is_small)
    sheet = facts_of(gpu_name(meter))
    return {
        "measured_on": meter.name,
        "gpu": sheet.name,
        "matrix_rate": rate,
        "bandwidth": bandwidth,
        "outside_allocator_bytes": meter.peak().outside,
        "share_of_sheet": {"half_flops": rate / sheet.half_flops, "bandwidth": bandwidth / sheet.bandwidth},
    }


def measure_vggt(meter: Meter, is_small: bool) -> dict[str, Any]:
    """Time the frozen VGGT's forward over batches of pairs."""
    case = TRAININGS["safe"]
    recipe = case.load(scale_of(is_small))
    config = build_config(recipe, 2, 8, 7)
    model = build_on_meta(recipe, config)
    model.model.lang_encoder = None
    with torch.device(device()):
        fill_with_random(model)
    flops = plan(case, recipe, gpu_name(meter), None).flops["vggt"]
    rate, rows = matrix_rate(is_small), {}
    for pairs in VGGT_PAIRS:
        pixels = torch.rand(pairs, 2, 3, recipe.data.image_size, recipe.data.image_size, device=device())
        meter.start()
        seconds = timed(lambda pixels=pixels: encode(model, pixels))
        rows[str(pairs)] = {
            "seconds_a_pair": seconds / pairs,
            "utilisation": flops * pairs / seconds / rate,
            "peak_bytes": meter.peak().allocated,
        }
    return {"measured_on": meter.name, "flops_a_pair": flops, "matrix_rate": rate, "pairs": rows}


def encode(model: nn.Module, pixels: torch.Tensor) -> None:
    """Run VGGT as frozen training does."""
    with torch.no_grad(), torch.autocast(pixels.device.type, torch.bfloat16):
        model.model.encode_views(pixels)


def measure_recovery(meter: Meter, is_small: bool) -> dict[str, Any]:
    """Run out of memory for real, and see the step done in pieces: same loss as with room enough."""
    case = Case("lora.json", {"data": {"batch_size": 16}, "lora": {"lora_dropout": 0.0}})
    recipe = case.load(scale_of(is_small))
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(recipe, case.shapes, Path(folder) / "run", 1)
        start = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
        meter.start()
        roomy = trainer.train().training_loss
        peak = meter.peak()
        with torch.no_grad():
            for name, parameter in trainer.model.named_parameters():
                if name in start:
                    parameter.copy_(start[name])
        trainer.model.zero_grad(set_to_none=True)
        at_rest = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
        cap = (at_rest + peak.total) // 2
        meter.cap(cap)
        tight_trainer = make_again(trainer, Path(folder) / "tight")
        tight = tight_trainer.train().training_loss
    return {
        "measured_on": meter.name,
        "micro_batch": recipe.data.batch_size,
        "ran_out": tight_trainer.batcher.fit != Fit(recipe.data.batch_size),
        "micro_batch_found": tight_trainer.batcher.fit.size,
        "peak_with_room_bytes": peak.total,
        "cap_bytes": cap if torch.cuda.is_available() else None,
        "loss_with_room": roomy,
        "loss_recovered": tight,
    }


def make_again(trainer: VLATrainer, folder: Path) -> VLATrainer:
    """Make a fresh trainer around the same model and samples."""
    return VLATrainer(
        recipe=trainer.recipe,
        processor=None,
        model=trainer.bare_model(),
        args=training_arguments(trainer.recipe, str(folder)),
        train_dataset=trainer.train_dataset,
        eval_dataset=trainer.eval_dataset,
        data_collator=trainer.data_collator,
    )


def measure_kernels(meter: Meter, is_small: bool) -> dict[str, Any]:
    """Count which of its kernels each call of attention ran in a LoRA step, and list what the step spends its time in."""
    case = TRAININGS["lora"]
    recipe = case.load(scale_of(is_small))
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(recipe, case.shapes, Path(folder), 2)
        trainer.train()
        with torch.profiler.profile(activities=activities) as profile:
            make_again(trainer, Path(folder) / "profiled").train()
    rows = sorted(profile.key_averages(), key=lambda row: -row.self_device_time_total or -row.self_cpu_time_total)
    attention = {row.key: row.count for row in rows if row.key.startswith(ATTENTION)}
    return {
        "measured_on": meter.name,
        "attention_calls": attention,
        "without_a_fused_kernel": sum(count for name, count in attention.items() if "math" in name),
        "slowest": [
            {
                "name": row.key,
                "count": row.count,
                "device_us": row.self_device_time_total,
                "cpu_us": row.self_cpu_time_total,
            }
            for row in rows[:25]
        ],
    }


def scale_of(is_small: bool) -> str:
    """Name the sizes to run at."""
    return "small" if is_small else "full"


def this_meter() -> Meter:
    """Measure the GPU or, where there is none, the host."""
    return GPUMeter() if torch.cuda.is_available() else HostMeter()


def gpu_name(meter: Meter) -> str:
    """Name the GPU to plan for: the one measured, or the default one where only a host is."""
    return meter.name if isinstance(meter, GPUMeter) else "RTX 6000 Ada"


def matrix_rate(is_small: bool) -> float:
    """Measure multiplications and additions a second of a large bfloat16 product."""
    side = SMALL_MATRIX if is_small else MATRIX
    a, b = (torch.randn(side, side, device=device(), dtype=torch.bfloat16) for _ in range(2))
    return 2 * side**3 / timed(lambda: a @ b)


def memory_rate(is_small: bool) -> float:
    """Measure bytes a second read and written of a large copy."""
    source = torch.empty(2**20 if is_small else 2**31, dtype=torch.uint8, device=device())
    target = torch.empty_like(source)
    return 2 * source.nbytes / timed(lambda: target.copy_(source))


def timed(work, repeats: int = 10) -> float:
    """Give the seconds that some work takes, once warm, on average."""
    for _ in range(3):
        work()
    began = now()
    for _ in range(repeats):
        work()
    return (now() - began) / repeats


MEASUREMENTS = {
    "device": measure_device,
    "vggt": measure_vggt,
    "recovery": measure_recovery,
    "kernels": measure_kernels,
}
FIRST = ["device", "lora", "calibration", "safe_cached", "recovery", "full_language", "end_to_end"]
PARTS = FIRST + [part for part in (*TRAININGS, *MEASUREMENTS) if part not in FIRST]
"""By importance."""

if __name__ == "__main__":
    main()
