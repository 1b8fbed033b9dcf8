"""Convert a LeRobot dataset of format v2.0 or v2.1 into a LeRobotDataset v3.0 folder, without encoding anything again.

    python data_scripts/lerobot_to_v3.py datasets/old --out datasets/new

hf_vla reads all three formats as they are; this is for LeRobot 0.4 and others that read v3.0 alone.
"""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from hf_vla.convert.lerobot_v2 import to_v3


def main(
    source: Annotated[Path, typer.Argument(help="Folder of the dataset.")],
    out: Annotated[Path, typer.Option(help="Folder to make; must not exist.")],
) -> None:
    """Convert a LeRobot dataset of format v2.0 or v2.1 into a LeRobotDataset v3.0 folder."""
    try:
        with Progress() as progress:
            bar = progress.add_task("convert (episodes)", total=None)
            to_v3(source, out, lambda done, of: progress.update(bar, completed=done, total=of))
    except (ValueError, OSError, ImportError) as error:
        Console(stderr=True).print(f"[bold red]Not converted:[/] {error}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    Console().print(f"Converted into {out}.", soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
