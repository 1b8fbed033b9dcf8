"""Begin a run, or go on with it, in as many processes as there are, and note which samples each sees; by test_resized.py."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from hf_vla import run, saving
from hf_vla.prepare import build_trainer
from hf_vla.recipe import Recipe
from tests.tiny_run import tiny_recipe

STOP = 2
"""Steps after which a begun run ends, in its first epoch."""


def recipe_of(dataset: Path, processes: int, streaming: bool) -> Recipe:
    """33 samples, 6 of them a step whatever the processes: 6 steps an epoch, the last of them short."""
    data = {"dataset": str(dataset), "batch_size": 3, "eval_fraction": 0.0}
    training = {"max_steps": -1, "num_train_epochs": 2, "save_steps": STOP}
    return tiny_recipe(
        data={**data, "streaming": streaming, "shuffle_episodes": 2},
        training={**training, "gradient_accumulation_steps": 2 // processes},
    )


def train_part(recipe: Recipe, directory: Path, begins: bool) -> list[tuple[int, int, int]]:
    """Train this process's share, up to STOP or from its checkpoint on, and list each sample that counted, by epoch."""
    trainer, seen = build_trainer(recipe, directory), []
    collate = trainer.data_collator

    def note(samples):
        epoch = trainer.batches.epoch
        seen.extend((epoch, s.episode_index, s.frame_index) for s in samples if not s.action_is_pad.all())
        return collate(samples)

    trainer.data_collator = note
    if begins:
        trainer.args.max_steps = STOP
        if trainer.is_world_process_zero():
            run.open_run(directory, recipe)
    trainer.train(resume_from_checkpoint=None if begins else str(saving.find(directory).checkpoint))
    return seen


def main(folder: Path, dataset: Path) -> None:
    torch.set_num_threads(1)
    for streaming in (False, True):
        for begins in (True, False):
            directory = folder / f"{'from' if begins else 'to'}-two-{streaming}"
            seen = train_part(recipe_of(dataset, 2, streaming), directory, begins)
            (directory / f"two-{dist.get_rank()}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
