"""The files of a run directory: what each holds, and reading them. A missing one is None, a bad one an error."""

import json
import math
from pathlib import Path
from typing import Any

from pydantic import BaseModel, PositiveFloat, PositiveInt, TypeAdapter, ValidationError, model_validator

PREDICTORS = ("policy", "mean_action", "hold_still", "nearest_state")


class Count(BaseModel):
    """Successes of one task under one condition; under another instruction, of what that instruction says."""

    successes: int
    episodes: PositiveInt
    interval: tuple[float, float] | None = None
    own_task_successes: int | None = None

    @property
    def bounds(self) -> tuple[float, float]:
        """Return the recorded 95 % interval, or Wilson's where none was recorded."""
        return self.interval or wilson(self.successes, self.episodes)

    @property
    def own_task(self) -> "Count | None":
        """Return how often the scene's own task was done although the instruction named another."""
        if self.own_task_successes is None:
            return None
        return Count(successes=self.own_task_successes, episodes=self.episodes)


Rollouts = dict[str, Count | float | None]


class Errors(BaseModel):
    """Action error of one predictor, in the dataset's units."""

    mae: list[float]
    mean_mae: float
    mean_scaled_mae: float | None = None
    """Mean over dimensions of each one's error over its std in training: comparable across units."""
    gripper_accuracy: float | None = None


class Offline(BaseModel):
    """The policy and its baselines on the same held-out windows."""

    names: list[str]
    policy: Errors
    mean_action: Errors | None = None
    hold_still: Errors | None = None
    nearest_state: Errors | None = None
    windows: int | None = None
    episodes: int | None = None

    @property
    def predictors(self) -> dict[str, Errors]:
        """Return what was measured, the policy first."""
        return {key: getattr(self, key) for key in PREDICTORS if getattr(self, key)}

    @model_validator(mode="after")
    def _one_error_a_name(self) -> "Offline":
        for key, errors in self.predictors.items():
            if len(errors.mae) != len(self.names):
                raise ValueError(f"{key}.mae holds {len(errors.mae)} numbers for {len(self.names)} names")
        return self


class Event(BaseModel):
    """Something that whoever reads the run should know, such as a step retried in smaller pieces."""

    kind: str
    text: str = ""
    time: str | None = None
    step: int | None = None


class Parameters(BaseModel):
    """How many numbers training changed, and how many it left alone."""

    trained: int | None = None
    frozen: int | None = None


class Losses(BaseModel):
    """Where training ended."""

    loss: float | None = None
    eval_loss: float | None = None


class Memory(BaseModel):
    """Bytes on the fullest GPU over the whole run."""

    planned_peak_bytes: int | None = None
    budget_bytes: int | None = None
    measured_peak_bytes: int | None = None


class Run(BaseModel):
    """run.json; null and None are not recorded."""

    hf_vla: str | None = None
    command: str | list[str] | None = None
    commit: str | None = None
    versions: dict[str, Any] = {}
    machine: dict[str, Any] | str | None = None
    started: str | None = None
    finished: str | None = None
    seconds: float | None = None
    samples_per_second: float | None = None
    steps: int | None = None
    parameters: Parameters = Parameters()
    train: Losses = Losses()
    offline: Offline | None = None
    rollouts: Rollouts = {}
    rollouts_without_pictures: Rollouts = {}
    rollouts_swapped_instruction: Rollouts = {}
    rollouts_random: Rollouts = {}
    rollouts_expert: Rollouts = {}
    rollouts_skipped: str | None = None
    """Why there are no rollouts."""
    memory: Memory = Memory()
    events: list[Event] | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_null(cls, raw: Any) -> Any:
        return {key: value for key, value in raw.items() if value is not None} if isinstance(raw, dict) else raw

    def counts(self, condition: str) -> dict[str, Count]:
        """Return task to Count under one of CONDITIONS; empty where it wasn't measured."""
        return {task: count for task, count in getattr(self, condition).items() if isinstance(count, Count)}


class LogLine(BaseModel):
    """One entry of the Trainer's log history."""

    step: int
    loss: float | None = None
    eval_loss: float | None = None
    grad_norm: float | None = None
    learning_rate: float | None = None


class MemoryLine(BaseModel):
    """Bytes of one step; None is not measured."""

    step: int
    allocated_peak: int | None = None
    reserved_peak: int | None = None
    device_used: int | None = None
    retries: int | None = None
    planned_peak: int | None = None
    budget: int | None = None
    host_rss: int | None = None


class Episode(BaseModel):
    """Recorded and predicted actions of one held-out episode, both (T, A)."""

    task: str
    episode_index: int
    fps: PositiveFloat
    names: list[str]
    recorded: list[list[float]]
    predicted: list[list[float]]

    @model_validator(mode="after")
    def _same_shape(self) -> "Episode":
        if len(self.recorded) != len(self.predicted):
            raise ValueError(f"{len(self.recorded)} recorded steps, {len(self.predicted)} predicted ones")
        if any(len(row) != len(self.names) for row in [*self.recorded, *self.predicted]):
            raise ValueError(f"every step must hold one number for each of {self.names}")
        return self


class SeenView(BaseModel):
    """One view through VGGT's heads; the pose is that of view 0's camera, seen from this one."""

    name: str
    file: str
    """Under `geometry/`, behind `view_` and `depth_`."""
    near: float
    far: float
    translation: list[float]
    quaternion: list[float]
    angle_degrees: float
    field_of_view_degrees: tuple[float, float]


class SeenGeometry(BaseModel):
    """geometry.json: depth and cameras of one held-out observation."""

    task: str
    episode_index: int
    frame_index: int
    views: list[SeenView]


def read_json(path: Path, shape: Any) -> Any:
    """Read a JSON file, or JSON lines from a `.jsonl`, as the given type; None if there is no such file.

    Raises:
        ValueError: if the file holds something else; the message names it and the place.
    """
    if not path.is_file():
        return None
    try:
        text = path.read_text(encoding="utf-8")
        raw = [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
        return TypeAdapter(shape).validate_python(raw)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the whole file"
        raise ValueError(f"{path}: can't be read at {place}: {first['msg']}. Mend it or remove it.") from None
    except ValueError as error:
        raise ValueError(f"{path}: can't be read as JSON: {error}. Mend it or remove it.") from None


def read_required(path: Path, shape: Any) -> Any:
    """Read a file without which a directory isn't a run.

    Raises:
        FileNotFoundError: if it is missing.
        ValueError: as `read_json`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, so {path.parent} isn't a run directory; training writes one.")
    return read_json(path, shape)


def wilson(successes: int, episodes: int, z: float = 1.96) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share.

    Source: Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927), 209-212.
    """
    share, n = successes / episodes, episodes
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)
