"""What `hf-vla plan` shows, to people and to programs: a recipe's plan, a search's findings, the guide's scenarios."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Group, RenderableType

from hf_vla.caching import settle_caches
from hf_vla.memory.budget import MemoryBudgetError
from hf_vla.memory.ladder import Candidate, search
from hf_vla.memory.nvml import read_gpus
from hf_vla.memory.plan_table import render_candidates, render_plan, render_scenarios
from hf_vla.memory.planner import Plan, find_budget, plan_recipe
from hf_vla.memory.preflight import count_processes
from hf_vla.memory.scenarios import scenarios
from hf_vla.memory.sizes import GIB
from hf_vla.memory.wishes import ALLOW, Wish, parse_train
from hf_vla.recipe import Recipe, load_recipe, make_recipe


class Shown(NamedTuple):
    """One answer, in both forms."""

    table: RenderableType
    facts: Any
    fits: bool
    hint: str = ""
    """What to do next, for people; one line, however long, since it holds a command."""


def show_recipe(
    path: Path, overrides: list[str] | None, budget: str | None, gpus: int | None, gpu: str | None
) -> Shown:
    """Plan one recipe."""
    recipe = load_recipe(path, overrides)
    plan = plan_recipe(recipe, budget, gpus, gpu)
    hint = f"What fits: {_search_command(path, recipe, plan)}" if plan.fits is False else ""
    return Shown(render_plan(plan, title=str(path)), plan.to_dict(), plan.fits is not False, hint)


def _search_command(path: Path, recipe: Recipe, plan: Plan) -> str:
    """Write the command that searches for the same training in less memory, or names the least that it takes."""
    wish = _wish_of(recipe)
    words = [
        f"hf-vla plan {path} --budget {plan.budget / GIB:.2f}GiB",
        f"--train language={wish.language},vggt={wish.vggt}",
        f"--effective-batch {plan.effective_batch}",
        *([f"--gpus {plan.gpus}"] if plan.gpus > 1 else []),
    ]
    return " ".join(words)


def show_search(
    train: str,
    budget: str | None,
    gpus: int | None,
    gpu: str | None,
    image_size: int | None,
    effective_batch: int,
    allow: list[str],
    output: Path,
    cached: bool = False,
    base: Recipe | None = None,
) -> Shown:
    """Search for the recipes that fit, and write the fastest; what the words don't speak of is as in `base`.

    Raises:
        ValueError: for an unknown change to allow, or no budget to search within.
        FileExistsError, FileNotFoundError: if `output` is there already, or its folder isn't.
        MemoryBudgetError: if nothing fits; the recipe of the smallest budget that works is written to `output` then.
    """
    allow = [name for names in allow for name in names.split(",")]
    unknown = set(allow) - set(ALLOW)
    if unknown:
        raise ValueError(f"--allow takes {', '.join(ALLOW)}, not {', '.join(sorted(unknown))}.")
    wish = Wish(
        **parse_train(train),
        image_size=image_size,
        effective_batch=effective_batch,
        gpus=gpus or 1,
        allow=tuple(allow),
        cached=cached,
    )
    _check_free(output)
    found = _find(wish, budget, base or make_recipe({}), gpu, output)
    _as_planned(found[0], budget).save(output)
    facts = [
        {"rungs": list(c.rungs), "changes": list(c.changes), "recipe": c.recipe.to_dict(), **c.plan.to_dict()}
        for c in found
    ]
    fastest = render_plan(found[0].plan, title=f"Fastest, written to {output}")
    return Shown(Group(render_candidates(found), "", fastest), facts, fits=True)


def _check_free(output: Path) -> None:
    """Refuse, before a search of half a minute, a place that it couldn't write into."""
    if output.exists():
        raise FileExistsError(f"{output} is there already: choose another --output.")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"{output}: there is no folder {output.parent} to write it into.")


def _find(wish: Wish, budget: str | None, base: Recipe, gpu: str | None, output: Path) -> list[Candidate]:
    """Search; where nothing fits, write the recipe of the smallest budget that works."""
    settled = find_budget(base, budget, wish.gpus)
    if settled is None:
        raise ValueError("There is no GPU here to tell what is free: give --budget, as 28GiB.")
    try:
        return search(wish, settled, base, gpu)
    except MemoryBudgetError as error:
        error.recipe.save(output)
        raise MemoryBudgetError(f"{error} The recipe for it is written to {output}.", error.recipe) from None


def _as_planned(candidate: Candidate, budget: str | None) -> Recipe:
    """Give a found recipe the budget that it was searched for, and its own prediction in place of its base's."""
    recipe = candidate.recipe
    about = replace(
        recipe.about,
        predicted_peak_bytes=candidate.plan.total,
        measured_peak_bytes=None,
        samples_per_second=None,
        metric=None,
        date=None,
        command="",
    )
    return replace(recipe, about=about, memory=replace(recipe.memory, budget=budget or recipe.memory.budget))


def show_scenarios(gpu: str | None) -> Shown:
    """Plan the guide's three scenarios."""
    found = scenarios(gpu)
    facts = [{"name": s.name, "guide_gb": s.guide, "why": s.why, "plan": s.plan.to_dict()} for s in found]
    return Shown(render_scenarios(found), facts, fits=True)


def plan_for_here(recipe: Recipe) -> Plan | None:
    """Plan a recipe for the GPUs of this machine; None where it uses none, or its dataset can't be opened."""
    gpus = () if recipe.training.get("use_cpu") else read_gpus().gpus
    if not gpus:
        return None
    try:
        return plan_recipe(settle_caches(recipe), gpus=count_processes(recipe, len(gpus)))
    except (ValueError, OSError):  # which the checklist says in its own line
        return None


def what_fits(recipe: Recipe) -> str:
    """Say which recipe of the same training would fit what this machine has; asked when nothing is left to try."""
    budget = find_budget(recipe, None, recipe.memory.gpus or 1)
    if budget is None:
        return "See what would fit with `hf-vla plan`."
    try:
        best = search(_wish_of(recipe), budget, base=recipe)[0]
    except MemoryBudgetError as error:
        return str(error)
    size = f"batch {best.plan.batch_size} x accumulation {best.plan.accumulation}"
    return f"This would fit: {', '.join(best.rungs) or 'as it is'}, {size}."


def _wish_of(recipe: Recipe) -> Wish:
    def way(part: str) -> str:
        if not getattr(recipe.model, f"freeze_{part}"):
            return "full"
        return "lora" if part in recipe.lora.apply_to else "frozen"

    is_quantised = recipe.model.quantization != "none"
    gpus = recipe.memory.gpus or 1
    return Wish(
        language="qlora" if is_quantised else way("lang_encoder"),
        vggt=way("vggt"),
        effective_batch=recipe.data.batch_size * recipe.training["gradient_accumulation_steps"] * gpus,
        gpus=gpus,
    )
