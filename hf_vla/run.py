"""One run directory: what was asked for, what ran, and what came out, in files that a person and `report.py` read."""

import datetime
import fcntl
import importlib.metadata
import json
import logging
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import torch

import hf_vla
from hf_vla.recipe import Recipe, load_recipe

RECIPE = "recipe.json"
INFO = "run.json"
MODEL = "model"
LOCK = ".lock"
FIRST_SKIPPED = 20
"""Skipped samples that are named; the others are counted."""
PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "bitsandbytes", "evaluate", "numpy")

logger = logging.getLogger(__name__)


def check_directory(directory: str | Path, resume: bool) -> None:
    """Refuse a directory that holds a run already, or one that holds none to resume.

    Raises:
        FileExistsError: if it already holds a run and `resume` is false.
        FileNotFoundError: if there is nothing to resume.
    """
    holds_run = (Path(directory) / RECIPE).exists()
    if holds_run and not resume:
        raise FileExistsError(
            f"{directory} already holds a run. Go on with it by --resume, or choose another --output; nothing was changed."
        )
    if resume and not holds_run:
        raise FileNotFoundError(f"{directory} holds no run to resume (it has no {RECIPE}).")


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """Keep a run directory, made where it isn't there yet, to this process, however that ends.

    Raises:
        FileExistsError: if another process trains in it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / LOCK).open("w") as file:
        _lock(file, directory)
        try:
            yield
        finally:
            (directory / LOCK).unlink(missing_ok=True)
            with suppress(OSError):  # it holds something, then, as it should
                directory.rmdir()


def _lock(file: TextIO, directory: Path) -> None:
    try:
        # Not flock: the loader's workers would inherit that, and hold it after a kill.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise FileExistsError(
            f"{directory}: another training is at work in it. Wait for it, end it, or choose another --output; nothing was "
            "changed."
        ) from None
    except OSError:  # a file system that has no locks
        pass


def check_finished(directory: str | Path) -> None:
    """Refuse a directory that has no trained model in it.

    Raises:
        FileNotFoundError: saying what is missing.
        ValueError: if its `run.json` is damaged.
    """
    for name, meaning in (
        (INFO, "it isn't a run directory; training writes one"),
        (f"{MODEL}/{RECIPE}", "its training hasn't ended; go on with it by --resume"),
    ):
        if not (Path(directory) / name).is_file():
            raise FileNotFoundError(f"{directory} has no {name}, so {meaning}.")
    read_info(directory)


def open_run(directory: str | Path, recipe: Recipe) -> None:
    """Make a run directory and write into it what is going to run; one that goes on may do so by another recipe."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if not (directory / RECIPE).exists():
        update_info(directory, describe_process())
    write_json(directory / RECIPE, recipe.to_dict())  # last: with it, there is a run


def describe_changes(directory: str | Path, recipe: Recipe) -> list[str]:
    """Say which keys of the recipe aren't what the run's own has; `about` changes nothing."""
    before, now = (_settings(r.to_dict()) for r in (load_recipe(Path(directory) / RECIPE), recipe))
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key) and not key.startswith("about.")]
    return [f"{key} was {json.dumps(before.get(key))} and is {json.dumps(now.get(key))}" for key in keys]


def _settings(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten a recipe's sections into dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in section.items():
        flat |= _settings(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def describe_process() -> dict[str, Any]:
    """Say what runs where: command, versions, commit, machine, time."""
    return {
        "hf_vla": hf_vla.__version__,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": git_commit(),
        "versions": {"python": platform.python_version(), **package_versions()},
        "machine": describe_machine(),
        "started": now(),
    }


def describe_machine() -> str:
    """Name the GPUs, or the CPU where there is none."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return f"{os.cpu_count()} x {platform.machine()} CPU, no GPU"


def package_versions() -> dict[str, str]:
    """Give the installed version of each package that results depend on."""
    installed = {distribution.metadata["Name"] for distribution in importlib.metadata.distributions()}
    versions = {name: importlib.metadata.version(name) for name in PACKAGES if name in installed}
    return {**versions, "torch": torch.__version__}  # with its build, as in +cu130, which its metadata leave out


def git_commit() -> str | None:
    """Give the commit of the source tree, with `+changes` where it was edited since; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=12", "--dirty=+changes"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def now() -> str:
    """Give the time as ISO 8601 in UTC, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def read_info(directory: str | Path) -> dict[str, Any]:
    """Read `run.json`; empty where there is none yet.

    Raises:
        ValueError: if it is damaged.
    """
    path = Path(directory) / INFO
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{path}: can't be read as JSON ({error}). Mend it or remove it.") from None


def update_info(directory: str | Path, changes: dict[str, Any]) -> None:
    """Merge top-level keys into `run.json`, which is never left half-written."""
    write_json(Path(directory) / INFO, {**read_info(directory), **changes})


def add_event(directory: str | Path, step: int, kind: str, text: str) -> None:
    """Append to the run's events: whatever its user should know that happened. Where it can't be written, it is logged."""
    event = {"time": now(), "step": step, "kind": kind, "text": text}
    events = read_info(directory).get("events", [])
    if not any(_same_event(event, known) for known in events):  # a run that goes on does some steps again
        try:
            update_info(directory, {"events": [*events, event]})
        except OSError as error:  # a full disk, most often: no reason to end a training
            logger.warning("Not among the events of %s (%s): %s", directory, error, text)


def _same_event(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(a[key] == b[key] for key in ("step", "kind", "text"))


def report_skipped(directory: str | Path, count: int, texts: list[str]) -> None:
    """Write how many samples were left out since the run's start, and what was wrong with the first of them."""
    known = read_info(directory).get("skipped", {}).get("first", [])
    first = [*known, *(text for text in texts if text not in known)][:FIRST_SKIPPED]
    update_info(directory, {"skipped": {"samples": count, "first": first}})


def report_left_out(directory: str | Path, faults: Sequence[str]) -> None:
    """Write how many episodes were left out when the data was opened, and what was wrong with the first of them."""
    if faults:
        update_info(directory, {"left_out": {"episodes": len(faults), "first": list(faults[:FIRST_SKIPPED])}})


def write_json(path: Path, value: Any) -> None:
    """Write JSON beside its place and move it there, so that a kill leaves the old file or the new one."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # several ranks may write at once
    try:
        aside.write_text(json.dumps(value, indent=2) + "\n")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)  # where the disk is full
