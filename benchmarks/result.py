"""The result file of a benchmark: what was measured, and with what."""

import functools
import sys
from pathlib import Path
from typing import Any

from hf_vla import run

RESULTS = Path(__file__).parent / "results"


def write_result(name: str, results: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write a benchmark's results behind its command, machine, versions, commit and date, and return the file."""
    facts = _facts()
    header = {
        "command": " ".join([f"python -m benchmarks.{Path(sys.argv[0]).stem}", *map(_without_folder, sys.argv[1:])]),
        "date": facts["started"][:10],
        "commit": facts["commit"],
        "machine": facts["machine"],
        "versions": facts["versions"],
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    run.write_json(path, header | results)
    return path


@functools.cache
def _facts() -> dict[str, Any]:
    """Describe this process as it was before its first result, which changes the working tree."""
    return run.describe_process()


def _without_folder(word: str) -> str:
    """Keep the last part of an absolute path: the rest says something about one machine only."""
    key, equals, value = word.rpartition("=")
    return key + equals + (Path(value).name if Path(value).is_absolute() else value)
