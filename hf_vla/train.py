"""Train a policy: `accelerate launch hf_vla/train.py recipes/lora.json`."""

import logging
import os
from pathlib import Path
from typing import Annotated

import typer
from accelerate import PartialState
from transformers.trainer_utils import get_last_checkpoint

from hf_vla import run
from hf_vla.assemble import build_config, build_model, build_processor
from hf_vla.checkpoint import save_checkpoint
from hf_vla.console import set_up_logging
from hf_vla.data.collator import VLACollator
from hf_vla.data.mixture import build_datasets, mean_pictures
from hf_vla.data.windows import WindowDataset
from hf_vla.hub import push_if_asked
from hf_vla.lora import count_parameters
from hf_vla.memory.budget import MemoryBudgetError
from hf_vla.memory.check import format_checks, refuse_on_failure
from hf_vla.memory.monitor import MemoryMonitor
from hf_vla.memory.preflight import run_checks
from hf_vla.model.image_processing_vla import resize_view, stack_views
from hf_vla.model.modeling_vla import VLAForActionPrediction
from hf_vla.model.processing_vla import VLAProcessor
from hf_vla.recipe import Recipe, RecipeError, load_recipe
from hf_vla.report import write_report
from hf_vla.sample import view_name
from hf_vla.trainer import VLATrainer, training_arguments

logger = logging.getLogger(__name__)


def train(recipe: Recipe, output: Path, resume: bool = False) -> Path:
    """Train the recipe's policy into a run directory, and return that directory.

    Raises:
        RecipeError: if the recipe can't be run here as it stands.
        FileExistsError: if the directory already holds a run.
    """
    resume = resume or is_restarted()
    check_processes(recipe)
    run.check_directory(output, resume)
    trainer = build_trainer(recipe, output)
    with PartialState().main_process_first():
        run.open_run(output, recipe)
    trainer.watch_memory(MemoryMonitor(output))
    result = trainer.train(resume_from_checkpoint=get_last_checkpoint(str(output)) if resume else None)
    if trainer.is_world_process_zero():
        save_checkpoint(trainer.bare_model(), trainer.processing_class, recipe, output / run.MODEL)
        write_results(trainer, result.metrics, output)
    PartialState().wait_for_everyone()
    if (
        trainer.is_world_process_zero()
    ):  # last, since the others would wait for it no longer than a collective may take
        push_if_asked(output, recipe)
    return output


def build_trainer(recipe: Recipe, output: Path) -> VLATrainer:
    """Build data, processor, model and trainer, in the order in which each needs the one before."""
    arguments = training_arguments(recipe, str(output))
    train_data, eval_data = build_datasets(
        recipe.data, recipe.model.chunk_size, arguments.seed, recipe.data.picture_cache_bytes
    )
    info, views = train_data.info, [view_name(view.camera, view.offset) for view in train_data.views]
    means = mean_pictures(train_data, fit_views(recipe))
    processor = build_processor(recipe, views, info.stats, means, train_data.tasks)
    model = build_model(recipe, build_config(recipe, len(views), info.state_dim, info.action_dim))
    if recipe.model.head.type == "discrete":
        fit_levels(model, processor, train_data)
    return VLATrainer(
        recipe=recipe,
        processor=processor,
        model=model,
        args=arguments,
        train_dataset=train_data,
        eval_dataset=eval_data,
        data_collator=VLACollator(processor),
    )


def fit_levels(model: VLAForActionPrediction, processor: VLAProcessor, train_data: WindowDataset) -> None:
    """Give a discrete head the levels that training actions take."""
    actions = processor(actions=train_data.actions)["actions"]
    model.head.fit_levels(actions)


def fit_views(recipe: Recipe):
    """Give the function that stacks an observation's pictures at the recipe's size, as the processor does."""
    return lambda images: stack_views(
        [resize_view(image, recipe.data.image_size, recipe.data.resize) for image in images]
    )


def is_restarted() -> bool:
    """Whether the launcher (`--max_restarts`) has started this process again after a rank had to stop."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def check_processes(recipe: Recipe) -> None:
    """Refuse to run with other processes than were asked for.

    `accelerate launch` falls back to one process without a word where its config doesn't fit the machine, and a launcher
    may start several that never join: each then trains alone, on the same samples.

    Raises:
        RecipeError: if the launcher's or the recipe's count isn't the count that runs together.
    """
    # Without a GPU accelerate joins processes only if it is told to use the CPU, the first time it is asked.
    running = PartialState(cpu=recipe.training.get("use_cpu", False)).num_processes
    launched = int(os.environ.get("WORLD_SIZE", 1))
    wanted = recipe.memory.gpus or launched
    if running != launched or running != wanted:
        raise RecipeError(
            f"{wanted} processes were asked for (recipe: memory.gpus {recipe.memory.gpus}, launcher: {launched}), but "
            f"{running} run together. Launch with `accelerate launch --multi_gpu --num_processes {wanted} …`."
        )


def write_results(trainer: VLATrainer, metrics: dict[str, float], output: Path) -> None:
    """Write what came out into the run directory."""
    run.write_json(output / "log_history.json", trainer.state.log_history)
    results = {
        "finished": run.now(),
        "seconds": metrics["train_runtime"],
        "samples_per_second": metrics["train_samples_per_second"],
        "steps": trainer.state.global_step,
        "parameters": count_parameters(trainer.bare_model()),
        "train": {"loss": metrics["train_loss"]},
    }
    run.update_info(output, results)
    write_report(output)


def main(
    recipe_file: Annotated[Path, typer.Argument(help="Recipe, JSON or YAML.", metavar="RECIPE")],
    overrides: Annotated[list[str] | None, typer.Option("--set", help="section.key=value; may be repeated.")] = None,
    output: Annotated[Path | None, typer.Option(help="Run directory; runs/<recipe> by default.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the output directory.")] = False,
    anyway: Annotated[bool, typer.Option("--anyway", help="Train even if the doctor advises against it.")] = False,
) -> None:
    """Train a policy as a recipe says."""
    set_up_logging()
    output = output or Path("runs") / recipe_file.stem
    try:
        recipe = load_recipe(recipe_file, overrides)
        ask_doctor(recipe, output, anyway)
        train(recipe, output, resume)
    except (ValueError, OSError, MemoryBudgetError) as error:
        raise SystemExit(f"Error: {error}") from None
    logger.info("Trained: %s; report: %s", output / run.MODEL, output / "report.html")


def ask_doctor(recipe: Recipe, output: Path, anyway: bool) -> None:
    """Go through the checklist and show it; refuse what can't work, unless told otherwise.

    Raises:
        RecipeError: listing what failed.
    """
    checks = run_checks(recipe, output, processes=PartialState().num_processes)
    if PartialState().is_main_process:
        logger.info(format_checks(checks))
    if not anyway:
        refuse_on_failure(checks)


if __name__ == "__main__":
    typer.run(main)
