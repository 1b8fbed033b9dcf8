"""Does LeRobot itself open what is recorded here, and see the same frames, states, actions and padding?

    python benchmarks/lerobot_opens_recording.py

LeRobot pins other versions than ours, so it gets an environment of its own under build/ (several GB, made once). There this
very file runs again with `--dump`, reads every item through `LeRobotDataset`, and leaves them as arrays; here they are
compared with the raw rows of the parquet files and with what our own reader cuts. The committed sample is read as it is,
with embedded JPEG files, and once more rewritten as video.
"""

import argparse
import datetime
import importlib.metadata
import io
import json
import os
import platform
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "tests/data/metaworld_sample"
RESULT = ROOT / "benchmarks/results/lerobot_opens_recording.json"
ENVIRONMENT = ROOT / "build/lerobot-venv"
LEROBOT = "lerobot==0.4.4"
CHUNK = 16
STORES = ("image", "h264", "av1")


def dump(dataset: Path, to: Path) -> None:
    """Read every item through LeRobot; runs in LeRobot's environment."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset, LeRobotDatasetMetadata

    fps = LeRobotDatasetMetadata("local/recording", root=dataset).fps
    window = {"action": [step / fps for step in range(CHUNK)]}
    data = LeRobotDataset("local/recording", root=dataset, delta_timestamps=window, video_backend="pyav")
    items = [data[i] for i in range(len(data))]
    columns = {key: np.stack([np.asarray(item[key]) for item in items]) for key in items[0] if key != "task"}
    columns["task"] = np.array([item["task"] for item in items])
    for statistic in ("mean", "std", "q01", "q99"):
        columns[f"stats/action/{statistic}"] = data.meta.stats["action"][statistic]
    columns["episodes"] = np.array(data.num_episodes)
    np.savez(to, **columns)


def raw_rows(dataset: Path) -> dict[str, np.ndarray]:
    """Read the parquet files alone, and pad each chunk as the format says: the last action of the episode repeats."""
    import pyarrow.parquet as pq
    from PIL import Image

    table = pq.read_table(dataset / "data")
    columns = {key: np.stack(table[key].to_numpy()) for key in ("observation.state", "timestamp", "episode_index")}
    actions = np.stack(table["action"].to_numpy())
    ends = np.searchsorted(columns["episode_index"], columns["episode_index"], side="right")
    wanted = np.arange(len(actions))[:, None] + np.arange(CHUNK)
    columns["action"] = actions[np.minimum(wanted, ends[:, None] - 1)]
    columns["action_is_pad"] = wanted >= ends[:, None]
    for key in (name for name in table.column_names if name.startswith("observation.images.")):
        pictures = [Image.open(io.BytesIO(row["bytes"])) for row in table[key].to_pylist()]
        columns[key] = np.stack([np.asarray(picture) for picture in pictures])
    return columns


def our_rows(dataset: Path) -> dict[str, np.ndarray]:
    """Read the same through `WindowDataset`."""
    from hf_vla.data.lerobot_format import open_dataset
    from hf_vla.data.windows import WindowDataset
    from hf_vla.recipe import View

    info = open_dataset(dataset)
    data = WindowDataset(info, [View(camera) for camera in info.cameras], CHUNK)
    samples = [data[i] for i in range(len(data))]
    columns = {f"observation.images.{c}": np.stack([s.images[v] for s in samples]) for v, c in enumerate(info.cameras)}
    columns["observation.state"] = np.stack([sample.state for sample in samples])
    columns["action"] = np.stack([sample.actions for sample in samples])
    columns["action_is_pad"] = np.stack([sample.action_is_pad for sample in samples])
    columns["task"] = np.array([sample.task for sample in samples])
    return columns


def rewrite_as_video(codec: str, to: Path) -> None:
    """Write the sample's episodes again with its cameras as video."""
    from hf_vla.data.lerobot_writer import LeRobotWriter

    rows, info = raw_rows(SAMPLE), json.loads((SAMPLE / "meta/info.json").read_text())
    tasks = our_rows(SAMPLE)["task"]
    features = {key: f for key, f in info["features"].items() if key.startswith(("observation.", "action"))}
    cameras = [key for key in features if key.startswith("observation.images.")]
    features |= {key: features[key] | {"dtype": "video"} for key in cameras}
    with LeRobotWriter(to, info["fps"], features, info["robot_type"], video_codec=codec) as writer:
        for episode in np.unique(rows["episode_index"]):
            chosen = rows["episode_index"] == episode
            columns = {key: rows[key][chosen] for key in features} | {"action": rows["action"][chosen, 0]}
            writer.add_episode(columns, str(tasks[chosen][0]))
        writer.finish()


