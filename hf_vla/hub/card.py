"""The model card of a run: what it was made of, under which licences, how, and what was measured of it, and no more."""

from pathlib import Path
from typing import NamedTuple

from huggingface_hub import ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hf_vla import run
from hf_vla.checkpoint import WHOLE
from hf_vla.recipe import Recipe, load_recipe
from hf_vla.report.findings import beats_random, listens, sees
from hf_vla.report.page import CONDITIONS, offline_rows
from hf_vla.report.run_files import Count, Run, read_json, read_required
from hf_vla.weights.files import is_hub_id

LICENCES = {
    "facebook/VGGT-1B": "Non-commercial use only; for commercial use there is facebook/VGGT-1B-Commercial.",
    "facebook/VGGT-1B-Commercial": "VGGT License: commercial use is allowed, military use isn't; gated.",
    "meta-llama/Llama-2-7b-hf": (
        "Llama 2 Community License, with its Acceptable Use Policy; gated. Llama 2 is licensed under the LLAMA 2 Community "
        "License, Copyright (c) Meta Platforms, Inc. All Rights Reserved."
    ),
}
"""What the released weights may be used for. Source: their repositories' cards."""

CONTROLS = ("rollouts_without_pictures", "rollouts_random")
"""What success is measured against: without one of them beside it, it isn't shown."""


class Backbone(NamedTuple):
    """One of the two models that the policy was built from."""

    key: str
    """`vggt` or `lang_encoder`."""
    name: str
    """As the card names it; of a local file only its last part, for the rest is nobody else's business."""
    hub_id: str | None
    licence: str
    how: str
    """Frozen, adapted or trained."""
    is_local: bool
    """Whether its weights are a file or folder that others don't have."""


def model_card(run_dir: Path, model_dir: Path, repo_id: str) -> str:
    """Write the card of a run's checkpoint, as it will stand in a repository's README.md."""
    recipe = load_recipe(run_dir / run.RECIPE)  # the run's own: a merged model's no longer says that it had adapters
    info = read_required(run_dir / run.INFO, Run)
    is_whole = (model_dir / WHOLE).is_file()
    parts, rows = backbones(recipe), rollout_rows(info)
    processor = read_json(model_dir / "processor_config.json", dict)
    mixed = names_of_units(processor["stats"])
    return _template().render(
        metadata=metadata(recipe, repo_id, is_whole).to_yaml(),
        repo_id=repo_id,
        title=repo_id.partition("/")[2],
        purpose=recipe.about.purpose,
        not_supported=recipe.about.not_supported,
        is_whole=is_whole,
        backbones=parts,
        has_bases=any(part.hub_id or part.is_local for part in parts),
        dataset=dataset_names(recipe),
        mixed=", ".join(f"`{name}`" for name in mixed),
        chosen=f', dataset="{mixed[0]}"' if mixed else "",
        start=", state=state[None]" if recipe.data.action_form == "relative" else "",
        settings=settings(recipe, processor["views"]),
        run=info,
        offline=offline_rows(info.offline) if info.offline else [],
        conditions=CONDITIONS,
        rollouts=rows,
        findings=[beats_random(info), sees(info), listens(info)] if rows else [],
    )


def metadata(recipe: Recipe, repo_id: str, is_whole: bool) -> ModelCardData:
    """Give the card's front matter, which the Hub reads."""
    parts = backbones(recipe)
    bases = [part.hub_id for part in parts if part.hub_id]
    data = ModelCardData(
        library_name="transformers" if is_whole else "hf_vla",
        pipeline_tag="robotics",
        tags=["robotics", "vision-language-action", "hf_vla"],
    )
    if bases:
        data.base_model = bases
        data.base_model_relation = "adapter" if recipe.lora.apply_to and not is_whole else "finetune"
    if any(part.hub_id or part.is_local for part in parts):
        data.license = "other"  # the Hub takes one licence, and there are two
        data.license_name = "licences-of-the-base-models"
        data.license_link = f"https://huggingface.co/{repo_id}#licences"
    public = [source for source in datasets(recipe) if is_hub_id(source)]
    if public:
        data.datasets = public
    return data


def backbones(recipe: Recipe) -> list[Backbone]:
    """Describe where both backbones come from, and what training did with them."""
    return [_backbone(recipe, key) for key in ("vggt", "lang_encoder")]


def _backbone(recipe: Recipe, key: str) -> Backbone:
    source, how = getattr(recipe.model, key), _how(recipe, key)
    if isinstance(source, dict):
        return Backbone(key, "random weights", None, "None: its weights were made by this run.", how, False)
    if is_hub_id(source):
        licence = LICENCES.get(source, "See its repository.")
        return Backbone(key, f"[{source}](https://huggingface.co/{source})", source, licence, how, False)
    return Backbone(key, f"`{Path(source).name}`", None, "A local copy: that of where it came from.", how, True)


def _how(recipe: Recipe, key: str) -> str:
    if key in recipe.lora.apply_to:
        return f"frozen, with LoRA of rank {recipe.lora.r}"
    return "frozen" if getattr(recipe.model, f"freeze_{key}") else "trained in full"


def datasets(recipe: Recipe) -> list[str]:
    """List what the run was trained on, as its recipe names it."""
    return [mixed.dataset for mixed in recipe.data.mixture] or [recipe.data.dataset or "unknown"]


def dataset_names(recipe: Recipe) -> str:
    """Name the datasets: a link to the Hub, or the last part of a local path."""
    return ", ".join(
        f"[{source}](https://huggingface.co/datasets/{source})" if is_hub_id(source) else f"`{Path(source).name}`"
        for source in datasets(recipe)
    )


def names_of_units(stats: dict) -> list[str]:
    """Name the datasets that a processor's statistics are kept by; none where they are of one."""
    return [] if "action" in stats else list(stats)


def settings(recipe: Recipe, views: list[str]) -> dict[str, str]:
    """Give the settings that a reader compares runs by; recipe.json has them all."""
    model, data, training = recipe.model, recipe.data, recipe.training
    rows = {
        "views": ", ".join(views),
        "image size": f"{data.image_size} ({data.resize})",
        "fusion": model.fusion.type,
        "head": model.head.type,
        "actions predicted at once": model.chunk_size,
        "normalisation": data.normalization,
        "backbones' dtype": model.dtype,
        "quantisation": model.quantization,
        "batch a process": f"{data.batch_size} x {training['gradient_accumulation_steps']} (accumulation)",
        "learning rate": f"{training['learning_rate']:g} ({training['lr_scheduler_type']})",
        "seed": training["seed"],
    }
    return {name: str(value) for name, value in rows.items()}


def rollout_rows(info: Run) -> dict[str, list[str]]:
    """Lay out successes, a row a task and a cell a condition, of tasks that were measured under a control too."""
    counts = {key: info.counts(key) for key in CONDITIONS}
    controlled = [task for task in counts["rollouts"] if any(task in counts[control] for control in CONTROLS)]
    return {task: [_cell(counts[key].get(task)) for key in CONDITIONS] for task in controlled}


def _cell(count: Count | None) -> str:
    if count is None:
        return "not measured"
    low, high = count.bounds
    return f"{count.successes} of {count.episodes} ({100 * low:.0f} to {100 * high:.0f} %)"


def _template():
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=False,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("model_card.md.j2")
