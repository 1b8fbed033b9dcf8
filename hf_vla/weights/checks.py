"""What every loader refuses: unknown config keys, and weights that aren't exactly those that the config asks for."""

import difflib
from collections.abc import Collection, Iterable, Mapping

Shapes = Mapping[str, tuple[int, ...]]


def check_keys(given: Iterable[str], allowed: Iterable[str], where: str) -> None:
    """Refuse config keys that would be ignored without a word.

    Raises:
        ValueError: names the key and the nearest one that exists.
    """
    allowed = sorted(allowed)
    for key in given:
        if key not in allowed:
            near = difflib.get_close_matches(key, allowed, n=1, cutoff=0.5)
            hint = f"Did you mean {near[0]!r}?" if near else f"Allowed: {', '.join(allowed)}."
            raise ValueError(f"{where}: unknown config key {key!r}. {hint}")


def check_shapes(wanted: Shapes, found: Shapes, where: str) -> None:
    """Refuse weights of which any is missing, unexpected or of another shape.

    Raises:
        ValueError: as `check_nothing_wrong`.
    """
    reshaped = [
        f"{name} {found[name]} instead of {shape}" for name, shape in wanted.items() if found.get(name, shape) != shape
    ]
    check_nothing_wrong(wanted.keys() - found.keys(), found.keys() - wanted.keys(), reshaped, where)


def check_nothing_wrong(
    missing: Collection[str], unexpected: Collection[str], reshaped: Collection[str], where: str
) -> None:
    """Refuse weights that don't match a config.

    Raises:
        ValueError: lists the first few names of each kind, and counts the rest.
    """
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped}
    said = [f"{len(names)} {problem}: {some(names)}" for problem, names in problems.items() if names]
    if said:
        raise ValueError(f"{where} doesn't hold the weights that its config asks for. " + "; ".join(said) + ".")


def some(names: Collection[str], limit: int = 5) -> str:
    """List names for an error message: the first few, and how many more there are."""
    shown = ", ".join(sorted(names)[:limit])
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown
