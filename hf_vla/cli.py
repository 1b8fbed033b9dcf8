"""The command `hf-vla`: one function a subcommand, each a few lines that call the package."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

ORDER = (
    "In the order of a first run: inspect a dataset, plan a recipe for it, ask the doctor, train by `accelerate launch "
    "hf_vla/train.py RECIPE --output RUN`, evaluate. Recipes are in recipes/; hf_vla/recipe/sections.py says what each "
    "key means."
)

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, epilog=ORDER)

Recipe = Annotated[Path, typer.Argument(help="Recipe, JSON or YAML.", metavar="RECIPE")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="section.key=value, as data.batch_size=4; repeatable.")
]
Run = Annotated[Path, typer.Argument(help="Run directory.", metavar="RUN")]


@app.callback()
def _configure() -> None:
    """Plan, prove, survive: fine-tune a vision-language-action policy inside a GPU memory budget."""
    from hf_vla.console import set_up_logging

    set_up_logging()


@app.command()
def plan(
    recipe_file: Annotated[Path | None, typer.Argument(help="To plan, or search from.", metavar="[RECIPE]")] = None,
    overrides: Overrides = None,
    budget: Annotated[
        str | None, typer.Option(help="As 28GiB; by default the recipe's, or what is free less 10 %.")
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="GPUs that the run gets.")] = None,
    gpu: Annotated[str | None, typer.Option(help="Their kind, as H200; by default the one that is here.")] = None,
    train: Annotated[
        str | None,
        typer.Option(
            help="Search for what fits: language=lora (or qlora, full, frozen), vggt=frozen (or lora, full)."
        ),
    ] = None,
    image_size: Annotated[int | None, typer.Option(help="Pixels a side, of a search.")] = None,
    effective_batch: Annotated[int, typer.Option(min=1, help="Samples of an optimizer step, of a search.")] = 64,
    allow: Annotated[
        list[str] | None,
        typer.Option(help="What a search may do though it changes results: quantize,freeze,image_size."),
    ] = None,
    cached: Annotated[bool, typer.Option("--cached", help="A search may count on `hf-vla cache`.")] = False,
    output: Annotated[Path, typer.Option(help="Where a search writes the fastest recipe.")] = Path("planned.json"),
    scenarios: Annotated[bool, typer.Option("--scenarios", help="The memory guide's three, beside ours.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Predict the peak memory of a recipe, or search for the fastest recipe that fits; exit code 3: doesn't fit."""
    from hf_vla import planning
    from hf_vla.recipe import load_recipe

    if train is None and (image_size or allow or cached):
        raise typer.BadParameter("--image-size, --allow and --cached are for a search: give --train too.")
    if overrides and not recipe_file:
        raise typer.BadParameter("--set changes a recipe: give one.")
    if not (scenarios or train or recipe_file):
        raise typer.BadParameter("Give a recipe, or --train for a search, or --scenarios.")
    with Console(stderr=True).status("Tracing a training step of each way…" if train else "Tracing a training step…"):
        if scenarios:
            shown = planning.show_scenarios(gpu)
        elif train:
            base = load_recipe(recipe_file, overrides) if recipe_file else None
            shown = planning.show_search(
                train, budget, gpus, gpu, image_size, effective_batch, allow or [], output, cached, base
            )
        else:
            shown = planning.show_recipe(recipe_file, overrides, budget, gpus, gpu)
    typer.echo(json.dumps(shown.facts, indent=2)) if as_json else Console().print(shown.table)
    if shown.hint and not as_json:
        typer.echo(shown.hint)
    raise typer.Exit(0 if shown.fits else 3)


