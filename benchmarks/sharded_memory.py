"""Is the plan of a sharded run right? Two processes that shard with FSDP2, beside what is planned for two GPUs.

    python -m benchmarks.sharded_memory

The real Trainer fine-tunes a LLaMA of 155 M parameters in full over gloo: accelerate is told that its processes have GPUs,
as in tests/distributed/train_sharded.py. What each process holds at its most in the third step, beyond what it held once
steps of a tiny model had loaded all libraries, is set beside the plan's tensors and its lines for sharding.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile

import torch
import torch.distributed as dist
from transformers import TrainerCallback

import hf_vla.prepare
from benchmarks.memory_fake_vs_real import LEAN, PROC_RESET, give_back, status
from benchmarks.result import write_result
from hf_vla.memory.cuda_rules import no_workspace
from hf_vla.memory.gpus import find_gpu
from hf_vla.memory.planner import make_plan
from hf_vla.memory.shapes import read_shapes
from hf_vla.memory.trace import trace
from hf_vla.prepare import build_trainer
from hf_vla.recipe import Recipe
from tests.distributed.train_sharded import SHARDED, arguments_of_gpus
from tests.tiny_run import tiny_recipe

RANKS = 2

VGGT = {"img_size": 28, "embed_dim": 64, "depth": 1, "num_heads": 2, "encoder_depth": 1, "encoder_num_heads": 2}
LLAMA = {
    "vocab_size": 2000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
}
TINY = {**LLAMA, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
CASES = {
    "micro-batch 4": {},
    "micro-batch 4, accumulating 2": {"gradient_accumulation_steps": 2},
    "micro-batch 64, checkpointed": {"per_device_train_batch_size": 64, "activation_checkpointing": True},
}
"""What differs in `training`; the micro-batch is the recipe's own key."""


class ThirdStep(TrainerCallback):
    """Reads the most that this process holds in the third step; optimizer states are there by then."""

    peak = 0

    def on_step_begin(self, args, state, control, **kwargs):
        """Begin the process's peak anew."""
        give_back()
        if state.global_step == 2:
            PROC_RESET.write_text("5")

    def on_step_end(self, args, state, control, **kwargs):
        """Read it."""
        if state.global_step == 3:
            self.peak = status("VmHWM")


def sharded_recipe(llama: dict, case: str) -> Recipe:
    """Make the recipe of a case."""
    training = dict(CASES[case])
    batch_size = training.pop("per_device_train_batch_size", 4)
    quiet = {"bf16": True, "max_steps": 3, "save_strategy": "no", "eval_strategy": "no"}
    return tiny_recipe(
        model={"vggt": VGGT, "lang_encoder": llama, "freeze_vggt": True, "dtype": "bfloat16"},
        data={"batch_size": batch_size},
        training={**quiet, **SHARDED, **training},
    )


def train_watched(recipe: Recipe) -> int:
    """Train three steps, and give the process's peak in the last."""
    with tempfile.TemporaryDirectory() as folder:
        trainer, watch = build_trainer(recipe, folder), ThirdStep()
        trainer.add_callback(watch)
        trainer.train()
    return watch.peak


def run_rank(case: str) -> None:
    """Be one of the processes, and print what it took."""
    torch.set_num_threads(1)
    hf_vla.prepare.training_arguments = arguments_of_gpus
    train_watched(sharded_recipe(TINY, case))
    give_back()
    before = status("VmRSS")
    peak = train_watched(sharded_recipe(LLAMA, case))
    print("took", json.dumps(peak - before), flush=True)
    dist.destroy_process_group()


def measure(case: str) -> list[int]:
    """Run a case on all ranks, and give what each took."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(RANKS)]
    environment = {**os.environ, **LEAN, "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    words = [*command, "-m", "benchmarks.sharded_memory", "--rank-of", case]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    return [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("took ")]


def planned(case: str) -> int:
    """Plan a case for as many GPUs: its tensors, and what sharding takes beside them."""
    recipe = sharded_recipe(LLAMA, case)
    shapes = read_shapes(recipe)
    plan = make_plan(
        recipe, trace(recipe, shapes, workspace=no_workspace), None, RANKS, find_gpu("RTX 6000 Ada"), shapes
    )
    return plan.tensor_peak + sum(
        line.bytes for line in plan.lines if line.name in ("gathered layers", "float32 masters")
    )


def compare(case: str) -> dict:
    """Set the plan beside what the ranks took."""
    took, plan = measure(case), planned(case)
    return {"case": case, "planned_bytes": plan, "process_bytes": took, "planned_over_process": plan / max(took) - 1}


def main() -> None:
    """Compare every case, print and write; or be one rank of one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank-of", choices=CASES, help=argparse.SUPPRESS)
    case = parser.parse_args().rank_of
    if case:
        run_rank(case)
    else:
        rows = [compare(case) for case in CASES]
        print(json.dumps(rows, indent=2))
        write_result("sharded_memory", {"ranks": RANKS, "cases": rows})


if __name__ == "__main__":
    main()
