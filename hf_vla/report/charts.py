"""The charts of a report, as SVG that takes its colours from the page. The only file that imports matplotlib."""

import io
import math
import re
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import NamedTuple

from markupsafe import Markup, escape

from .run_files import Episode, Event, LogLine, MemoryLine

CHART_POINTS = 600
STROKES = {
    "ink": "#000001",
    "muted": "#000002",
    "rule": "#000003",
    "first": "#000004",
    "second": "#000005",
    "faint": "#000006",
}
"""Stand-in colours, each replaced by the CSS variable of that name, so that charts follow dark mode."""


class Line(NamedTuple):
    """One curve of a chart."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    stroke: str = "first"
    style: str = "solid"
    width: float = 1.6
    note: str = ""


class Chart(NamedTuple):
    """A drawn chart and the words around it."""

    title: str
    svg: Markup
    lines: list[Line]
    note: str = ""


def training_charts(history: list[LogLine]) -> list[Chart]:
    """Draw loss, learning rate and gradient norm over steps; only what was logged."""
    loss = [_line("training", history, "loss"), _line("held-out", history, "eval_loss", "second", "dashed")]
    charts = [
        _chart("Loss", loss, "step", width=640, height=440),
        _chart("Learning rate", [_line("Learning rate", history, "learning_rate")], "step"),
        _chart("Gradient norm", [_line("Gradient norm", history, "grad_norm")], "step"),
    ]
    return [chart for chart in charts if chart]


def episode_charts(episode: Episode) -> list[Chart]:
    """Draw recorded and predicted actions over time, one chart a dimension."""
    seconds = [frame / episode.fps for frame in range(len(episode.recorded))]
    charts = []
    for index, name in enumerate(episode.names):
        recorded = Line("recorded", seconds, [row[index] for row in episode.recorded], "faint", width=4)
        predicted = Line("predicted", seconds, [row[index] for row in episode.predicted])
        charts.append(_chart(name, [recorded, predicted], "seconds", height=190))
    return [chart for chart in charts if chart]


def memory_chart(memory: list[MemoryLine], events: list[Event]) -> Chart | None:
    """Draw measured against planned memory and the budget over steps, with a mark where memory ran out.

    Where there is no GPU it draws the host's memory that the process holds.
    """
    title = "GiB on this process's GPU"
    memory = list({line.step: line for line in memory}.values())  # a run that goes on does some steps again
    lines = [
        _line("allocated by this run, peak", memory, "allocated_peak", reduce=max, scale=2**30),
        _line("reserved by this run, peak", memory, "reserved_peak", "first", "dotted", reduce=max, scale=2**30),
        _line("used on the GPU by everyone", memory, "device_used", "muted", reduce=max, scale=2**30),
        _line("planned peak", memory, "planned_peak", "second", "dashed", reduce=max, scale=2**30),
        _line("budget", memory, "budget", "second", reduce=max, scale=2**30),
    ]
    if not any(line.x for line in lines):
        title = "GiB of host memory"
        lines = [_line("held by this process", memory, "host_rss", reduce=max, scale=2**30)]
    marks = [event.step for event in events if event.kind == "out_of_memory" and event.step is not None]
    return _chart(title, lines, "step", width=720, height=330, marks=marks)


def _line(
    label: str,
    entries: Sequence[LogLine | MemoryLine],
    key: str,
    stroke: str = "first",
    style: str = "solid",
    reduce: Callable = fmean,
    scale: float = 1,
) -> Line:
    """Take one field over steps, thinned to what a page can show; `reduce` says what stands for several values."""
    points = [(entry.step, getattr(entry, key) / scale) for entry in entries if getattr(entry, key) is not None]
    group = math.ceil(len(points) / CHART_POINTS) or 1
    groups = [points[start : start + group] for start in range(0, len(points), group)]
    y = [reduce([value for _, value in values]) for values in groups]
    note = f"Each point is the {'highest' if reduce is max else 'mean'} of {group} logged values." if group > 1 else ""
    return Line(label, [values[-1][0] for values in groups], y, stroke, style, note=note)


def _chart(
    title: str, lines: list[Line], xlabel: str, width: int = 400, height: int = 240, marks: Sequence[float] = ()
) -> Chart | None:
    """Draw the lines that have points, in CSS pixels; None if none has."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    lines = [line for line in lines if line.x]
    if not lines:
        return None
    with rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 12, "axes.edgecolor": STROKES["rule"]}
    ):
        figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
        axes = figure.subplots()
        for line in lines:
            dot = "o" if len(line.x) < 2 else None
            axes.plot(
                line.x, line.y, linestyle=line.style, color=STROKES[line.stroke], linewidth=line.width, marker=dot
            )
        for mark in marks:
            axes.axvline(mark, color=STROKES["ink"], linewidth=1)
        _dress(axes, lines, xlabel)
        file = io.BytesIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    note = max((line.note for line in lines), key=len)
    return Chart(title, _inline(file.getvalue().decode(), _alt(title, lines, xlabel)), lines, note)


def _dress(axes, lines: list[Line], xlabel: str) -> None:
    """Start the scale at 0 where no value is below, and take away what carries no number."""
    if all(value >= 0 for line in lines for value in line.y if math.isfinite(value)):
        axes.set_ylim(bottom=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="y", color=STROKES["rule"], linewidth=0.8)
    axes.tick_params(length=0, labelcolor=STROKES["muted"])
    axes.yaxis.get_offset_text().set_color(STROKES["muted"])
    axes.locator_params(axis="x", nbins=6)
    axes.set_xlabel(xlabel, color=STROKES["muted"])
    axes.margins(x=0.02)


def _inline(svg: str, alt: str) -> Markup:
    """Turn a file of matplotlib's into an element of the page: no fixed size, no second use of an id, our colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<(metadata|style).*?</\1>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="(?![mp][0-9a-f]{10}")[^"]*"', "", svg)
    box = re.search(r'viewBox="[^"]*"', svg).group()
    svg = re.sub(r"<svg[^>]*>", lambda _: f'<svg {box} role="img" aria-label="{escape(alt)}">', svg, count=1)
    for name, stand_in in STROKES.items():
        svg = svg.replace(stand_in, f"var(--{name})")
    return Markup(re.sub(r">\s+<", "><", svg))  # drawn here; its words are escaped by matplotlib and above


def _alt(title: str, lines: list[Line], xlabel: str) -> str:
    ends = [f"{line.label}: from {line.y[0]:.4g} to {line.y[-1]:.4g}" for line in lines]
    return f"Chart of {title} against {xlabel}. {'; '.join(ends)}."
