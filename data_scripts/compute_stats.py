"""Compute the statistics of LeRobot datasets in one pass, and write them where a dataset's own are missing or wrong.

    python data_scripts/compute_stats.py datasets/bridge
    python data_scripts/compute_stats.py datasets/bridge datasets/more --merged merged_stats.json --no-write

Rows are read a file at a time, so memory stays the same whatever the dataset's size. Mean, std, min and max are exact; of a
quantile, the error of its rank is said, and 0 up to some 16,000 rows. Pictures keep the statistics that they have.
"""

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from hf_vla.data.running_stats import RunningStats, stats_of_files
from hf_vla.sample import ACTION, STATE


def main(
    dataset: Annotated[list[Path], typer.Argument(help="Folders of LeRobot datasets.")],
    merged: Annotated[Path | None, typer.Option(help="File for the statistics of all of them together.")] = None,
    write: Annotated[bool, typer.Option(help="Write each dataset's into its meta/stats.json.")] = True,
) -> None:
    """Compute the statistics of state, action and other vectors."""
    try:
        counted = {folder: compute(folder) for folder in dataset}
        together = merge(counted) if merged is not None or len(counted) > 1 else {}
        for folder, stats in counted.items():
            if write:
                write_stats(folder / "meta/stats.json", stats)
        if merged is not None:
            merged.write_text(json.dumps({key: stats.stats() for key, stats in together.items()}, indent=4) + "\n")
    except (ValueError, OSError) as error:
        Console(stderr=True).print(f"[bold red]Not computed:[/] {error}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    for name, stats in [*((str(folder), stats) for folder, stats in counted.items()), ("together", together)]:
        if stats:
            show(name, stats)


def compute(folder: Path) -> dict[str, RunningStats]:
    """Read every row of a dataset once.

    Raises:
        FileNotFoundError, ValueError: if it has no rows, or none of states and actions.
    """
    files = sorted((folder / "data").rglob("*.parquet"))
    if not files:
        raise FileNotFoundError(f"{folder}: no parquet file is in data/; give the folder of a LeRobot dataset.")
    counted = stats_of_files(track(files, folder.name, transient=True))
    missing = [key for key in (STATE, ACTION) if key not in counted]
    if missing:
        raise ValueError(
            f"{folder}: data/ holds no rows of {' and '.join(missing)}; is it a LeRobot dataset, and whole?"
        )
    return counted


def merge(counted: dict[Path, dict[str, RunningStats]]) -> dict[str, RunningStats]:
    """Put the statistics of several datasets together, as if their rows were one dataset's.

    Raises:
        ValueError: where a column has other dimensions in another dataset.
    """
    together: dict[str, RunningStats] = {}
    for folder, stats in counted.items():
        for key in (STATE, ACTION):
            ours = together.setdefault(key, RunningStats(stats[key].dimensions))
            if ours.dimensions != stats[key].dimensions:
                raise ValueError(
                    f"{folder}: {key} has {stats[key].dimensions} dimensions, and {ours.dimensions} in the datasets before: "
                    "statistics of both together mean nothing."
                )
            ours.merge(stats[key])
    return together


def write_stats(file: Path, counted: dict[str, RunningStats]) -> None:
    """Replace the statistics of vectors, keep those of pictures; the file is the old one or the new one at any time."""
    known = json.loads(file.read_text()) if file.is_file() else {}
    aside = file.with_suffix(".json.tmp")
    aside.write_text(json.dumps(known | {key: stats.stats() for key, stats in counted.items()}, indent=4) + "\n")
    aside.replace(file)


def show(name: str, counted: dict[str, RunningStats]) -> None:
    """Lay out state and action."""
    for key in (STATE, ACTION):
        stats = counted[key].stats()
        title = f"{name}: {key}, {counted[key].count} rows, quantiles within {counted[key].rank_error:.2%} of rank"
        table = Table("", "mean", "std", "min", "q01", "q99", "max", title=title, title_justify="left")
        for d in range(counted[key].dimensions):
            table.add_row(
                str(d), *(f"{np.ravel(stats[n])[d]:.4g}" for n in ("mean", "std", "min", "q01", "q99", "max"))
            )
        Console().print(table)


if __name__ == "__main__":
    typer.run(main)
