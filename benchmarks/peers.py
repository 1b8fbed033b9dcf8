"""Beside the peers: the same job the way others do it, on the same machine, with the same data, in one run.

    python -m benchmarks.peers                        # full size, on a GPU
    python -m benchmarks.peers --scale proportional   # a thousandth of the arithmetic, on a CPU

Each way is a process of its own; rounds alternate, and the median round counts. All see pairs of noise and random weights:
- `naive`: the loop that the memory guide describes: VGGT in float32, run in every step with all its outputs kept, both
  backbones resident, LoRA on LLaMA without checkpointing;
- `openvla_oft`: OpenVLA-OFT's published setting (rank 32, two pictures of 224 pixels through two encoders to 512 view tokens
  in LLaMA, adapters on all of it, no checkpointing), built here from transformers and PEFT: same shapes, not its code;
- `ours`: `recipes/lora.json`; `ours_cached`: the same from cached VGGT features.
LeRobot's own policies need another torch than this project's, and are not built here.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.full_size import SCALES, WARM_UP, Case, device, make_trainer, now, train
from benchmarks.gpu_suite import this_meter
from benchmarks.oft_like import OFTLike, make_oft
from benchmarks.result import RESULTS, write_result

STEPS, ROUNDS = 8, 3
BATCH = 8
OURS = Case("lora.json", {"data": {"batch_size": BATCH}, "model": {"pool_grid": 4}}, text_tokens=47)
CACHED = Case("lora.json", {**OURS.changes, "memory": {"cache": ["vggt"]}}, text_tokens=47)
NAIVE = Case(
    "lora.json",
    {**OURS.changes, "training": {"activation_checkpointing": False, "optim": "adamw_torch"}},
    text_tokens=47,
)


def main() -> None:
    """Run every way in turn, for some rounds, and write the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="full")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(WAYS[options.way](options.scale)))
        return
    if options.scale == "full" and not torch.cuda.is_available():
        raise SystemExit("There is no GPU here: nothing is measured at full size. Try --scale proportional.")
    rounds = [{way: run_alone(way, options.scale) for way in WAYS} for _ in range(options.rounds)]
    ways = {way: median([one[way] for one in rounds]) for way in WAYS}
    results = {"scale": options.scale, "batch_size": BATCH, "ways": ways, "over_naive": ratios(ways)}
    print(f"Written: {write_result('peers', results, options.results)}")


def run_alone(way: str, scale: str) -> dict[str, float]:
    """Run one way in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.peers", "--way", way, "--scale", scale]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{way}: {done.stderr.strip().splitlines()[-1]}")
    result = json.loads(done.stdout.strip().splitlines()[-1])
    print(f"{way}: {result['samples_per_second']:.2f} samples/s", flush=True)
    return result


def median(rounds: list[dict[str, float]]) -> dict[str, float]:
    """Take the median of each number over the rounds."""
    return {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}


def ratios(ways: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Set each way beside the naive one."""
    naive = ways["naive"]
    return {
        way: {
            "speed": found["samples_per_second"] / naive["samples_per_second"],
            "peak": found["peak_bytes"] / naive["peak_bytes"],
        }
        for way, found in ways.items()
    }


def run_ours(scale: str, case: Case = OURS) -> dict[str, float]:
    """Train as the recipe says."""
    recipe, meter = case.load(scale), this_meter()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(recipe, case.shapes, Path(folder), STEPS)
        meter.start()
        speed = train(trainer)
    return {"samples_per_second": speed["samples_per_second"], "peak_bytes": meter.peak().allocated}


def run_cached(scale: str) -> dict[str, float]:
    """Train on what VGGT gave once."""
    return run_ours(scale, CACHED)


def run_naive(scale: str) -> dict[str, float]:
    """Train a plain loop around VGGT in float32, whose outputs of all layers stay until the step ends."""
    recipe, meter = NAIVE.load(scale), this_meter()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(recipe, NAIVE.shapes, Path(folder), STEPS)
    model = trainer.bare_model()
    model.model.vggt.float()
    keep_all_outputs(model.model.vggt)
    batch = {key: rows.to(device()) for key, rows in trainer.train_dataset.rows.items()}
    return bare_loop(model, batch, meter)


def keep_all_outputs(vggt: nn.Module) -> None:
    """Let VGGT compute and keep the tokens of every layer, as its reference code does."""
    forward = vggt.forward

    def forward_all(pixel_values, layers):
        with torch.autocast(pixel_values.device.type, enabled=False):
            vggt.kept = forward(pixel_values.float())
        return [vggt.kept[layer] for layer in layers]

    vggt.forward = forward_all


def run_oft(scale: str) -> dict[str, float]:
    """Train a policy of OpenVLA-OFT's shapes."""
    meter = this_meter()
    model = make_oft(full=scale == "full").to(device())
    return bare_loop(model, OFTLike.batch(model, BATCH, device()), meter)


def bare_loop(model: nn.Module, batch: dict[str, torch.Tensor], meter) -> dict[str, float]:
    """Train on one batch, over and over, in bfloat16 autocast with AdamW."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    meter.start()
    began = now()
    for step in range(STEPS):
        if step == WARM_UP:
            began = now()
        with torch.autocast(device(), torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    seconds = now() - began
    return {"samples_per_second": BATCH * (STEPS - WARM_UP) / seconds, "peak_bytes": meter.peak().allocated}


WAYS = {"naive": run_naive, "openvla_oft": run_oft, "ours": run_ours, "ours_cached": run_cached}

if __name__ == "__main__":
    main()