def compare(theirs: dict[str, np.ndarray], ours: dict[str, np.ndarray]) -> dict[str, float | bool]:
    """Give each column's largest difference; pictures in levels of 0 to 255, LeRobot's being (3, H, W) in [0, 1]."""
    differences: dict[str, float | bool] = {}
    for key, values in ours.items():
        if values.dtype.kind in "Ub":
            differences[key] = bool(np.array_equal(values, theirs[key]))
        elif key.startswith("observation.images."):
            pictures = theirs[key].transpose(0, 2, 3, 1) * 255
            differences[key] = round(float(np.abs(pictures - values).max()), 3)
        else:
            differences[key] = float(np.abs(theirs[key] - values).max())
    return differences


def check(store: str, python: Path, folder: Path) -> dict[str, object]:
    """Have LeRobot read the sample in one kind of storage, and compare."""
    dataset = SAMPLE if store == "image" else folder / store
    if store != "image":
        rewrite_as_video(store, dataset)
    dumped = folder / f"{store}.npz"
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "cache"),
        "HF_DATASETS_CACHE": str(folder),
    }
    subprocess.run([python, __file__, "--dump", dataset, dumped], check=True, env=environment)
    theirs = dict(np.load(dumped))
    stats = json.loads((dataset / "meta/stats.json").read_text())["action"]
    read_alike = all(
        np.allclose(theirs[f"stats/action/{name}"], stats[name]) for name in ("mean", "std", "q01", "q99")
    )
    return {
        "rows": len(theirs["index"]),
        "episodes": int(theirs["episodes"]),
        "largest_difference_to_raw_rows": compare(theirs, raw_rows(dataset)),
        "largest_difference_to_our_reader": compare(theirs, our_rows(dataset)),
        "stats_read_alike": bool(read_alike),
    }


def make_environment() -> Path:
    """Make LeRobot's own environment, or take the one that is there; return its interpreter."""
    python = ENVIRONMENT / "bin/python"
    if not (ENVIRONMENT / "installed").exists():
        venv.create(ENVIRONMENT, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", LEROBOT], check=True)
        (ENVIRONMENT / "installed").touch()
    return python


def facts(python: Path) -> dict[str, object]:
    """Say what it was measured with."""
    listing = subprocess.run(
        [python, "-m", "pip", "list", "--format", "json"], check=True, capture_output=True, text=True
    )
    theirs = {p["name"]: p["version"] for p in json.loads(listing.stdout)}
    wanted = ("lerobot", "datasets", "torch", "torchvision", "av", "numpy", "pyarrow")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, check=True, capture_output=True, text=True)
    return {
        "command": "python benchmarks/lerobot_opens_recording.py",
        "machine": f"{os.cpu_count()} CPU cores, no GPU, {platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "lerobot_environment": {name: theirs[name] for name in wanted},
        "our_environment": {name: importlib.metadata.version(name) for name in ("datasets", "av", "numpy", "pyarrow")},
        "commit": commit.stdout.strip(),
        "date": datetime.date.today().isoformat(),
    }


def main() -> None:
    """Compare every kind of storage and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dump", nargs=2, type=Path, metavar=("DATASET", "NPZ"), help="used in LeRobot's environment")
    arguments = parser.parse_args()
    if arguments.dump:
        dump(*arguments.dump)
        return
    python = make_environment()
    with tempfile.TemporaryDirectory() as folder:
        results = {store: check(store, python, Path(folder)) for store in STORES}
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(facts(python) | {"results": results}, indent=2) + "\n")
    print(RESULT.read_text())


if __name__ == "__main__":
    sys.exit(main())
