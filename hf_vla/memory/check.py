"""One line of the checklist before a training: what was looked at, what was found, what to do."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from hf_vla.recipe import RecipeError

MARKS = {"ok": "✓", "warn": "!", "fail": "✗"}


@dataclass(frozen=True)
class Check:
    """One thing looked at; `fail` keeps a training from starting, `warn` is for its user to judge."""

    status: Literal["ok", "warn", "fail"]
    title: str
    detail: str
    advice: str = ""
    """What to do; empty where nothing is to be done."""

    def __str__(self) -> str:
        advice = f"\n    → {self.advice}" if self.advice else ""
        return f"{MARKS[self.status]} {self.title}: {self.detail}{advice}"


def format_checks(checks: Sequence[Check]) -> str:
    """Lay out checks for people, a line each and one below for what to do."""
    return "\n".join(map(str, checks))


def checks_to_json(checks: Sequence[Check]) -> str:
    """Lay out checks for programs: the worst status, then each check's fields."""
    worst = max((check.status for check in checks), key=list(MARKS).index, default="ok")
    return json.dumps({"status": worst, "checks": [asdict(check) for check in checks]}, indent=2, ensure_ascii=False)


def refuse_on_failure(checks: Sequence[Check]) -> None:
    """Stop here if a check failed.

    Raises:
        RecipeError: lists every failed check with what to do about it.
    """
    failed = [check for check in checks if check.status == "fail"]
    if failed:
        raise RecipeError(
            f"the recipe can't be trained here as it stands; {len(failed)} of {len(checks)} checks failed:\n"
            + format_checks(failed)
        )
