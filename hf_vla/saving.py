"""Checkpoints of a run: written whole or not at all, the newest and the best kept, an unfinished one never gone on from.

A checkpoint is written aside, as `unfinished-<step>`. When all of it is on disk and can be opened, a list of its files and
their sizes is added, and it is moved to `checkpoint-<step>`; a kill at any moment leaves the one or the other.
"""

import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from hf_vla.run import write_json

CONTENTS = "contents.json"
"""File of a whole checkpoint that names all others, each with its size in bytes."""

_WHOLE = re.compile(r"checkpoint-(\d+)")
_ASIDE = "unfinished-"
_TORCH_WRITER = "inline_container"
"""Is in what torch.save says of a file that it can't write: a RuntimeError, as much else is."""


class Found(NamedTuple):
    """Where a run can go on from."""

    checkpoint: Path | None
    """The newest whole checkpoint; None where there is none."""
    skipped: list[str]
    """What lies beside it and can't be gone on from, and why."""


def place(run: Path, step: int) -> Path:
    """Give the folder of a whole checkpoint."""
    return run / f"checkpoint-{step}"


def aside(run: Path, step: int) -> Path:
    """Give the folder that a checkpoint is written into."""
    return run / f"{_ASIDE}{step}"


def begin(run: Path, step: int) -> None:
    """Make the empty folder that a checkpoint is written into."""
    shutil.rmtree(aside(run, step), ignore_errors=True)
    aside(run, step).mkdir(parents=True)


@contextmanager
def said_plainly(run: Path) -> Iterator[None]:
    """Turn each library's words for a file that it can't write into ones that say what to do.

    Raises:
        OSError: of a disk that is full, most often.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and _TORCH_WRITER not in str(error):
            raise
        reason = str(error).partition("\n")[0]
        raise OSError(
            f"{run} can't be written into ({reason}). Make room there, then go on by --resume: checkpoints that were "
            "whole before are so still."
        ) from None


def finish(run: Path, step: int) -> None:
    """Check what was written aside, and move it to its place.

    Raises:
        OSError: for a file that can't be opened again.
    """
    folder = aside(run, step)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    for path in files:
        _check_opens(path)
        _to_disk(path)
    write_json(folder / CONTENTS, {str(path.relative_to(folder)): path.stat().st_size for path in files})
    _to_disk(folder / CONTENTS)
    _remove(place(run, step))
    folder.rename(place(run, step))
    _to_disk(run)


def find(run: Path) -> Found:
    """Find the newest whole checkpoint of a run."""
    skipped = [f"{path.name} was still being written" for path in sorted(run.glob(f"{_ASIDE}[0-9]*"))]
    for checkpoint in reversed(_checkpoints(run)):
        trouble = what_is_missing(checkpoint)
        if trouble is None:
            return Found(checkpoint, skipped)
        skipped.append(f"{checkpoint.name} isn't whole: {trouble}")
    return Found(None, skipped)


def what_is_missing(checkpoint: Path) -> str | None:
    """Say what keeps a checkpoint from being whole; None if nothing does."""
    try:
        contents = json.loads((checkpoint / CONTENTS).read_text())
    except (OSError, ValueError):
        return f"it has no readable {CONTENTS}, which is written last"
    for name, size in contents.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes and not {size}"
    return None


def keep(run: Path, newest: int | None, best: str | None) -> None:
    """Remove all checkpoints but the newest ones and the best; None keeps all.

    Args:
        run: its directory.
        newest: how many to keep, at least 1.
        best: folder of the one that is kept beside them.
    """
    for leftover in run.glob(f"{_ASIDE}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    if newest:
        for checkpoint in _checkpoints(run)[: -max(newest, 1)]:
            if best is None or checkpoint.name != Path(best).name:
                _remove(checkpoint)


def _checkpoints(run: Path) -> list[Path]:
    steps = {path: _WHOLE.fullmatch(path.name) for path in run.glob("checkpoint-*") if path.is_dir()}
    return sorted((path for path, step in steps.items() if step), key=lambda path: int(steps[path][1]))


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint in such a way that a kill never leaves half of one in its place."""
    if checkpoint.exists():
        leftover = checkpoint.with_name(f"{_ASIDE}removed-{checkpoint.name}")
        shutil.rmtree(leftover, ignore_errors=True)
        checkpoint.rename(leftover)
        shutil.rmtree(leftover, ignore_errors=True)


def _check_opens(path: Path) -> None:
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt"):
                pass
        elif path.suffix in (".pt", ".pth"):
            zipfile.ZipFile(path).close()
        elif path.suffix == ".json":
            json.loads(path.read_text())
    except (SafetensorError, zipfile.BadZipFile, ValueError) as error:
        raise OSError(
            f"{path}: was written and can't be opened again ({error}). Is the disk full, or failing?"
        ) from None


def _to_disk(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
