"""Stop in the middle of a backward that can't be run again, on one of two ranks; called by test_restart.py."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import TrainerCallback

import hf_vla.train
from hf_vla.train import build_trainer, is_restarted, train
from tests.tiny_run import tiny_recipe

RECIPE = tiny_recipe(
    model={"fusion": {"dropout": 0.1}, "head": {"type": "flow"}},
    memory={"optimizer_in_backward": True},
    training={"max_steps": 4, "save_steps": 2, "max_grad_norm": 0.0, "lr_scheduler_type": "linear"},
)


class ShortOfMemory(TrainerCallback):
    """Lets the backward of the fourth step fail, long after it was proven to fit: another process has come."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 3:
            model.model.fusion.register_forward_hook(self.watch)

    def watch(self, module, inputs, context):
        context.register_hook(self.fail)

    def fail(self, gradient):
        raise torch.OutOfMemoryError("injected")


def build_short_trainer(recipe, output):
    trainer = build_trainer(recipe, output)
    trainer.add_callback(ShortOfMemory())
    return trainer


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    if not is_restarted():
        train(RECIPE, folder / "undisturbed")
        if os.environ["RANK"] == "1":
            hf_vla.train.build_trainer = build_short_trainer
    train(RECIPE, folder / "run")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
