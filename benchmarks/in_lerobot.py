"""What LeRobot itself does; runs in its environment, and imports nothing of ours. Each command ends with a line of JSON.

python in_lerobot.py backends
python in_lerobot.py dump DATASET NPZ CHUNK BACKEND
python in_lerobot.py convert FOLDER NAME
python in_lerobot.py speeds                       each line asked: [DATASET, {"chunk": 16, "past": 0, "workers": 2, …}]
"""

import itertools
import json
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset, LeRobotDatasetMetadata
from throughput import measure, serve

NAME = "local/dataset"
STATISTICS = ("mean", "std", "min", "max", "q01", "q99")


def backends() -> dict[str, str | None]:
    """Say of each video backend what keeps it from working, None where nothing does."""
    try:
        import torchcodec.decoders  # noqa: F401  loads FFmpeg's libraries
    except (ImportError, OSError, RuntimeError) as error:
        return {"torchcodec": str(error).strip().splitlines()[0], "pyav": None}
    return {"torchcodec": None, "pyav": None}


def dump(dataset: str, to: str, chunk: str, backend: str) -> dict[str, int]:
    """Read every item, and leave all of them as arrays; pictures as (N, H, W, 3) uint8."""
    data = open_data(dataset, int(chunk), 0, backend)
    columns = defaultdict(list)
    for i in range(len(data)):
        for key, value in data[i].items():
            columns[key].append(as_uint8(value) if key in data.meta.camera_keys else np.asarray(value))
    arrays = {key: np.stack(values) for key, values in columns.items()}
    for feature in ("action", "observation.state"):
        stats = data.meta.stats[feature]
        arrays |= {f"stats/{feature}/{name}": stats[name] for name in STATISTICS if name in stats}
    np.savez(to, **arrays)
    return {"rows": len(data), "episodes": data.num_episodes}


def as_uint8(picture: torch.Tensor) -> np.ndarray:
    """Take LeRobot's (3, H, W) in [0, 1] back to the levels that it came from."""
    levels = picture.permute(1, 2, 0).numpy() * 255
    if np.abs(levels - levels.round()).max() > 1e-3:
        raise ValueError("a picture isn't made of whole levels of 0 to 255, so rounding would hide a difference")
    return levels.round().astype(np.uint8)


def convert(folder: str, name: str) -> dict[str, str]:
    """Convert a v2.1 folder to v3.0, in its place."""
    from lerobot.datasets.v30.convert_dataset_v21_to_v30 import convert_dataset

    convert_dataset(name, root=folder, push_to_hub=False)
    return {"converted": str(Path(folder) / name)}


def speed(dataset: str, given: dict) -> dict[str, float]:
    """Measure the speed of `LeRobotDataset` in torch's DataLoader, in random order."""
    torch.set_num_threads(given["threads"])
    data = open_data(dataset, given["chunk"], given["past"], given["backend"])
    workers = given["workers"]
    loader = torch.utils.data.DataLoader(
        data,
        batch_size=given["batch_size"],
        shuffle=True,
        num_workers=workers,
        drop_last=True,
        prefetch_factor=2 if workers else None,
        persistent_workers=workers > 0,
    )
    sizes = (len(batch["index"]) for _ in itertools.count() for batch in loader)
    return measure(sizes, given["warm_up"], given["seconds"])


def open_data(dataset: str, chunk: int, past: int, backend: str) -> LeRobotDataset:
    """Open a dataset with chunks of actions, if of more than one; with `past`, cameras also give an earlier frame."""
    meta = LeRobotDatasetMetadata(NAME, root=dataset)
    window = {"action": [step / meta.fps for step in range(chunk)]} if chunk > 1 else {}
    if past:
        window |= {key: [-past / meta.fps, 0.0] for key in meta.camera_keys}
    return LeRobotDataset(NAME, root=dataset, delta_timestamps=window or None, video_backend=backend)


COMMANDS = {"backends": backends, "dump": dump, "convert": convert, "speeds": partial(serve, speed)}

if __name__ == "__main__":
    if (said := COMMANDS[sys.argv[1]](*sys.argv[2:])) is not None:
        print(json.dumps(said))
