"""Record demonstrations of Meta-World's scripted experts as a LeRobotDataset v3.0 folder.

    python data_scripts/record_metaworld.py --task reach-v3 --task faucet-open-v3=40 --episodes 20 --out datasets/two

The seed decides every row, whatever the number of workers: attempts are numbered, each is decided by its own number, and the
first that succeed are kept in their order. With noise the arm is pushed off its way while what is stored is what the expert
commands, so that recoveries are in the data and the noise isn't.
"""

import dataclasses
import io
import itertools
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from hf_vla.rollout.metaworld_env import ACTION_NAMES, CAMERAS, STATE_NAMES, MetaWorldEnv, control_rate, instruction_of
from hf_vla.sample import ACTION, IMAGES, STATE
from hf_vla.workers import WORKERS

HORIZON = 500
"""Simulator steps after which Meta-World itself ends an episode."""
ROWS_AFTER_SUCCESS = 3
"""Rows kept after the task is solved, so that staying there is in the data."""
NOISE_MEMORY = 0.8
"""Share of the noise that stays from one action to the next: single pushes would cancel out."""
GIVE_UP = 3
"""Attempts for each episode asked for, after which a task counts as unsolvable for its expert."""


Store = Literal["jpeg", "png", "h264", "av1"]


@dataclasses.dataclass(frozen=True)
class Settings:
    """All that decides what an attempt looks like, but its task and its seed."""

    env: dict[str, Any]
    """Arguments of `MetaWorldEnv`."""
    max_steps: int
    noise_share: float
    """Share of the attempts that are disturbed."""
    noise_std: float
    """Of the noise on the three directions of movement, in units of the action."""
    noise_steps: int
    """Actions from the start that are disturbed; the rest of the episode shows how to come back and finish."""
    store: Store


@dataclasses.dataclass(frozen=True)
class Attempt:
    """What the expert did from one start position."""

    success: bool
    columns: dict[str, Any]
    """By feature key, a row an action, as `LeRobotWriter.add_episode` takes them."""


@dataclasses.dataclass
class Tally:
    """How often a task's expert was tried and how often it succeeded."""

    attempts: int = 0
    successes: int = 0


def attempt(task: str, seed: int, settings: Settings) -> Attempt:
    """Let the expert try from the start position of `seed`; runs in a worker."""
    env = _kept_env(task, settings)
    noise = _noise(seed, settings)
    env.reset(seed)
    rows, solved_at = [], None
    while len(rows) < settings.max_steps and (solved_at is None or len(rows) < solved_at + ROWS_AFTER_SUCCESS):
        action = env.expert_action()
        rows.append((env.observe(), action))
        disturbed = np.append(action[:3] + next(noise), action[3])
        if env.step(disturbed).success and solved_at is None:
            solved_at = len(rows)
    return Attempt(False, {}) if solved_at is None else Attempt(True, _columns(rows, settings))


_kept: dict[str, MetaWorldEnv] = {}
"""The one simulator that a worker process keeps open: making one takes as long as an episode."""


def _kept_env(task: str, settings: Settings) -> MetaWorldEnv:
    if task not in _kept:
        for env in _kept.values():
            env.close()
        _kept.clear()
        _kept[task] = MetaWorldEnv(task, **settings.env)
    return _kept[task]


def _noise(seed: int, settings: Settings) -> Iterator[np.ndarray]:
    """Draw (3,) disturbances that remember the last one; zeros where this attempt is not a disturbed one."""
    generator = torch.Generator().manual_seed(seed)
    disturbed = torch.rand((), generator=generator) < settings.noise_share
    fresh = np.sqrt(1 - NOISE_MEMORY**2)  # keeps the spread at noise_std however long it goes on
    noise = np.zeros(3)
    for _ in range(settings.noise_steps * bool(disturbed)):
        draw = torch.randn(3, generator=generator).numpy()
        noise = NOISE_MEMORY * noise + fresh * settings.noise_std * draw
        yield noise
    yield from itertools.repeat(np.zeros(3))


