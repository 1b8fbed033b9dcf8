"""What does VGGT ahead of the step save, where micro-batches are small?

    OMP_NUM_THREADS=2 python -m benchmarks.encode_ahead                # a thousandth of the arithmetic, on a CPU
    python -m benchmarks.encode_ahead --scale full                     # on a GPU

The project's own trainer on LoRA steps of the same samples, cut into micro-batches in several ways: VGGT in each micro-step;
for all of the step's pairs at once before the first; and, on a GPU, for all of the next step's beside the training on this
one. They take turns; the best turn of each counts, as others on the machine only ever make one slower.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.full_size import SCALES, Case, make_trainer, train
from benchmarks.result import RESULTS, write_result

PAIRS = 8
"""Of an optimizer step."""
CUTS = (1, 4)
"""Micro-batches that it is cut into."""
STEPS, ROUNDS = 6, 2
"""Of a turn, the first three not counted, and turns of each."""
WAYS = {
    "each_its_own": {"encode_ahead": 0},
    "ahead": {"encode_ahead": PAIRS},
    "overlapped": {"encode_ahead": PAIRS, "encode_overlap": True},
}
"""Keys of the recipe's `memory`."""
WITHOUT_A_GPU = "Not measured: on a CPU there is no second stream, and VGGT runs in turn with the training."
PLAIN = {"model": {"dtype": "float32", "pool_grid": 4}, "training": {"bf16": False}}
"""What a CPU is quick in; 96 LLaMA tokens."""


def main() -> None:
    """Measure each cut, print and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="proportional")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="turns of each")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the result is written")
    options = parser.parse_args()
    facts = {
        "scale": options.scale,
        "sizes": SCALES[options.scale],
        "threads": torch.get_num_threads(),
        "pairs": PAIRS,
        "overlapped": "measured" if torch.cuda.is_available() else WITHOUT_A_GPU,
    }
    rows = []
    for batch_size in CUTS:
        rows.append(compare(batch_size, options.scale, options.rounds))
        write_result("encode_ahead", {**facts, "cuts": rows}, options.results)


def compare(batch_size: int, scale: str, rounds: int) -> dict[str, Any]:
    """Let all ways take turns at one micro-batch; what isn't measured is None."""
    turns = {name: [] for name in WAYS if name != "overlapped" or torch.cuda.is_available()}
    for _ in range(rounds):
        for name, speeds in turns.items():
            speeds.append(samples_per_second(batch_size, WAYS[name], scale))
    best = {name: max(speeds) for name, speeds in turns.items()}
    row = {
        "micro_batch": batch_size,
        "samples_per_second": {name: turns.get(name) for name in WAYS},
        "speed_up": best["ahead"] / best["each_its_own"],
        "speed_up_overlapped": best["overlapped"] / best["each_its_own"] if "overlapped" in best else None,
    }
    print(row, flush=True)
    return row


def samples_per_second(batch_size: int, memory: dict[str, Any], scale: str) -> float:
    """Train a few steps."""
    changes = {
        **({} if torch.cuda.is_available() else PLAIN),
        "data": {"batch_size": batch_size},
        "memory": memory,
    }
    case = Case("lora.json", changes, text_tokens=47)
    recipe = case.load(scale)
    recipe.training["gradient_accumulation_steps"] = PAIRS // batch_size
    with tempfile.TemporaryDirectory() as folder:
        return train(make_trainer(recipe, case.shapes, Path(folder), STEPS))["samples_per_second"]


if __name__ == "__main__":
    main()
