"""Convert an RLDS dataset (TFRecord files: Open X-Embodiment, BridgeData V2, LIBERO) into a LeRobotDataset v3.0 folder.

    python data_scripts/rlds_to_lerobot.py bridge_dataset/1.0.0 --convention bridge --out datasets/bridge

Tensorflow isn't needed. A convention says which columns are what: `hf_vla/convert/conventions/` has those that are known,
and a copy of one, changed, is as good. Killed, or with the disk full, the same command goes on with what is left to do.
"""

import os
from pathlib import Path
from typing import Annotated

import typer

from hf_vla.convert.command import Store, run
from hf_vla.convert.rlds import RLDSSource


def main(
    source: Annotated[Path, typer.Argument(help="Folder with features.json and *.tfrecord-* files.")],
    out: Annotated[Path, typer.Option(help="Folder to make; must not exist.")],
    convention: Annotated[str, typer.Option(help="Name of a known one, or a YAML file.")],
    split: Annotated[str, typer.Option(help="Whose files are converted.")] = "train",
    task: Annotated[str | None, typer.Option(help="Instruction of episodes that have none.")] = None,
    store: Annotated[
        Store, typer.Option(help="Pictures as files embedded in the rows, or as mp4 beside them.")
    ] = "image",
    skip_broken: Annotated[
        bool, typer.Option("--skip-broken", help="Leave out what can't be used, and count it.")
    ] = False,
    workers: Annotated[int, typer.Option(min=1, help="Files at a time.")] = os.cpu_count() or 1,
) -> None:
    """Convert an RLDS dataset into a LeRobotDataset v3.0 folder."""
    run(lambda: RLDSSource(source, split), out, convention, task, store, skip_broken, workers)


if __name__ == "__main__":
    typer.run(main)
