"""Train a policy: `accelerate launch hf_vla/train.py recipes/lora.json`."""

import logging
import os
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Annotated

from hf_vla.console import end_quietly_when_interrupted, set_up_logging

if __name__ == "__main__":  # before the libraries imported below say a word
    end_quietly_when_interrupted()
    set_up_logging()

import torch
import typer
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import TrainingArguments

from hf_vla import run, saving
from hf_vla.caching import caches_of, settle_caches
from hf_vla.hub import push_if_asked
from hf_vla.lora import count_parameters
from hf_vla.memory.budget import MemoryBudgetError
from hf_vla.memory.cap import keep_to_budget
from hf_vla.memory.check import format_checks, refuse_on_failure
from hf_vla.memory.monitor import MemoryMonitor
from hf_vla.memory.planner import Plan, plan_recipe
from hf_vla.memory.preflight import run_checks
from hf_vla.prepare import build_trainer
from hf_vla.recipe import Recipe, RecipeError, load_recipe
from hf_vla.report import write_report
from hf_vla.stopping import StopWhenAsked
from hf_vla.trainer import VLATrainer

logger = logging.getLogger(__name__)


def train(recipe: Recipe, output: Path, resume: bool = False, plan: Plan | None = None) -> Path:
    """Train the recipe's policy into a run directory, and return that directory.

    Args:
        recipe: the run.
        output: run directory.
        resume: whether to go on with what it holds.
        plan: what each GPU was planned to hold; measured against at every step.

    Raises:
        RecipeError: if the recipe can't be run here as it stands.
        FileExistsError: if the directory already holds a run, one to resume that is over, or one that is being trained.
        MemoryBudgetError: if the budget is too small to begin with, or nothing is left to try.
        SystemExit: when it was asked to stop by SIGTERM or Ctrl-C, with a checkpoint written.
    """
    check_processes(recipe)
    keep_to_budget(recipe, PartialState().num_processes)
    with run.held(output) if PartialState().is_main_process else nullcontext():
        return train_here(recipe, output, goes_on(output, resume), plan)


def train_here(recipe: Recipe, output: Path, resume: bool, plan: Plan | None) -> Path:
    """Train in a run directory that no other process trains in."""
    run.check_directory(output, resume)
    checkpoint = find_checkpoint(output, recipe) if resume else None
    PartialState().wait_for_everyone()  # or the first rank may begin a run that another has yet to look for
    trainer = build_trainer(recipe, output)
    with PartialState().main_process_first():
        run.open_run(output, recipe)
        run.report_left_out(output, trainer.left_out)
        if recipe.memory.cache:
            run.update_info(output, {"cache": caches_of(trainer.train_dataset)})
    trainer.watch_memory(MemoryMonitor(output, plan and plan.total, plan and plan.budget))
    with StopWhenAsked() as asked:
        trainer.add_callback(asked)
        result = trainer.train(resume_from_checkpoint=checkpoint)
    if asked.has_stopped:
        steps = f"step {trainer.state.global_step} of {trainer.state.max_steps}"
        trainer.tell("stopped", f"Stopped at {steps}, as asked: --resume goes on from there.")
        raise SystemExit(asked.exit_code)
    with saving.said_plainly(output):
        trainer.save_policy(output / run.MODEL)
    if trainer.is_world_process_zero():
        write_results(trainer, result.metrics, output)
    PartialState().wait_for_everyone()
    # Last: the others would wait for it no longer than a collective may take.
    if trainer.is_world_process_zero():
        push_if_asked(output, recipe)
    return output


def find_checkpoint(output: Path, recipe: Recipe) -> str | None:
    """Find the newest whole checkpoint to go on from, and say so, what was passed over, and what the recipe changes.

    Raises:
        FileExistsError: for a finished run without one, which would be trained again from its start.
    """
    found = saving.find(output)
    if found.checkpoint is None and "finished" in run.read_info(output):
        raise FileExistsError(f"{output} has finished and kept no checkpoint to go on from: choose another --output.")
    step = 0 if found.checkpoint is None else int(found.checkpoint.name.partition("-")[2])
    texts = [f"{trouble}: it is passed over." for trouble in found.skipped]
    texts.append(
        f"Going on from {found.checkpoint.name if found.checkpoint else 'the start: there is no checkpoint yet'}."
    )
    texts += [f"The run goes on by another recipe: {change}." for change in run.describe_changes(output, recipe)]
    for text in texts:
        logger.info(text)
        if PartialState().is_main_process:
            run.add_event(output, step, "resumed", text)
    PartialState().wait_for_everyone()  # none writes before all have looked
    return found.checkpoint and str(found.checkpoint)


