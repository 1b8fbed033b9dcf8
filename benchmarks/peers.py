"""Beside the peers: the same job the way others do it, on the same machine, with the same data, in one run.

    python -m benchmarks.peers                        # full size, on a GPU
    python -m benchmarks.peers --scale proportional   # a thousandth of the arithmetic, on a CPU

Each way is a process of its own; rounds alternate, and the median round counts. All see pairs of noise and random weights:
- `naive`: the loop that the memory guide describes: VGGT in float32, run in every step with all its outputs kept, both
  backbones resident, LoRA on LLaMA without checkpointing;
- `openvla_oft`: OpenVLA-OFT's published setting (rank 32, two pictures of 224 pixels through two encoders to 512 view tokens
  in LLaMA, adapters on all of it, no checkpointing), built here from transformers and PEFT: same shapes, not its code;
- `lerobot_smolvla`: LeRobot's own SmolVLA and its own training step, in an environment of its own with another torch
  (lerobot_policy.py). Its pi0 isn't here: it wants a fork of transformers, and refuses the release that LeRobot asks for;
- `ours`: `recipes/lora.json`; `ours_cached`: the same from cached VGGT features.

These are different models, and a sample costs each another arithmetic: `flops_a_sample`, of a whole training step as it is
carried out, what checkpointing repeats included. `full_flops` is the same at full size; both together say how far each was
cut. Memory is set side by side without what the libraries took before there was a model.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from benchmarks.full_size import SCALES, Case, make_trainer, plan, train
from benchmarks.lerobot_environment import make_environment, run_in_lerobot, versions_of
from benchmarks.oft_like import OFTLike, make_oft
from benchmarks.result import RESULTS, write_result
from benchmarks.training_cost import Memory, cost, count_flops, device, seconds_a_step

STEPS, ROUNDS = 8, 3
BATCH = 8
LEROBOT_POLICY = Path(__file__).with_name("lerobot_policy.py")
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
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="beside the naive one")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(WAYS[options.way](options.scale)))
        return
    if options.scale == "full" and not torch.cuda.is_available():
        raise SystemExit("There is no GPU here: nothing is measured at full size. Try --scale proportional.")
    names = [way for way in WAYS if way in ("naive", *options.ways)]
    rounds = [{way: run_alone(way, options.scale) for way in names} for _ in range(options.rounds)]
    ways = {way: median([one[way] for one in rounds]) | {"full_flops": FULL_FLOPS[way]()} for way in names}
    results = {"scale": options.scale, "batch_size": BATCH, "ways": ways, "over_naive": ratios(ways)}
    if "lerobot_smolvla" in ways:
        results["lerobot_versions"] = versions_of(make_environment())
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
    """Set each way beside the naive one: samples a second, FLOP a second, memory beyond the libraries'."""

    def over_naive(of: Callable[[dict[str, float]], float]) -> dict[str, float]:
        return {way: of(found) / of(ways["naive"]) for way, found in ways.items()}

    return {
        "speed": over_naive(lambda found: found["samples_per_second"]),
        "flops_a_sample": over_naive(lambda found: found["flops_a_sample"]),
        "flops_per_second": over_naive(lambda found: found["flops_a_sample"] * found["samples_per_second"]),
        "memory": over_naive(lambda found: found["peak_bytes"] - found["library_bytes"]),
    }


def run_ours(scale: str, case: Case = OURS) -> dict[str, float]:
    """Train as the recipe says."""
    recipe, memory = case.load(scale), Memory()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(recipe, case.shapes, Path(folder), STEPS)
        memory.start()
        speed = train(trainer)["samples_per_second"]
        step = partial(trainer.training_step, trainer.model, trainer.train_dataset.rows)
        return cost(speed, memory, trainer.bare_model(), step, BATCH)


def run_cached(scale: str) -> dict[str, float]:
    """Train on what VGGT gave once."""
    return run_ours(scale, CACHED)


def run_naive(scale: str) -> dict[str, float]:
    """Train a plain loop around VGGT in float32, whose outputs of all layers stay until the step ends."""
    recipe, memory = NAIVE.load(scale), Memory()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(recipe, NAIVE.shapes, Path(folder), STEPS)
    model = trainer.bare_model()
    model.model.vggt.float()
    keep_all_outputs(model.model.vggt)
    batch = {key: rows.to(device()) for key, rows in trainer.train_dataset.rows.items()}
    return bare_loop(model, batch, memory)


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
    memory = Memory()
    model = make_oft(full=scale == "full").to(device())
    return bare_loop(model, OFTLike.batch(model, BATCH, device()), memory)


def bare_loop(model: nn.Module, batch: dict[str, torch.Tensor], memory: Memory) -> dict[str, float]:
    """Train on one batch, over and over, in bfloat16 autocast with AdamW."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        with torch.autocast(device(), torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    memory.start()
    return cost(BATCH / seconds_a_step(step, STEPS), memory, model, step, BATCH)


def run_smolvla(scale: str) -> dict[str, float]:
    """Train LeRobot's SmolVLA by its own step, in its own environment."""
    return ask_lerobot("train", "full" if scale == "full" else "proportional", BATCH, STEPS)


def ask_lerobot(*arguments: object) -> dict[str, float]:
    """Run a command of lerobot_policy.py."""
    with tempfile.TemporaryDirectory() as cache:
        return run_in_lerobot(make_environment(), Path(cache), *arguments, script=LEROBOT_POLICY)


def planned_flops(case: Case) -> float:
    """Count a sample's arithmetic at full size as the planner does, under fake tensors."""
    return sum(plan(case, case.load("full"), "RTX 6000 Ada", None).flops.values())


def oft_flops() -> float:
    """Count it for OpenVLA-OFT's shapes, under fake tensors."""
    with torch.device("meta"):
        model = make_oft(full=True)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.autocast("cpu", torch.bfloat16):
        model.to_empty(device="cpu")
        batch = OFTLike.batch(model, 1, "cpu")
        return count_flops(lambda: model(**batch).loss.backward())


def smolvla_flops() -> float:
    """Count it for SmolVLA, which has to be run for that."""
    return ask_lerobot("size", "full")["flops_a_sample"]


WAYS = {
    "naive": run_naive,
    "openvla_oft": run_oft,
    "lerobot_smolvla": run_smolvla,
    "ours": run_ours,
    "ours_cached": run_cached,
}
FULL_FLOPS = {
    "naive": partial(planned_flops, NAIVE),
    "openvla_oft": oft_flops,
    "lerobot_smolvla": smolvla_flops,
    "ours": partial(planned_flops, OURS),
    "ours_cached": partial(planned_flops, CACHED),
}

if __name__ == "__main__":
    main()
