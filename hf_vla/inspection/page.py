"""The page of an inspection: findings, pairs of pictures, and histograms, in one file that needs no other.

Letters: D dimensions.
"""

import base64
import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from hf_vla.inspection.number_checks import Vector
from hf_vla.inspection.recordings import Recordings

BINS = 40
WIDEST = 176
"""Pixels of a picture's longer side on the page."""
ROWS_OF_PAIRS = 12


class Histogram(NamedTuple):
    """How often one dimension takes which values."""

    name: str
    bars: list[tuple[float, float, float]]
    """Left edge, width and height of each, in a box of 100 x 40."""
    low: str
    high: str
    mean: str
    std: str
    outside: str
    """Share that lies beyond the box, which spans q01 to q99 and half as much again."""


class Pair(NamedTuple):
    """One moment of an episode, as every camera saw it."""

    where: str
    pictures: list[str | None]
    """Data URIs; None where it couldn't be decoded."""


def write_page(recordings: Recordings, output: Path) -> Path:
    """Write the page and return its path."""
    counts = {level: sum(f.level == level for f in recordings.findings) for level in ("error", "warning", "note")}
    page = _template().render(
        recordings=recordings,
        counts=counts,
        cameras=list(recordings.seen),
        pairs=pairs(recordings),
        vectors=[(vector.key, histograms(vector)) for vector in recordings.vectors],
        lengths=length_bars(recordings.lengths),
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page, encoding="utf-8")
    return output


def pairs(recordings: Recordings) -> list[Pair]:
    """Lay pictures of one moment side by side, episodes in turn so that many are seen."""
    cameras = list(recordings.seen)
    episodes = list(dict.fromkeys(name for camera in cameras for name in recordings.seen[camera]))
    moments = [(name, k) for k in range(4) for name in episodes]
    rows = []
    for name, k in moments:
        shown = [_at(recordings.seen[camera].get(name, []), k) for camera in cameras]
        if any(picture is not None for picture in shown):
            rows.append(Pair(f"episode {name}, look {k + 1}", [None if p is None else _uri(p) for p in shown]))
    return sorted(rows[:ROWS_OF_PAIRS], key=lambda pair: pair.where) if rows else []


def histograms(vector: Vector) -> list[Histogram]:
    """Count the values of every dimension."""
    return [_histogram(name, vector.values[:, d]) for d, name in enumerate(vector.names)]


def _histogram(name: str, values: np.ndarray) -> Histogram:
    finite = values[np.isfinite(values)].astype(np.float64)
    if not len(finite):
        return Histogram(name, [], "", "", "", "", "all aren't finite")
    low, high = np.quantile(finite, [0.01, 0.99])
    margin = (high - low) / 4 or max(abs(low) * 0.01, 1e-6)
    low, high = low - margin, high + margin
    counts, _ = np.histogram(finite, BINS, (low, high))
    tallest = max(counts.max(), 1)
    bars = [(100 * i / BINS, 100 / BINS, 40 * count / tallest) for i, count in enumerate(counts)]
    outside = 1 - counts.sum() / len(values)
    return Histogram(
        name,
        bars,
        f"{low:.3g}",
        f"{high:.3g}",
        f"{finite.mean():.3g}",
        f"{finite.std():.3g}",
        f"{outside:.2%}" if outside else "",
    )


def length_bars(lengths: list[int]) -> Histogram | None:
    """Count episodes by length."""
    if not lengths:
        return None
    counts, edges = np.histogram(lengths, min(BINS, max(1, len(set(lengths)))))
    bars = [(100 * i / len(counts), 100 / len(counts), 40 * n / max(counts.max(), 1)) for i, n in enumerate(counts)]
    return Histogram(
        "steps", bars, f"{edges[0]:.0f}", f"{edges[-1]:.0f}", f"{np.mean(lengths):.4g}", f"{np.std(lengths):.3g}", ""
    )


def _at(pictures: list[np.ndarray], k: int) -> np.ndarray | None:
    return pictures[k] if k < len(pictures) else None


def _uri(picture: np.ndarray) -> str:
    image = Image.fromarray(picture)
    image.thumbnail((WIDEST, WIDEST))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _template():
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2")
