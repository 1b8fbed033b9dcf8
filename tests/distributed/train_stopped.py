"""Train in two processes, of which one comes late and is asked to stop, and note how each ended; by test_stopped.py."""

import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import TrainerCallback

import hf_vla.run
import hf_vla.train
from hf_vla.prepare import build_trainer
from tests.tiny_run import tiny_recipe

ASKED, AT_STEP = 1, 2
"""Which rank is asked, and while how many steps are done."""
LATE = 5
"""Seconds by which the second rank looks for a run later than the first, which could have begun it by then."""
check_directory = hf_vla.run.check_directory


class Scheduler(TrainerCallback):
    """Sends this process the signal."""

    def on_step_begin(self, args, state, control, **kwargs):
        if dist.get_rank() == ASKED and state.global_step == AT_STEP:
            os.kill(os.getpid(), signal.SIGTERM)


def come_late(*args):
    time.sleep(LATE * dist.get_rank())
    check_directory(*args)


def build(*args):
    trainer = build_trainer(*args)
    trainer.add_callback(Scheduler())
    return trainer


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    hf_vla.train.build_trainer, hf_vla.run.check_directory = build, come_late
    try:
        hf_vla.train.train(tiny_recipe(training={"max_steps": 20}), folder / "run")
    except SystemExit as exit:
        (folder / f"code-{dist.get_rank()}").write_text(str(exit.code))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
