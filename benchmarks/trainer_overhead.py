"""What do our Trainer, and transformers' own, cost beside a bare PyTorch loop: same model, data and optimizer, in turns?

    OMP_NUM_THREADS=1 python -m benchmarks.trainer_overhead

The bare loop does what any loop must: torch's own loader, forward, backward, clipping, update, schedule. Beside that
transformers' Trainer calls back, logs every tenth step and knows where it stands; ours can also run a step again in pieces,
go on from any step after a kill, and watches memory. Time is the processor time of this process, so that others on the
machine don't count; the wall's is beside it. Each turn is set beside the bare one of its round, and the median of these
differences counts, since a processor isn't equally fast all the time.
"""

import argparse
import itertools
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from unittest import mock

import torch
from accelerate import optimizer as accelerate_optimizer
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer

from benchmarks.cache_cases import BATCH, SIZES, WAYS, make_case
from benchmarks.clocks import Moment, lengths, now, step_lengths
from benchmarks.result import RESULTS, write_result
from hf_vla.caching import build_caches, with_cache
from hf_vla.memory.monitor import MemoryMonitor
from hf_vla.prepare import build_trainer
from hf_vla.trainer import VLATrainer

STEPS, ROUNDS = 51, 10
"""Steps of a turn, of which the first isn't counted, and turns of each. The first ten are slower: caches are cold."""
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
    trainer.watch_memory(MemoryMonitor(folder / f"run_{is_cached}"))
    plain = Trainer(trainer.bare_model(), trainer.args, trainer.data_collator, trainer.train_dataset)
    loader = DataLoader(trainer.train_dataset, BATCH, shuffle=True, drop_last=True, collate_fn=trainer.data_collator)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    turns = []
    for _ in range(rounds):
        steps = {"trainer": step_lengths(trainer)}
        ours = plain.model.__dict__.pop("zero_grad")  # ours put the optimizer's in the place of the model's own
        with accelerate_as_it_is():
            steps["transformers"] = step_lengths(plain)
        plain.model.zero_grad = ours
        steps["bare"] = lengths(list(bare_loop(trainer, batches)))
        turns.append(
            {loop: Moment(*map(statistics.median, zip(*taken, strict=True))) for loop, taken in steps.items()}
        )
    milliseconds = {
        f"{loop}_ms": round(1000 * statistics.median(turn[loop].processor for turn in turns), 2) for loop in turns[0]
    }
    found = {loop: overhead(turns, loop) for loop in ("trainer", "transformers")}
    return {**milliseconds, "overhead": found, "allowed": found["trainer"]["share"] <= ALLOWED}


def accelerate_as_it_is() -> AbstractContextManager:
    """Undo what hf_vla.trainer makes faster in accelerate, which others don't have."""
    changed = accelerate_optimizer.is_lomo_available
    return mock.patch.object(accelerate_optimizer, "is_lomo_available", changed.__wrapped__)


def overhead(turns: list[dict[str, Moment]], loop: str) -> dict[str, float]:
    """Say how much longer a loop's step takes than the bare one's, by the processor's clock and by the wall's."""
    more = [turn[loop].since(turn["bare"]) for turn in turns]
    return {
        "share": statistics.median(m.processor / turn["bare"].processor for m, turn in zip(more, turns, strict=True)),
        "ms": round(1000 * statistics.median(m.processor for m in more), 2),
        "share_by_wall": statistics.median(m.wall / turn["bare"].wall for m, turn in zip(more, turns, strict=True)),
    }


def bare_loop(trainer: VLATrainer, batches: Iterator[dict[str, Tensor]]) -> Iterator[Moment]:
    """Train some steps without any Trainer, and tell when each ended."""
    model, args = trainer.bare_model().train(), trainer.args
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [{name: group[name] for name in ("params", "weight_decay")} for group in trainer.optimizer.param_groups]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for batch in itertools.islice(batches, STEPS):
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, args.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield now()


if __name__ == "__main__":
    main()
