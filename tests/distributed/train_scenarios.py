"""Train several times on each of two ranks, memory running out on one of them; called by test_ranks_out_of_memory.py."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from hf_vla.prepare import build_trainer
from hf_vla.run import open_run
from tests.distributed.scenarios import SCENARIOS, outcome_of
from tests.faults.shortage import PLACES, Shortage


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    for name, scenario in SCENARIOS.items():
        trainer = build_trainer(scenario.recipe, folder / name)
        if rank == 0:
            open_run(folder / name, scenario.recipe)
        if rank == scenario.rank:
            shortage = Shortage(scenario.rows, lambda call, first=scenario.first: call >= first)
            PLACES[scenario.place](trainer.bare_model(), shortage)
        torch.save(outcome_of(trainer), folder / f"{name}-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
