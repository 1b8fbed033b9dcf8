"""Train, or build a cache, in two processes, and note how long they would wait for each other; by test_patience.py."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from hf_vla.caching import build_caches
from hf_vla.recipe import load_recipe
from hf_vla.train import train


def main(work: str, folder: Path) -> None:
    torch.set_num_threads(1)
    recipe = load_recipe(folder / "recipe.json")
    if work == "train":
        train(recipe, folder / "run")
    else:
        build_caches(recipe, folder / "cache")
    patience = dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout
    (folder / f"seconds-{dist.get_rank()}").write_text(str(patience.total_seconds()))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