@app.command()
def doctor(
    recipe_file: Recipe,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Go through the checklist before a training: memory, who holds it, batch, precision, weights, data, disk."""
    from hf_vla.memory.check import checks_to_json, format_checks
    from hf_vla.memory.preflight import run_checks
    from hf_vla.planning import plan_for_here
    from hf_vla.recipe import load_recipe

    recipe = load_recipe(recipe_file, overrides)
    plan = plan_for_here(recipe)
    checks = run_checks(recipe, planned_peak=plan and plan.total, budget=plan and plan.budget)
    typer.echo(checks_to_json(checks) if as_json else format_checks(checks))
    if any(check.status == "fail" for check in checks):
        raise typer.Exit(1)


@app.command()
def probe(
    recipe_file: Recipe,
    overrides: Overrides = None,
    budget: Annotated[str | None, typer.Option(help="As 28GiB; the recipe's, or 90 % of what is free.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Find the largest micro-batch that fits, by training a few steps at 1, 2, 4 … samples at once."""
    from hf_vla.memory.planner import find_budget
    from hf_vla.probe import probe_recipe
    from hf_vla.recipe import load_recipe

    recipe = load_recipe(recipe_file, overrides)
    result = probe_recipe(recipe, find_budget(recipe, budget, gpus=1))
    typer.echo(json.dumps(result.to_dict(), indent=2) if as_json else result.describe())
    if not result.batch_size:
        raise typer.Exit(3)


@app.command()
def cache(
    recipe_file: Recipe,
    overrides: Overrides = None,
    output: Annotated[Path | None, typer.Option(help="Folder of caches; the recipe's, or cache/DATASET.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Pairs at once; the recipe's by default.")] = None,
) -> None:
    """Store the outputs of frozen backbones, so that training needn't load them; run again, it goes on or checks."""
    from accelerate import PartialState

    from hf_vla.caching import build_caches, describe_use
    from hf_vla.recipe import load_recipe

    recipe = load_recipe(recipe_file, overrides)
    folders = build_caches(recipe, output, batch_size)
    if PartialState().is_main_process:
        typer.echo(describe_use(recipe, folders))


@app.command()
def evaluate(run: Run, overrides: Overrides = None) -> None:
    """Measure a run's policy on its held-out episodes, in physical units, beside three baselines."""
    from hf_vla.evaluation import evaluate_offline
    from hf_vla.report import write_report

    evaluate_offline(run, overrides)
    typer.echo(write_report(run))


@app.command()
def rollout(
    run: Run,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, help="Simulators at a time, each with a policy: 1 on a GPU, 2 without.", show_default=False
        ),
    ] = None,
) -> None:
    """Drive the simulated robot with a run's policy and its controls."""
    from hf_vla.evaluation import evaluate_rollouts
    from hf_vla.report import write_report

    evaluate_rollouts(run, workers)
    typer.echo(write_report(run))


@app.command()
def report(run: Run) -> None:
    """Write a run's report.html anew, from what its directory holds."""
    from hf_vla.report import write_report

    typer.echo(write_report(run))


@app.command()
def inspect(
    dataset: Annotated[
        str, typer.Argument(help="Folder or Hub id of a LeRobot dataset, or a folder of RLDS.", metavar="DATASET")
    ],
    output: Annotated[Path, typer.Option(help="The page.")] = Path("inspection.html"),
    revision: Annotated[str | None, typer.Option(help="Of a Hub repo.")] = None,
    against: Annotated[
        list[str] | None, typer.Option(help="A dataset to judge by; it must share no episode. Repeatable.")
    ] = None,
) -> None:
    """Look for what is wrong with a dataset, and write one HTML page; exit code 1: something spoils training."""
    from hf_vla import inspection

    recordings = inspection.inspect(dataset, output, revision, against or [])
    for finding in recordings.findings:
        typer.echo(f"{finding.level}: {finding.text}")
    count = len(recordings.findings)
    typer.echo(f"{output}: {count} finding{'' if count == 1 else 's'}.")
    if any(finding.level == "error" for finding in recordings.findings):
        raise typer.Exit(1)


@app.command()
def merge(run: Run, output: Annotated[Path | None, typer.Option(help="RUN/merged by default.")] = None) -> None:
    """Merge a run's adapters into its backbones: one model that opens with torch and transformers alone."""
    from hf_vla.merge import merge as merge_checkpoint
    from hf_vla.run import MODEL, check_finished

    check_finished(run)
    merge_checkpoint(run / MODEL, output or run / "merged")


@app.command()
def push(
    run: Run,
    repo_id: Annotated[str | None, typer.Argument(help="user/name; the recipe's hub.repo_id by default.")] = None,
    private: Annotated[bool | None, typer.Option("--private/--public", help="The recipe's by default.")] = None,
    merged: Annotated[bool, typer.Option("--merged", help="Push the whole model, adapters merged.")] = False,
) -> None:
    """Push a finished run to the Hugging Face Hub: what was trained, its recipe, its results and a model card."""
    from hf_vla import hub

    typer.echo(hub.push(run, repo_id, private, merged))


def main() -> None:
    """Run the command; whatever the user can mend ends in one line, not in a traceback."""
    from hf_vla.console import end_quietly_when_interrupted

    end_quietly_when_interrupted()
    _configure()  # before the imports say a word
    from hf_vla.memory.budget import MemoryBudgetError

    try:
        app()
    except MemoryBudgetError as error:
        typer.echo(f"Error: {error}", err=True)
        raise SystemExit(3) from None
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"Error: {error}") from None


if __name__ == "__main__":
    main()
