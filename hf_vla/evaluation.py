"""How good is the policy of a run: action errors on held-out episodes, and closed-loop rollouts beside their controls.

A rollout's success says little alone, so each is set beside what chance, the expert, the same policy without its pictures
and the same policy with another task's instruction achieve from the same start positions.
"""

import dataclasses
import functools
import itertools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_vla import run
from hf_vla.console import passing_progress
from hf_vla.data.lerobot_format import DatasetInfo
from hf_vla.data.mixed import MixedDataset
from hf_vla.data.mixture import build_datasets
from hf_vla.geometry import write_geometry
from hf_vla.policy import Policy
from hf_vla.recipe import Recipe, load_recipe
from hf_vla.rollout.baselines import BASELINES
from hf_vla.rollout.loop import (
    EpisodeResult,
    ExpertPolicy,
    Job,
    RandomPolicy,
    contact_sheet,
    run_in_processes,
    split_job,
)
from hf_vla.rollout.metaworld_env import ACTION_NAMES, CAMERAS, MetaWorldEnv, graphics_problem, instruction_of
from hf_vla.rollout.metrics import SuccessRate, offline_report, read_windows
from hf_vla.sample import Sample

POLICY, BLIND, SWAPPED, RANDOM, EXPERT = "policy", "without_pictures", "swapped_instruction", "random", "expert"
SAID = {
    POLICY: "the policy",
    BLIND: "without its pictures",
    SWAPPED: "told another task, and doing that",
    RANDOM: "at random",
    EXPERT: "the expert",
}
TURNED = 0.5
"""Angle in rad from which a faucet counts as turned, the way that its sign says."""

PICTURED = 5
"""Episodes of each task that are kept as pictures."""

logger = logging.getLogger(__name__)


def evaluate_offline(directory: Path, overrides: list[str] | None = None) -> dict[str, Any]:
    """Measure the run's policy on held-out episodes, beside three baselines, and write it into the run.

    Args:
        directory: the run's.
        overrides: `section.key=value`, such as where its dataset lies by now; the run's events tell of them.
    """
    run.check_finished(directory)
    recipe = load_recipe(directory / run.RECIPE, overrides)
    train_data, eval_data = build_datasets(recipe.data, recipe.model.chunk_size, recipe.training["seed"])
    policy = Policy.from_pretrained(directory / run.MODEL, device=device_of(recipe))
    report = functools.partial(offline_report, policy.predict_samples, on_error=recipe.data.on_error)
    offline = report(eval_data, train_data)
    if isinstance(eval_data, MixedDataset):
        offline["by_dataset"] = report_each(report, eval_data, train_data)
    run.update_info(directory, {"offline": offline})
    if overrides:
        text = f"Measured on held-out episodes with {', '.join(overrides)}."
        run.add_event(directory, run.read_info(directory)["steps"], "evaluated_otherwise", text)
    logger.info("Mean error of actions on held-out episodes: %s.", describe_errors(offline))
    shown = first_episode(eval_data, recipe.data.on_error)
    run.write_json(directory / "episode.json", compare_episode(policy, shown, eval_data.info))
    if recipe.model.outputs == "geometry":
        write_geometry(directory, recipe.model.vggt, policy.model.model.vggt, policy.processor, shown[0])
    return offline


def device_of(recipe: Recipe) -> str:
    """Say where a run's policy is tried: where it was trained, on a GPU if there is one."""
    return "cpu" if recipe.training.get("use_cpu") or not torch.cuda.is_available() else "cuda"


def describe_errors(offline: dict[str, Any]) -> str:
    """Say the policy's mean error and those of the baselines, in the actions' own units."""
    return ", ".join(f"{name} {offline[name]['mean_mae']:.3g}" for name in ("policy", *BASELINES))


def report_each(report: Callable, eval_data: MixedDataset, train_data: MixedDataset) -> dict[str, Any]:
    """Measure on each dataset of a mixture alone, beside what its own baselines do: units may differ between them."""
    trained = {dataset.info.name: dataset for dataset in train_data.datasets}
    return {dataset.info.name: report(dataset, trained[dataset.info.name]) for dataset in eval_data.datasets}


def first_episode(dataset, on_error: str) -> list[Sample]:
    """Read the first episode of which something can be read."""
    for _, places in itertools.groupby(range(len(dataset)), lambda i: dataset.locate(i)[0]):
        if samples := read_windows(dataset, places, on_error):
            return list(samples.values())
    raise ValueError(f"{dataset.info.name}: no held-out episode can be read.")


def compare_episode(policy: Policy, samples: list[Sample], info: DatasetInfo) -> dict[str, Any]:
    """Lay predicted actions beside recorded ones over one episode, a chunk at a time."""
    first, steps = samples[0], policy.n_action_steps
    predicted = policy.predict_samples(samples[::steps])[:, :steps].reshape(-1, first.actions.shape[1])
    return {
        "task": first.task,
        "episode_index": first.episode_index,
        "fps": info.fps,
        "names": info.action_names,
        "recorded": [sample.actions[0].tolist() for sample in samples],
        "predicted": predicted[: len(samples)].tolist(),
    }


