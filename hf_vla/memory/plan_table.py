"""Plans as a person reads them at a glance: a bar for each component, the verdict, the headroom."""

from collections.abc import Sequence

from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hf_vla.memory.ladder import Candidate
from hf_vla.memory.planner import Plan
from hf_vla.memory.scenarios import GB, Scenario
from hf_vla.memory.sizes import format_size

BAR = 36
"""Characters of the longest bar: the budget, or the total where that is more."""
COLOURS = {
    "weights": "blue",
    "gradients": "yellow",
    "optimizer": "magenta",
    "activations": "green",
    "temporaries": "cyan",
    "reserve": "bright_black",
}


def render_plan(plan: Plan, title: str = "") -> RenderableType:
    """Draw a plan: components, what lies beside the tensors, total and verdict."""
    table = Table(title=title or None, title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("on each GPU")
    table.add_column("bytes", justify="right")
    table.add_column("")
    whole = max(plan.total, plan.budget or 0)
    for component, kinds in plan.components.items():
        table.add_row(component, format_size(sum(kinds.values())), _bar(kinds, whole))
    for line in plan.lines:
        table.add_row(Text(line.name, "bright_black"), format_size(line.bytes), _bar({"reserve": line.bytes}, whole))
    table.add_row(Text("total", "bold"), Text(format_size(plan.total), "bold"), _bar({}, whole))
    return Group(table, _legend(plan), _verdict(plan), *_remarks(plan))


def render_candidates(candidates: Sequence[Candidate]) -> Table:
    """List what a search found, fastest first."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading, justify in (
        ("#", "right"),
        ("samples/s", "right"),
        ("total", "right"),
        ("batch", "right"),
        ("", "left"),
    ):
        table.add_column(heading, justify=justify)
    for number, candidate in enumerate(candidates, 1):
        plan = candidate.plan
        cut = f"{plan.batch_size} x {plan.accumulation} x {plan.gpus}"
        words = Text(", ".join(candidate.rungs) or "as it is")
        if candidate.changes:
            words.append(f"  changes results: {'; '.join(candidate.changes)}", "yellow")
        table.add_row(str(number), f"{plan.samples_per_second:.1f}", format_size(plan.total), cut, words)
    return table


def render_scenarios(scenarios: Sequence[Scenario]) -> RenderableType:
    """Lay the guide's figures beside the computed ones, in the guide's GB of 10**9 bytes, and say why they differ."""
    table = Table(box=None, padding=(0, 1, 0, 0))
    for heading in (
        "GB of 10**9 bytes",
        "the guide",
        "computed",
        "weights",
        "gradients",
        "optimizer",
        "activations",
    ):
        table.add_column(heading, justify="left" if not table.columns else "right")
    for scenario in scenarios:
        kinds = {k: sum(c.get(k, 0) for c in scenario.plan.components.values()) for k in COLOURS}
        shown = [kinds["weights"], kinds["gradients"], kinds["optimizer"], kinds["activations"] + kinds["temporaries"]]
        figures = [sum(scenario.guide.values()), scenario.plan.total / GB, *(size / GB for size in shown)]
        table.add_row(scenario.name, *(f"{figure:.1f}" for figure in figures))
    reasons = [Text.assemble((scenario.name, "bold"), f": {scenario.why}") for scenario in scenarios]
    return Group(table, Text(), *reasons)


def _bar(kinds: dict[str, int], whole: int) -> Text:
    bar = Text()
    for kind, size in kinds.items():
        bar.append("█" * round(BAR * size / whole), COLOURS[kind])
    return bar


def _legend(plan: Plan) -> RenderableType:
    """Say what the colours stand for, in columns, so that no kind is parted from its size at a line's end."""
    sums = {kind: sum(kinds.get(kind, 0) for kinds in plan.components.values()) for kind in COLOURS}
    shown = [
        Text.assemble(("█ ", COLOURS[kind]), f"{kind} {format_size(size)}") for kind, size in sums.items() if size
    ]
    return Group("", Columns(shown, padding=(0, 2)))


def _verdict(plan: Plan) -> Text:
    if plan.fits is None:
        return Text("No budget: give one with --budget, or run where there is a GPU.", "yellow")
    if plan.fits:
        share = plan.headroom / plan.budget
        return Text(
            f"✓ fits {format_size(plan.budget)}; headroom {format_size(plan.headroom)} ({share:.0%})", "bold green"
        )
    return Text(f"✗ doesn't fit {format_size(plan.budget)}; {format_size(-plan.headroom)} are missing", "bold red")


def _remarks(plan: Plan) -> list[Text]:
    peaks = "  ".join(f"{phase} {format_size(size)}" for phase, size in plan.phases.items())
    cut = f"{plan.batch_size} x {plan.accumulation} x {plan.gpus} = {plan.effective_batch}"
    remarks = [
        f"Peak in {plan.peak_phase}. Tensors at their most: {peaks}",
        f"Effective batch {cut}. About {plan.samples_per_second:.1f} samples/s on {plan.gpus} x {plan.gpu}: a roofline, "
        "for comparing recipes.",
    ]
    if plan.host_bytes:
        remarks.append(f"Pinned memory of the host: {format_size(plan.host_bytes)} a GPU.")
    sources = dict.fromkeys(f"{line.name}: {line.source}." for line in plan.lines)
    return [Text(text, "bright_black") for text in (*remarks, *sources, *plan.notes)]
