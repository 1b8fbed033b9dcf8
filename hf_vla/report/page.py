"""From a run directory to `report.html`."""

import base64
import io
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from .charts import episode_charts, memory_chart, training_charts
from .findings import beats_random, listens, sees
from .run_files import Episode, LogLine, MemoryLine, Offline, Run, SeenGeometry, read_json, read_required

CONDITIONS = {
    "rollouts": "Policy",
    "rollouts_without_pictures": "Without pictures",
    "rollouts_swapped_instruction": "Other instruction",
    "rollouts_random": "Random actions",
    "rollouts_expert": "Scripted expert",
}
"""Keys of run.json and what the page calls them, in the order of its columns."""
PICTURE_BYTES = 1_700_000
"""What all contact sheets may take; base64 adds a third, and the page stays under 3 MB."""

GEOMETRY_BYTES = 300_000
"""What the pictures of views and their depth may take."""


class OfflineRow(NamedTuple):
    """One measure of the offline table, a value for each predictor; `best` are the columns that no other beats."""

    label: str
    values: dict[str, str]
    best: set[str]


class Sheet(NamedTuple):
    """One contact sheet, ready to stand in the page."""

    task: str
    uri: str


def write_report(run_dir: str | Path) -> Path:
    """Write `report.html` into a run directory and return its path.

    Raises:
        FileNotFoundError: if recipe.json or run.json is missing, without which it isn't a run.
        ValueError: if a file that is there can't be read; the message names it.
    """
    run_dir = Path(run_dir)
    recipe = read_required(run_dir / "recipe.json", dict[str, dict[str, Any]])
    run = read_required(run_dir / "run.json", Run)
    history = read_json(run_dir / "log_history.json", list[LogLine])
    memory = read_json(run_dir / "memory.jsonl", list[MemoryLine])
    episode = read_json(run_dir / "episode.json", Episode)
    geometry = read_json(run_dir / "geometry.json", SeenGeometry)
    page = _template().render(
        name=run_dir.resolve().name,
        recipe=recipe,
        run=run,
        conditions=CONDITIONS,
        findings=[beats_random(run), sees(run), listens(run)],
        offline_rows=offline_rows(run.offline) if run.offline else [],
        history=history,
        training_charts=training_charts(history or []),
        episode=episode,
        episode_charts=episode_charts(episode) if episode else [],
        sheets=contact_sheets(run_dir / "rollouts"),
        geometry=geometry,
        geometry_pictures=geometry_pictures(run_dir / "geometry", geometry) if geometry else {},
        memory=memory,
        memory_chart=memory_chart(memory or [], run.events or []),
        retries=max((line.retries for line in memory or [] if line.retries is not None), default=None),
        checkpoint=[(p.name, p.stat().st_size) for p in sorted((run_dir / "model").glob("*")) if p.is_file()],
    )
    path = run_dir / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def offline_rows(offline: Offline) -> list[OfflineRow]:
    """Lay out action errors, a row a dimension, then their means and the gripper's accuracy."""
    errors = offline.predictors
    rows = [
        _row(name, {key: error.mae[index] for key, error in errors.items()}, min)
        for index, name in enumerate(offline.names)
    ]
    rows.append(_row("mean of all", {key: error.mean_mae for key, error in errors.items()}, min))
    scaled = {key: error.mean_scaled_mae for key, error in errors.items() if error.mean_scaled_mae is not None}
    accuracy = {key: error.gripper_accuracy for key, error in errors.items() if error.gripper_accuracy is not None}
    rows += [_row("mean, each over its std in training", scaled, min)] if scaled else []
    rows += [_row("gripper accuracy", accuracy, max)] if accuracy else []
    return rows


def _row(label: str, values: dict[str, float], choose) -> OfflineRow:
    """Write a row's numbers with the same decimals, three digits for the smallest, and find the best as written."""
    smallest = min((abs(value) for value in values.values() if value), default=1.0)
    decimals = min(6, max(2, 2 - math.floor(math.log10(smallest)))) if math.isfinite(smallest) else 3
    written = {key: f"{value:.{decimals}f}" for key, value in values.items()}
    best = f"{choose(values.values()):.{decimals}f}"
    return OfflineRow(label, written, {k for k, text in written.items() if text == best})


def contact_sheets(folder: Path) -> dict[str, list[Sheet]]:
    """Read the pictures under `rollouts/<condition>/`, each made small enough for all to fit the page."""
    paths = sorted(folder.glob("*/*.png"))
    sheets: dict[str, list[Sheet]] = {}
    for path in paths:
        sheets.setdefault(path.parent.name, []).append(Sheet(path.stem, _data_uri(path, PICTURE_BYTES // len(paths))))
    return sheets


def geometry_pictures(folder: Path, geometry: SeenGeometry) -> dict[str, list[str]]:
    """Embed each view's picture and its depth, by the view's name."""
    limit = GEOMETRY_BYTES // (2 * len(geometry.views))
    return {
        view.name: [_data_uri(folder / f"{kind}_{view.file}", limit) for kind in ("view", "depth")]
        for view in geometry.views
    }


def _data_uri(path: Path, limit: int) -> str:
    """Embed a picture as it is if it is small enough, else as a JPEG, narrowed until it is."""
    from PIL import Image

    data, kind = path.read_bytes(), "png"
    try:
        picture = Image.open(io.BytesIO(data)).convert("RGB")
    except OSError as error:
        raise ValueError(f"{path}: can't be read as a picture: {error}. Mend it or remove it.") from None
    width = picture.width
    while len(data) > limit and width >= 16:
        small = picture.resize((width, max(1, picture.height * width // picture.width)))
        file = io.BytesIO()
        small.save(file, "JPEG", quality=82)
        data, kind, width = file.getvalue(), "jpeg", width * 4 // 5
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _template():
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        gib=_gib, duration=_duration, large=_large, percent=_percent, span=_span, leaves=_leaves
    )
    return environment.get_template("page.html.j2")


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def _large(count: int) -> str:
    if count >= 1e9:
        return f"{count / 1e9:.2f} B"
    return f"{count / 1e6:.0f} M" if count >= 1e8 else f"{count / 1e6:.2f} M" if count >= 1e6 else f"{count:,}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f}\N{NO-BREAK SPACE}%"


def _span(bounds: tuple[float, float]) -> str:
    return f"{100 * bounds[0]:.0f}\N{EN DASH}{100 * bounds[1]:.0f}\N{NO-BREAK SPACE}%"


def _leaves(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Flatten nested settings into (dotted key, value as JSON)."""
    if not isinstance(value, dict) or not value:
        return [(prefix, value if isinstance(value, str) else json.dumps(value))]
    return [leaf for key, inner in value.items() for leaf in _leaves(inner, f"{prefix}.{key}" if prefix else str(key))]
