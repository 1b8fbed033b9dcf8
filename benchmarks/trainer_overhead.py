"""What does our Trainer cost beside a bare PyTorch loop: same model, same batches, same optimizer, in turns?

    OMP_NUM_THREADS=1 python -m benchmarks.trainer_overhead

The bare loop does what any loop must: forward, backward, clipping, update, schedule. Trainer also counts what is valid, can
run a step again in pieces, watches memory, logs every tenth step and knows where it stands. Time is the processor time of
this process, so that others on the machine don't count; the wall's is beside it.
"""

import argparse
import itertools
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.cache_cases import BATCH, SIZES, WAYS, make_case
from benchmarks.clocks import Moment, lengths, now, step_lengths
from benchmarks.result import RESULTS, write_result
from hf_vla.caching import build_caches, with_cache
from hf_vla.memory.monitor import MemoryMonitor
from hf_vla.prepare import build_trainer
from hf_vla.trainer import VLATrainer

STEPS, ROUNDS = 11, 6
"""Steps of a turn, of which the first isn't counted, and turns of each."""
ALLOWED = 0.05


def main() -> None:
    """Measure long steps (VGGT in each) and short ones (from caches), and write both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="turns of each loop")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the result is written")
    options = parser.parse_args()
    results = {"sizes": SIZES, "batch_size": BATCH, "allowed": ALLOWED}
    with tempfile.TemporaryDirectory() as folder:
        for way in WAYS:
            results[way] = {
                kind: measure(way, kind == "cached", options.rounds, Path(folder) / way)
                for kind in ("uncached", "cached")
            }
    print(results)
    print(f"Written: {write_result('trainer_overhead', results, options.results)}")


def measure(way: str, is_cached: bool, rounds: int, folder: Path) -> dict:
    """Let both loops take turns on the steps of one recipe."""
    recipe = make_case(way, folder)
    recipe.training |= {"max_steps": STEPS, "logging_steps": 10}
    if is_cached:
        build_caches(recipe)
    recipe = recipe if is_cached else with_cache(recipe, [])
    trainer = build_trainer(recipe, folder / f"run_{is_cached}")
    (folder / f"run_{is_cached}").mkdir(exist_ok=True)
    trainer.watch_memory(MemoryMonitor(folder / f"run_{is_cached}"))
    batches = itertools.cycle(some_batches(trainer))
    turns = {"trainer": [], "bare": []}
    for _ in range(rounds):
        turns["trainer"] += step_lengths(trainer)
        turns["bare"] += lengths(list(bare_loop(trainer, batches)))
    found = {name: [statistics.median(kind) for kind in zip(*turn, strict=True)] for name, turn in turns.items()}
    (ours, ours_wall), (bare, bare_wall) = found["trainer"], found["bare"]
    return {
        "trainer_ms": round(1000 * ours, 2),
        "bare_ms": round(1000 * bare, 2),
        "overhead": ours / bare - 1,
        "overhead_ms": round(1000 * (ours - bare), 2),
        "overhead_by_wall": ours_wall / bare_wall - 1,
        "allowed": ours / bare - 1 <= ALLOWED,
    }


def some_batches(trainer: VLATrainer) -> list[list[int]]:
    """Choose the samples of the bare loop's batches; they are loaded anew each time, as Trainer's are."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(trainer.train_dataset), generator=generator).tolist()
    return [order[i : i + BATCH] for i in range(0, len(order) - BATCH, BATCH)]


def bare_loop(trainer: VLATrainer, batches: Iterator[list[int]]) -> Iterator[Moment]:
    """Train some steps without any Trainer, and tell when each ended."""
    model, args = trainer.bare_model().train(), trainer.args
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [{name: group[name] for name in ("params", "weight_decay")} for group in trainer.optimizer.param_groups]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        batch: dict[str, Tensor] = trainer.data_collator([trainer.train_dataset[i] for i in next(batches)])
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, args.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield now()


if __name__ == "__main__":
    main()