def evaluate_rollouts(directory: Path, workers: int | None = None) -> dict[str, Any] | None:
    """Roll the run's policy and its controls out in the simulator, and write counts and pictures into the run.

    Args:
        directory: of the run.
        workers: processes, each with a simulator and a policy; None stands for one on a GPU, which may have no room for
            a second policy, and for two without.

    Returns:
        What was written into `run.json`; None where there is no simulator to roll out in.
    """
    run.check_finished(directory)
    recipe = load_recipe(directory / run.RECIPE)
    problem = "the recipe names no simulator" if recipe.evaluation.simulator == "none" else graphics_problem()
    if problem:
        logger.warning(
            "Skipped: rollouts (policy, without pictures, swapped instruction, random, expert): %s.", problem
        )
        run.update_info(directory, {"rollouts_skipped": problem})
        return None
    workers = workers or (1 if device_of(recipe) == "cuda" else 2)
    results = {}
    for condition in (POLICY, BLIND, SWAPPED, RANDOM, EXPERT):
        episodes = roll_out(condition, directory, recipe, workers)
        counts = count(condition, episodes)
        results["rollouts" if condition == POLICY else f"rollouts_{condition}"] = counts
        logger.info("Rolled out, %s: %s.", SAID[condition], describe_counts(counts))
        save_sheets(directory / "rollouts" / condition, episodes)
    run.update_info(directory, results)
    return results


def roll_out(condition: str, directory: Path, recipe: Recipe, workers: int) -> dict[str, list[EpisodeResult]]:
    """Run every task's episodes under one condition, in parallel processes, from the same start positions."""
    evaluation = recipe.evaluation
    seeds = range(evaluation.seed, evaluation.seed + evaluation.episodes)
    make_policy = functools.partial(_make_policy, condition, str(directory / run.MODEL), device_of(recipe))
    tasks, pieces = [], []
    for task in evaluation.swapped if condition == SWAPPED else evaluation.tasks:
        make_env = functools.partial(_make_env, task, recipe, condition)
        for part in split_job(Job(make_env, make_policy, seeds, evaluation.max_steps), workers):
            tasks.append(task)
            pieces.append(dataclasses.replace(part, make_policy=functools.partial(make_policy, part.seeds[0])))
    with passing_progress() as progress:
        bar = progress.add_task(f"Rolling out, {SAID[condition]}", total=sum(len(piece.seeds) for piece in pieces))
        done = run_in_processes(pieces, workers, lambda _, results: progress.advance(bar, len(results)))
    episodes: dict[str, list[EpisodeResult]] = {}
    for task, results in zip(tasks, done, strict=True):
        episodes.setdefault(task, []).extend(results)
    return episodes


def _make_env(task: str, recipe: Recipe, condition: str) -> MetaWorldEnv:
    evaluation = recipe.evaluation
    told = evaluation.swapped[task] if condition == SWAPPED else task
    return MetaWorldEnv(
        task,
        image_size=evaluation.image_size,
        cameras=[view.camera for view in recipe.data.views or []] or CAMERAS,
        action_repeat=evaluation.action_repeat,
        field_of_view=evaluation.field_of_view,
        instruction=instruction_of(told),
    )


def _make_policy(condition: str, checkpoint: str, device: str, seed: int, env: MetaWorldEnv):
    if condition == RANDOM:
        return RandomPolicy(seed, action_dim=len(ACTION_NAMES))
    if condition == EXPERT:
        return ExpertPolicy(env)
    policy = Policy.from_pretrained(checkpoint, device=device)
    if condition == BLIND:
        policy.processor.pictures = "mean"
    return policy


def count(condition: str, episodes: dict[str, list[EpisodeResult]]) -> dict[str, Any]:
    """Count successes of each task, with Wilson's 95 % interval.

    With another task's instruction, success is doing what was said: the faucet stands turned the other way.
    """
    table: dict[str, Any] = {}
    for task, results in episodes.items():
        own = [result.success for result in results]
        counted = [_turned_the_other_way(task, result) for result in results] if condition == SWAPPED else own
        table[task] = SuccessRate().compute(predictions=counted)
        if condition == SWAPPED:
            table[task]["own_task_successes"] = sum(own)
            table[task]["final_measures"] = [round(result.measure, 4) for result in results]
    rates = [row["success_rate"] for row in table.values()]
    table["mean_success"] = float(np.mean(rates)) if rates else None  # no task has another's instruction
    return table


def describe_counts(counts: dict[str, Any]) -> str:
    """Say how often each task succeeded."""
    tasks = {task: row for task, row in counts.items() if task != "mean_success"}
    return ", ".join(f"{task} {row['successes']}/{row['episodes']}" for task, row in tasks.items()) or "no task"


def _turned_the_other_way(task: str, result: EpisodeResult) -> bool:
    """Whether a faucet that its task opens (positive angle) stands closed, or the other way round."""
    return (-result.measure if "open" in task else result.measure) > TURNED


def save_sheets(directory: Path, episodes: dict[str, list[EpisodeResult]]) -> None:
    """Save one contact sheet a task, where the policy looked at pictures at all."""
    for task, results in episodes.items():
        if any(result.frames for result in results):
            directory.mkdir(parents=True, exist_ok=True)
            contact_sheet(results[:PICTURED]).save(directory / f"{task}.png")
