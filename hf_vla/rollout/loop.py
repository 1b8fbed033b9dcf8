"""Drive a policy through episodes of an environment and count what happens; knows no simulator.

An environment is anything with the methods of `Env`, a policy anything with those of `Policy`. What has to live in a child
process (simulators hold graphics contexts, models hold threads) is made there, by functions that can be pickled.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image

from hf_vla.console import set_up_logging
from hf_vla.sample import IMAGES
from hf_vla.workers import WORKERS

THUMBNAIL_SIDE = 96


class EnvStep(NamedTuple):
    """What came of one action."""

    success: bool
    """Whether the task was solved at any moment of this step."""
    measure: float
    """How far it is solved, in the environment's own unit (distance left, angle turned)."""


class Env(Protocol):
    """A world with one task, as a policy meets it."""

    instruction: str

    def reset(self, seed: int) -> None:
        """Put the world into the start position that `seed` decides."""

    def observe(self) -> dict[str, Any]:
        """Return `observation.images.<camera>` (H, W, 3) uint8, `observation.state` (S,) float32 and `task`."""

    def step(self, action: np.ndarray) -> EnvStep:
        """Carry out one (A,) action."""

    def close(self) -> None:
        """Give back what the world holds of the machine."""


class Policy(Protocol):
    """Whatever chooses actions: a trained model, an expert, chance."""

    needs_observation: bool
    """Whether the next action depends on a new look; rendering is what costs time."""

    def reset(self) -> None:
        """Forget the last episode."""

    def select_action(self, observation: dict[str, Any] | None) -> np.ndarray:
        """Return the next (A,) action in physical units; the observation is None where none was needed."""


@dataclass
class EpisodeResult:
    """One episode: from which start, how it ended, and what the policy saw."""

    seed: int
    success: bool
    steps: int
    measure: float
    frames: list[np.ndarray] = field(default_factory=list, repr=False)
    """Small copies of what was looked at, views side by side, (h, w, 3) uint8 each."""


def run_episodes(
    env: Env,
    policy: Policy,
    seeds: Sequence[int],
    max_steps: int,
    on_episode: Callable[[EpisodeResult], None] | None = None,
) -> list[EpisodeResult]:
    """Run one episode from each seed, until the task is solved or `max_steps` actions are spent.

    Args:
        env: left open; whoever made it closes it.
        policy: asked for every action; the env is looked at only when it needs that.
        seeds: one start position each.
        max_steps: actions, not simulator steps.
        on_episode: called with each result as it comes, for a progress bar.
    """
    results = []
    for seed in seeds:
        results.append(_run_episode(env, policy, seed, max_steps))
        if on_episode is not None:
            on_episode(results[-1])
    return results


def _run_episode(env: Env, policy: Policy, seed: int, max_steps: int) -> EpisodeResult:
    env.reset(seed)
    policy.reset()
    result = EpisodeResult(seed=seed, success=False, steps=0, measure=float("nan"))
    while result.steps < max_steps and not result.success:
        observation = env.observe() if policy.needs_observation else None
        if observation is not None:
            result.frames.append(_thumbnail(observation))
        result.success, result.measure = env.step(policy.select_action(observation))
        result.steps += 1
    return result


class RandomPolicy:
    """Draw each action evenly from [low, high]: what chance achieves."""

    needs_observation = False

    def __init__(self, seed: int, action_dim: int, low: float = -1.0, high: float = 1.0):
        self._generator = torch.Generator().manual_seed(seed)
        self._action_dim, self._low, self._high = action_dim, low, high

    def reset(self) -> None:
        """Keep drawing on: episodes must not share their actions."""

    def select_action(self, observation: dict[str, Any] | None) -> np.ndarray:
        """Return a new (A,) draw."""
        draw = torch.rand(self._action_dim, generator=self._generator)
        return (self._low + (self._high - self._low) * draw).numpy()


class ExpertPolicy:
    """Do what the environment's own expert would: what is possible at most."""

    needs_observation = False

    def __init__(self, env: Any):
        self._env = env

    def reset(self) -> None:
        """Do nothing: the expert reads the environment anew each time."""

    def select_action(self, observation: dict[str, Any] | None) -> np.ndarray:
        """Return the expert's (A,) action for the environment as it stands."""
        return self._env.expert_action()


@dataclass(frozen=True)
class Job:
    """Episodes of one policy on one task, described so that a child process can make both."""

    make_env: Callable[[], Env]
    """Takes nothing; must be picklable, as `functools.partial(MetaWorldEnv, "reach-v3", ...)` is."""
    make_policy: Callable[[Env], Policy]
    """Takes the environment, which only an expert looks into; must be picklable."""
    seeds: Sequence[int]
    max_steps: int


def run_in_processes(
    jobs: Sequence[Job], workers: int, on_job: Callable[[int, list[EpisodeResult]], None] | None = None
) -> list[list[EpisodeResult]]:
    """Run jobs side by side in fresh processes; results come in the order of `jobs`, whoever finishes first.

    Args:
        jobs: each is done by one process; cut a long one by its seeds (`split_job`) to keep all workers busy.
        workers: processes; each computes on one thread.
        on_job: called in order with a job's index and results, for a progress bar.
    """
    results = []
    with ProcessPoolExecutor(workers, WORKERS, _begin_worker) as pool:
        for index, episodes in enumerate(pool.map(_run_job, jobs)):
            results.append(episodes)
            if on_job is not None:
                on_job(index, episodes)
    return results


def _begin_worker() -> None:
    set_up_logging()
    torch.set_num_threads(1)


def _run_job(job: Job) -> list[EpisodeResult]:
    with closing(job.make_env()) as env:
        return run_episodes(env, job.make_policy(env), job.seeds, job.max_steps)


def split_job(job: Job, parts: int) -> list[Job]:
    """Cut a job into up to `parts` of nearly equal size, its seeds in order."""
    pieces = np.array_split(np.asarray(job.seeds), min(parts, len(job.seeds)))
    return [Job(job.make_env, job.make_policy, piece.tolist(), job.max_steps) for piece in pieces]


def contact_sheet(episodes: Sequence[EpisodeResult], columns: int = 8) -> Image.Image:
    """Lay episodes out as one picture: a row an episode, evenly spaced moments from left to right.

    Raises:
        ValueError: where nothing was looked at in any episode.
    """
    rows = [list(_evenly(episode.frames, columns)) for episode in episodes if episode.frames]
    if not rows:
        raise ValueError("a contact sheet needs at least one episode whose policy looked; these have no frames.")
    height, width, _ = rows[0][0].shape
    sheet = Image.new("RGB", (width * max(map(len, rows)), height * len(rows)), "white")
    for y, row in enumerate(rows):
        for x, frame in enumerate(row):
            sheet.paste(Image.fromarray(frame), (x * width, y * height))
    return sheet


def _evenly(frames: Sequence[np.ndarray], count: int) -> Iterator[np.ndarray]:
    for index in np.linspace(0, len(frames) - 1, min(count, len(frames))).round().astype(int):
        yield frames[index]


def _thumbnail(observation: dict[str, Any]) -> np.ndarray:
    views = [value for key, value in observation.items() if key.startswith(IMAGES + ".")]
    return np.concatenate([_shrink(view) for view in views], axis=1)


def _shrink(view: np.ndarray) -> np.ndarray:
    height, width, _ = view.shape
    if height <= THUMBNAIL_SIDE:
        return view
    size = (max(1, round(width * THUMBNAIL_SIDE / height)), THUMBNAIL_SIDE)
    return np.asarray(Image.fromarray(view).resize(size, Image.Resampling.BOX))
