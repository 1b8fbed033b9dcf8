"""Is a training that is killed again and again the training that never was? Random kill points, compared to the last bit.

`python -m benchmarks.killed --kills 25`: each case is trained once undisturbed; then a process that trains it is sent
SIGKILL after a random time, goes on with --resume, is killed again, …, and ends. What is compared: every line of the log
(times and measured memory left out), every weight.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch

from benchmarks.result import write_result
from hf_vla.checkpoint import load_checkpoint
from hf_vla.recipe import Recipe
from hf_vla.train import train
from tests.tiny_run import SAMPLE, tiny_recipe

ROOT = Path(__file__).parent.parent
LAUNCH = [
    "--multi_gpu",
    "--num_processes",
    "2",
    "--num_machines",
    "1",
    "--mixed_precision",
    "no",
    "--dynamo_backend",
    "no",
]

FROZEN = {"freeze_vggt": True, "freeze_lang_encoder": True}
RANDOM = {"fusion": {"dropout": 0.2}, "head": {"type": "flow"}}
LORA = {"apply_to": ["lang_encoder", "vggt"], "r": 4, "lora_dropout": 0.2}
PLAN = {
    "max_steps": 20,
    "gradient_accumulation_steps": 2,
    "logging_steps": 4,
    "save_steps": 3,
    "eval_strategy": "steps",
    "eval_steps": 7,
    "lr_scheduler_type": "cosine",
}


class Case(NamedTuple):
    """One training, of a few epochs."""

    about: str
    sections: dict[str, dict[str, Any]]
    processes: int = 1


CASES = {
    "map_style": Case("trained in full, dropout, map-style, no workers", {"model": RANDOM}),
    "lora_workers": Case(
        "LoRA with dropout, map-style, 2 workers",
        {"model": {**FROZEN, **RANDOM}, "lora": LORA, "data": {"num_workers": 2}},
    ),
    "nf4_streamed": Case(
        "LoRA on NF4 with dropout, streamed, 2 workers",
        {
            "model": {**FROZEN, **RANDOM, "quantization": "nf4"},
            "lora": LORA,
            "data": {"streaming": True, "num_workers": 2, "shuffle_episodes": 2},
        },
    ),
    "two_processes": Case(
        "LoRA with dropout, streamed, 1 worker each",
        {
            "model": {**FROZEN, **RANDOM},
            "lora": LORA,
            "data": {"streaming": True, "num_workers": 1, "shuffle_episodes": 2},
        },
        2,
    ),
}


def main() -> None:
    """Kill all cases, and write what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=25, help="Kill points, over all cases.")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    generator = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        datasets.config.HF_DATASETS_CACHE = Path(folder) / "cache"
        shares = [arguments.kills // len(arguments.cases)] * len(arguments.cases)
        shares[0] += arguments.kills - sum(shares)
        found = [
            kill_case(name, kills, generator, Path(folder) / name)
            for name, kills in zip(arguments.cases, shares, strict=True)
        ]
    exact = all(case["is_bit_exact"] for case in found)
    path = write_result(
        "killed", {"kills": sum(len(c["kills"]) for c in found), "is_bit_exact": exact, "cases": found}
    )
    print(f"{path}: {'bit-exact' if exact else 'NOT bit-exact'}")
    raise SystemExit(not exact)


def kill_case(name: str, kills: int, generator: random.Random, folder: Path) -> dict[str, Any]:
    """Train one case undisturbed, and then killed so many times."""
    case = CASES[name]
    recipe = make_recipe(case)
    folder.mkdir()
    seconds = run_attempt(recipe, case.processes, folder / "undisturbed", folder / "log", None)
    points, differences, k = [], [], 0
    while len(points) < kills:
        run, k = folder / f"killed-{k}", k + 1
        while not (run / "report.html").exists():
            limit = generator.uniform(0.05, 0.9) * seconds if len(points) < kills else None
            if run_attempt(recipe, case.processes, run, folder / "log", limit) is None:
                points.append({"seconds": round(limit, 2), **state_of(run)})
                print(name, points[-1], flush=True)
        differences += compare(run, folder / "undisturbed")
        print(name, f"{len(points)} kills:", differences[:3] or "bit-exact", flush=True)
    return {
        "name": name,
        "about": case.about,
        "processes": case.processes,
        "undisturbed_seconds": round(seconds, 1),
        "runs_killed": k,
        "kills": points,
        "is_bit_exact": not differences,
        "differences": differences[:10],
    }


def make_recipe(case: Case) -> Recipe:
    """Give a recipe on the committed sample: a dozen optimizer steps an epoch, the last of them short."""
    data = {"dataset": str(SAMPLE), "batch_size": 5 // case.processes, **case.sections.get("data", {})}
    return tiny_recipe(**{**case.sections, "data": data, "training": PLAN})


def run_attempt(recipe: Recipe, processes: int, run: Path, log: Path, limit: float | None) -> float | None:
    """Train, going on with what is there, and kill it after `limit` seconds.

    The clock of a launched training starts with its first step: starting its processes takes longer than all of it.

    Returns:
        The seconds that it took, None if it was killed.
    """
    steps = run / "memory.jsonl"
    size = steps.stat().st_size if steps.exists() else 0
    pid = (fork if processes == 1 else launch)(recipe, run, log)
    started = time.monotonic() if processes == 1 else None
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            break
        if started is None and steps.exists() and steps.stat().st_size > size:
            started = time.monotonic()
        if limit is not None and started is not None and time.monotonic() > started + limit:
            kill_tree(pid)
            os.waitpid(pid, 0)
            return None
        time.sleep(0.005)
    code = os.waitstatus_to_exitcode(status)
    if code:
        raise SystemExit(f"The training failed with exit code {code}:\n{log.read_text()[-20_000:]}")
    return time.monotonic() - (started or time.monotonic())


def fork(recipe: Recipe, run: Path, log: Path) -> int:
    """Train in a forked process, which needn't import anything first."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        train(recipe, run, resume=(run / "recipe.json").exists())
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def launch(recipe: Recipe, run: Path, log: Path) -> int:
    """Train on two processes, as a user does."""
    file = run.with_suffix(".recipe.json")
    recipe.save(file)
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.launch", *LAUNCH, "--main_process_port", str(port)]
    script = [str(ROOT / "hf_vla/train.py"), str(file), "--output", str(run), "--anyway"]
    resume = ["--resume"] if (run / "recipe.json").exists() else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with log.open("w") as output:
        return subprocess.Popen([*command, *script, *resume], env=environment, stdout=output, stderr=output).pid


def kill_tree(pid: int) -> None:
    """Send SIGKILL to a process and to all that it has started."""
    children = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    waiting = [pid]
    while waiting:
        process = waiting.pop(0)
        waiting += children.get(process, [])
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def state_of(run: Path) -> dict[str, Any]:
    """Say what a kill has left."""
    whole = [int(path.name.partition("-")[2]) for path in run.glob("checkpoint-*")]
    return {
        "run_was_open": (run / "recipe.json").exists(),
        "newest_checkpoint": max(whole, default=None),
        "left_unfinished": [path.name for path in run.glob("unfinished-*")],
        "training_had_ended": (run / "model").exists(),
    }


def compare(run: Path, expected: Path) -> list[str]:
    """Name what differs between two runs, in the log and in the weights."""
    found = [f"log: {a} and not {b}" for a, b in zip_longest(read_log(run), read_log(expected)) if a != b]
    weights, wanted = (dict(load_checkpoint(r / "model")[0].named_parameters()) for r in (run, expected))
    if weights.keys() != wanted.keys():
        return [*found, f"weights: {sorted(weights.keys() ^ wanted.keys())}"]
    return [*found, *(f"weights: {n}" for n, tensor in weights.items() if not torch.equal(tensor, wanted[n]))]


def read_log(run: Path) -> list[dict[str, Any]]:
    """Give a run's log without times and measured memory."""
    return [
        {k: v for k, v in entry.items() if not k.endswith(("_runtime", "_second")) and not k.startswith("memory/")}
        for entry in json.loads((run / "log_history.json").read_text())
    ]


if __name__ == "__main__":
    main()
