"""Convert HDF5 recordings (LIBERO, robomimic, ALOHA) into a LeRobotDataset v3.0 folder.

    python data_scripts/hdf5_to_lerobot.py libero_spatial --convention libero_hdf5 --out datasets/libero_spatial
    python data_scripts/hdf5_to_lerobot.py aloha_cups --convention aloha --task "stack the cups" --out datasets/cups

A convention says which columns are what: `hf_vla/convert/conventions/` has those that are known, and a copy of one, changed,
is as good. Killed, or with the disk full, the same command goes on with what is left to do.
"""

import os
from pathlib import Path
from typing import Annotated

import typer

from hf_vla.convert.command import Store, run


def main(
    source: Annotated[Path, typer.Argument(help="Folder of .hdf5 or .h5 files, or one of them.")],
    out: Annotated[Path, typer.Option(help="Folder to make; must not exist.")],
    convention: Annotated[str, typer.Option(help="Name of a known one, or a YAML file.")],
    task: Annotated[str | None, typer.Option(help="Instruction of episodes that have none.")] = None,
    store: Annotated[
        Store, typer.Option(help="Pictures as files embedded in the rows, or as mp4 beside them.")
    ] = "image",
    skip_broken: Annotated[
        bool, typer.Option("--skip-broken", help="Leave out what can't be used, and count it.")
    ] = False,
    workers: Annotated[int, typer.Option(min=1, help="Files at a time.")] = os.cpu_count() or 1,
) -> None:
    """Convert HDF5 recordings into a LeRobotDataset v3.0 folder."""
    run(lambda: _open(source), out, convention, task, store, skip_broken, workers)


def _open(source: Path):
    try:
        from hf_vla.convert.hdf5 import HDF5Source
    except ModuleNotFoundError:
        raise ModuleNotFoundError("HDF5 files are read with h5py: pip install 'hf-vla[hdf5]'.") from None
    return HDF5Source(source)


if __name__ == "__main__":
    typer.run(main)