def _columns(rows: list[tuple[dict[str, Any], np.ndarray]], settings: Settings) -> dict[str, Any]:
    pictures = {
        f"{IMAGES}.{camera}": [_encode(seen[f"{IMAGES}.{camera}"], settings.store) for seen, _ in rows]
        for camera in settings.env["cameras"]
    }
    return {
        **pictures,
        STATE: np.stack([seen[STATE] for seen, _ in rows]),
        ACTION: np.stack([action for _, action in rows]),
    }


def _encode(picture: np.ndarray, store: Store) -> np.ndarray | bytes:
    if store not in ("jpeg", "png"):
        return picture  # a video is encoded where all of its frames meet
    buffer = io.BytesIO()
    full_colour = {"quality": 95, "subsampling": 0}  # a goal dot is a few pixels of colour
    Image.fromarray(picture).save(buffer, store, optimize=store == "jpeg", **(full_colour if store == "jpeg" else {}))
    return buffer.getvalue()


def first_successes(submit, seed: int, wanted: int, tally: Tally) -> Iterator[Attempt]:
    """Yield the first `wanted` successful attempts in the order of their seeds.

    Args:
        submit: starts the attempt of a seed and returns its future.
        seed: of the first attempt; the next has the next.
        wanted: how many to yield; no more attempts are under way than could still be wanted.
        tally: counts what comes back.

    Raises:
        RuntimeError: where the expert fails too often.
    """
    under_way: deque = deque()
    while tally.successes < wanted:
        while tally.successes + len(under_way) < wanted:
            under_way.append(submit(seed + tally.attempts + len(under_way)))
        done = under_way.popleft().result()
        tally.attempts += 1
        if done.success:
            tally.successes += 1
            yield done
        elif tally.attempts - tally.successes > GIVE_UP * wanted:
            raise RuntimeError(f"the expert solved only {tally.successes} of {tally.attempts} attempts")


def record(
    out: Path, tasks: dict[str, int], seed: int, settings: Settings, workers: int, progress: Progress
) -> dict[str, Tally]:
    """Record `tasks` (name to number of episodes) into the new folder `out`, and return what each expert achieved."""
    # Workers import this file too, and have no use for what the writer needs.
    from hf_vla.data.lerobot_writer import LeRobotWriter, image_feature, vector_feature

    side, storage = settings.env["image_size"], "image" if settings.store in ("jpeg", "png") else "video"
    features = {f"{IMAGES}.{camera}": image_feature(side, side, storage) for camera in settings.env["cameras"]}
    features |= {STATE: vector_feature(STATE_NAMES), ACTION: vector_feature(ACTION_NAMES)}
    codec = settings.store if storage == "video" else "h264"
    tallies = {task: Tally() for task in tasks}
    os.environ.setdefault("SVT_LOG", "1")  # the AV1 encoder otherwise prints a page for each file
    with (
        LeRobotWriter(out, control_rate(settings.env["action_repeat"]), features, "sawyer", codec) as writer,
        ProcessPoolExecutor(workers, WORKERS, initializer=torch.set_num_threads, initargs=(1,)) as pool,
    ):
        bars = {task: progress.add_task(task, total=count) for task, count in tasks.items()}
        for task, count in tasks.items():
            for done in first_successes(
                lambda s, t=task: pool.submit(attempt, t, s, settings), seed, count, tallies[task]
            ):
                writer.add_episode(done.columns, instruction_of(task))
                progress.advance(bars[task])
        writer.finish(recording_facts(seed, settings, tallies))
    return tallies


def recording_facts(seed: int, settings: Settings, tallies: dict[str, Tally]) -> dict[str, Any]:
    """Say how it was recorded: `MetaWorldEnv(task, **facts["env"])` shows the same pictures again."""
    facts = {"simulator": "metaworld", "seed": seed, **dataclasses.asdict(settings)}
    return facts | {"tasks": {task: dataclasses.asdict(tally) for task, tally in tallies.items()}}


