"""Single observations, without trajectories: how far can training go with them? Used by `real_robots`.

Three pairs of pictures with the robot's state: two of LIBERO (simulated; two cameras, one moment) and one of a real Franka
(one camera, two moments). No command was recorded with any of them, so nothing can be learned from them that a robot should
do. What is shown is that such pairs pass through every part: they are written as a LeRobot dataset, the tiny policy trains
on them, its checkpoint acts on them, and what it does depends on both pictures. The Franka is taught the state that it
reached next, a movement that happened; the others, their own state: a stand-in, with the size of a command.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.closed_loop import Training
from hf_vla import run
from hf_vla.data.lerobot_writer import LeRobotWriter, image_feature, vector_feature
from hf_vla.data.mixture import build_datasets
from hf_vla.policy import Policy
from hf_vla.sample import ACTION, IMAGES, STATE, Sample

SETTINGS = (
    "data.batch_size=2",
    "data.eval_fraction=0",
    "data.center_images=false",
    "training.logging_steps=1",
    "training.warmup_steps=5",
    "training.max_steps=40",
)
"""Of one picture a view, the mean is the picture itself: centred, there would be nothing to see."""
FPS = 5
"""The format wants a rate; the files say none."""
UNTOLD = "do what the robot did"
"""Where a file holds no instruction."""


class Recording(NamedTuple):
    """One file's content as an episode of one or two rows."""

    cameras: dict[str, np.ndarray]
    """Name to (rows, H, W, 3) uint8."""
    states: np.ndarray
    """(rows, S) float32; what is taught is each row's next one, the last row's its own."""
    task: str
    views: str
    """`data.views`, as JSON."""


def trainings_on(source: Path, recipe_file: Path, overrides: tuple[str, ...], folder: Path) -> dict[str, Training]:
    """Write each file of the sample as a dataset, unless it is there, and describe the training on it.

    Args:
        source: folder of the `.npz` files.
        recipe_file, overrides: the tiny recipe, without dataset and views.
        folder: where datasets and runs are kept.
    """
    trainings = {}
    for file in sorted(source.glob("*.npz")):
        recording, dataset = read(file), folder / "single" / file.stem
        if not dataset.exists():
            write(recording, dataset)
        own = (f"data.dataset={dataset}", f"data.views={recording.views}", *overrides, *SETTINGS)
        trainings[file.stem] = Training(file.stem, recipe_file, own, folder / file.stem)
    return trainings


def read(file: Path) -> Recording:
    """Read a file by what it holds: pictures of one camera over time, or of two cameras at one moment."""
    values = np.load(file)
    if "observations" in values:
        two_moments = '["front",{"camera":"front","offset":-1}]'
        return Recording({"front": values["observations"][0]}, values["states"][0], UNTOLD, two_moments)
    main = "full_image" if "full_image" in values else "primary_image"
    state = values["state" if "state" in values else "proprio"].astype(np.float32)
    task = str(values["task_description"]) if "task_description" in values else UNTOLD
    cameras = {"main": values[main][None], "wrist": values["wrist_image"][None]}
    return Recording(cameras, state[None], task, '["main","wrist"]')


def write(recording: Recording, root: Path) -> None:
    """Write a recording as a LeRobot dataset."""
    names = [f"state_{i}" for i in range(recording.states.shape[1])]
    features = {STATE: vector_feature(names), ACTION: vector_feature(names)}
    columns = {STATE: recording.states, ACTION: np.concatenate([recording.states[1:], recording.states[-1:]])}
    for name, pictures in recording.cameras.items():
        features[f"{IMAGES}.{name}"] = image_feature(*pictures.shape[1:3])
        columns[f"{IMAGES}.{name}"] = pictures
    with LeRobotWriter(root, FPS, features) as writer:
        writer.add_episode(columns, recording.task)
        writer.finish()


def measure_one(training: Training) -> dict[str, Any]:
    """Open the run's checkpoint, act on the last row, and say what training did and what the action depends on."""
    recipe, policy = training.recipe, Policy.from_pretrained(training.directory / run.MODEL)
    data, _ = build_datasets(recipe.data, recipe.model.chunk_size, recipe.training["seed"])
    sample = data[len(data) - 1]
    chunk, *others = policy.predict_samples([sample, *(blacken(sample, view) for view in range(2))])
    losses = [
        row["loss"] for row in json.loads((training.directory / "log_history.json").read_text()) if "loss" in row
    ]
    return {
        "rows": len(data),
        "pictures": [list(picture.shape) for picture in sample.images],
        "loss": {"first": losses[0], "last": losses[-1]},
        "mae_in_the_states_units": float(np.abs(chunk - sample.actions)[~sample.action_is_pad].mean()),
        "action_moved_by_blackening_view": [float(np.abs(other - chunk).max()) for other in others],
    }


def blacken(sample: Sample, view: int) -> Sample:
    """Put a black picture in a view's place."""
    images = [np.zeros_like(picture) if i == view else picture for i, picture in enumerate(sample.images)]
    return sample._replace(images=images)