def goes_on(output: Path, resume: bool) -> bool:
    """Whether to go on with the run in a directory: as asked, or since the launcher has started this process again."""
    return resume or (is_restarted() and (output / run.RECIPE).exists())


def is_restarted() -> bool:
    """Whether the launcher (`--max_restarts`) has started this process again after a rank had to stop.

    To be launched with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1: started again, ranks may else read the addresses of those that
    ended, and hang (github.com/pytorch/pytorch/issues/135712).
    """
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def check_processes(recipe: Recipe) -> None:
    """Refuse to run with other processes than were asked for.

    `accelerate launch` falls back to one process without a word where its config doesn't fit the machine, and a launcher
    may start several that never join: each then trains alone, on the same samples.

    Raises:
        RecipeError: if the launcher's or the recipe's count isn't the count that runs together.
    """
    # Without a GPU accelerate joins processes only if it is told to use the CPU, the first time it is asked. How long they
    # wait for each other is settled then too: Trainer comes too late, and NCCL's ten minutes may be less than a save takes.
    patience = timedelta(seconds=recipe.training.get("ddp_timeout", TrainingArguments.ddp_timeout))
    running = PartialState(cpu=recipe.training.get("use_cpu", False), timeout=patience).num_processes
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
        "train": {"loss": trainer.mean_loss, "eval_loss": last_eval_loss(trainer.state.log_history)},
        "memory": {
            "planned_peak_bytes": trainer.monitor.plan["planned_peak"],
            "budget_bytes": trainer.monitor.plan["budget"],
            "measured_peak_bytes": trainer.monitor.highest_peak,
        },
    }
    run.update_info(output, results)
    write_report(output)


def last_eval_loss(history: list[dict[str, float]]) -> float | None:
    """Give the last loss on held-out episodes; None where none was measured."""
    return next((entry["eval_loss"] for entry in reversed(history) if "eval_loss" in entry), None)


def main(
    recipe_file: Annotated[Path, typer.Argument(help="Recipe, JSON or YAML.", metavar="RECIPE")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="section.key=value, as data.batch_size=4; repeatable.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Run directory; runs/<recipe> by default.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the output directory.")] = False,
    anyway: Annotated[bool, typer.Option("--anyway", help="Train even if the doctor advises against it.")] = False,
) -> None:
    """Train a policy as a recipe says, once the doctor finds nothing against it.

    Ctrl-C ends the step and writes a checkpoint; --resume goes on. `hf-vla evaluate RUN` then says how good it is.
    """
    output = output or Path("runs") / recipe_file.stem
    try:
        recipe = load_recipe(recipe_file, overrides)
        run.check_directory(output, goes_on(output, resume))  # before minutes of looking and planning
        check_processes(recipe)  # the first to ask accelerate, which else joins no processes on a CPU
        plan = plan_run(recipe)
        ask_doctor(recipe, output, plan, anyway)
        train(recipe, output, resume, plan)
    except (ValueError, OSError, MemoryBudgetError) as error:
        raise SystemExit(f"Error: {error}") from None
    logger.info("Trained: %s; report: %s", output / run.MODEL, output / "report.html")


def plan_run(recipe: Recipe) -> Plan | None:
    """Plan what each GPU will hold, once for all ranks; on a CPU there is nothing to plan for."""
    if not torch.cuda.is_available() or recipe.training.get("use_cpu"):
        return None
    state = PartialState()
    plan = plan_recipe(settle_caches(recipe), gpus=state.num_processes) if state.is_main_process else None
    return broadcast_object_list([plan])[0]


def ask_doctor(recipe: Recipe, output: Path, plan: Plan | None, anyway: bool) -> None:
    """Go through the checklist and show it; refuse what can't work, unless told otherwise.

    Raises:
        RecipeError: listing what failed.
    """
    checks = run_checks(recipe, output, plan and plan.total, plan and plan.budget, PartialState().num_processes)
    if PartialState().is_main_process:
        logger.info(format_checks(checks))
    if not anyway:
        refuse_on_failure(checks)


if __name__ == "__main__":
    typer.run(main)