def main(
    out: Annotated[Path, typer.Option(help="Folder to make; must not exist.")],
    task: Annotated[list[str], typer.Option(help="Meta-World's name, or NAME=EPISODES; give it once for each task.")],
    episodes: Annotated[int, typer.Option(min=1, help="Successful episodes of each task.")] = 50,
    seed: Annotated[int, typer.Option(min=0, help="Of each task's first attempt; the next attempt has the next.")] = 0,
    image_size: Annotated[int, typer.Option(min=8, help="Side of the square pictures, in pixels.")] = 224,
    camera: Annotated[
        list[str] | None, typer.Option(help="One view each, in order.", show_default=", ".join(CAMERAS))
    ] = None,
    field_of_view: Annotated[
        list[str] | None, typer.Option(metavar="CAMERA=DEGREES", help="Narrower is nearer; corner2 has 60 of its own.")
    ] = None,
    action_repeat: Annotated[int, typer.Option(help="Simulator steps (80 a second) that an action is held for.")] = 4,
    noise: Annotated[float, typer.Option(min=0, max=1, help="Share of the episodes that are disturbed.")] = 0.0,
    noise_std: Annotated[float, typer.Option(min=0, help="Of the disturbance, in units of the action.")] = 0.5,
    noise_steps: Annotated[int, typer.Option(min=0, help="First actions of an episode that are disturbed.")] = 10,
    max_steps: Annotated[
        int | None, typer.Option(min=1, help="Actions of an attempt; None: 500 simulator steps.")
    ] = None,
    store: Annotated[
        Store, typer.Option(help="Pictures as files embedded in the rows, or as mp4 beside them.")
    ] = "jpeg",
    workers: Annotated[int, typer.Option(min=1, help="Simulators at a time.")] = os.cpu_count() or 1,
) -> None:
    """Record demonstrations of Meta-World's scripted experts as a LeRobotDataset v3.0 folder."""
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        tasks = dict(_task_and_count(word, episodes) for word in task)
        angles = dict(_camera_and_angle(word) for word in field_of_view or [])
        env = {
            "image_size": image_size,
            "cameras": camera or list(CAMERAS),
            "action_repeat": action_repeat,
            "field_of_view": angles,
        }
        MetaWorldEnv(next(iter(tasks)), **env).close()  # whatever is wrong with them is said before any work
        settings = Settings(env, max_steps or HORIZON // action_repeat, noise, noise_std, noise_steps, store)
        with Progress(*columns, console=console) as progress:
            tallies = record(out, tasks, seed, settings, workers, progress)
    except (ValueError, FileExistsError, ImportError, RuntimeError) as error:
        Console(stderr=True).print(f"[bold red]Not recorded:[/] {error}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    console.print(success_table(tallies))
    console.print(f"Recorded into {out}")


def _task_and_count(word: str, episodes: int) -> tuple[str, int]:
    name, equals, count = word.partition("=")
    instruction_of(name)  # raises for a task that doesn't exist
    if equals and not (count.isdecimal() and int(count)):
        raise ValueError(f"--task takes NAME or NAME=EPISODES, such as reach-v3=50, not {word!r}.")
    return name, int(count or episodes)


def _camera_and_angle(word: str) -> tuple[str, float]:
    camera, _, degrees = word.partition("=")
    try:
        return camera, float(degrees)
    except ValueError:
        raise ValueError(f"--field-of-view takes CAMERA=DEGREES, such as corner2=30, not {word!r}.") from None


def success_table(tallies: dict[str, Tally]) -> Table:
    """Lay out how often each expert succeeded; failures are not in the data."""
    table = Table("task", "kept", "attempts", "success rate")
    for task, tally in tallies.items():
        rate = f"{tally.successes / tally.attempts:.0%}"
        table.add_row(task, str(tally.successes), str(tally.attempts), rate)
    return table


if __name__ == "__main__":
    typer.run(main)
