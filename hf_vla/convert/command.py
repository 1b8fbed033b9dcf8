"""The common half of the conversion scripts: what a person sees while it runs, and one line where it can't."""

from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hf_vla.convert.convention import load_convention
from hf_vla.convert.episode import Source
from hf_vla.convert.parts import Settings, Tally, convert

Store = Literal["image", "h264", "av1"]

_SHOWN = 20
"""Skipped episodes that are named on the terminal; `meta/recording.json` has all."""


def run(
    open_source: Callable[[], Source],
    out: Path,
    convention: str,
    task: str | None,
    store: Store,
    skip_broken: bool,
    workers: int,
) -> None:
    """Convert with a progress bar; whatever the user can mend ends in one line and exit code 1."""
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        settings = Settings(load_convention(convention), task, store, skip_broken)
        with Progress(*columns, console=console) as progress:
            bars = {step: progress.add_task(f"{step} (files)", total=None) for step in ("convert", "merge")}
            tally = convert(
                open_source(),
                out,
                settings,
                workers,
                lambda step, n, of: progress.update(bars[step], completed=n, total=of),
            )
    except (ValueError, OSError, ImportError) as error:
        _fail(str(error))
    except BrokenProcessPool:
        _fail("a worker was killed, out of memory perhaps; run the same command again, with fewer --workers.")
    _say(console, out, tally)


def _fail(reason: str) -> None:
    Console(stderr=True).print(f"[bold red]Not converted:[/] {reason}", highlight=False, soft_wrap=True)
    raise typer.Exit(1) from None


def _say(console: Console, out: Path, tally: Tally) -> None:
    console.print(f"Converted into {out}: {tally.episodes} episodes, {tally.frames} frames.", soft_wrap=True)
    if tally.skipped:
        console.print(f"{len(tally.skipped)} episodes were left out (all named in meta/recording.json):")
        for line in tally.skipped[:_SHOWN]:
            console.print(f"  {line}", soft_wrap=True, highlight=False)
