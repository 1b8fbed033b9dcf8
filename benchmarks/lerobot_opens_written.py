"""Does LeRobot itself open what is written here, and see the same rows and pictures? And is v2.1 to v3.0 as it converts?

    python -m benchmarks.lerobot_opens_written --bridge BRIDGE_RLDS_FOLDER --g1 G1_LEROBOT_FOLDER

Recorded (the committed sample), converted from RLDS (the whole Bridge sample) and from HDF5 (files in the layouts of ALOHA
and LIBERO): `LeRobotDataset` reads every item, by its own choice of decoder; so does our reader, and the raw rows of the
parquet files are there to judge both. The G1 sample, v2.1, is converted by LeRobot's own script and by ours, and compared
row by row: columns, decoded pictures, the table of episodes and the statistics.
"""

import argparse
import io
import json
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.lerobot_datasets import SAMPLE, make_whole, rewrite
from benchmarks.lerobot_environment import facts_of, make_environment, run_in_lerobot, working_backends
from benchmarks.result import RESULTS, write_result
from hf_vla.convert.convention import load_convention
from hf_vla.convert.hdf5 import HDF5Source
from hf_vla.convert.lerobot_v2 import to_v3
from hf_vla.convert.parts import Settings, convert
from hf_vla.convert.rlds import RLDSSource
from hf_vla.data.lerobot_format import open_dataset
from hf_vla.data.windows import WindowDataset
from hf_vla.recipe import View
from hf_vla.sample import ACTION, IMAGES, STATE
from tests.test_convert_hdf5 import write_aloha, write_libero

CHUNK = 16
STORES = ("image", "h264", "av1")
ROUNDING = 1e-5
"""Of statistics, which are float32 here and there."""
STATISTICS = ("mean", "std", "min", "max", "q01", "q99")

Rows = dict[str, np.ndarray]


def main() -> None:
    """Write, have LeRobot read, compare, and write what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bridge", type=Path, required=True, help="RLDS folder of the Bridge sample")
    parser.add_argument("--g1", type=Path, required=True, help="folder of the G1 sample, LeRobot v2.1")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the result is written")
    arguments = parser.parse_args()
    python = make_environment()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        facts = facts_of(python, folder / "cache")
        read = partial(read_by_lerobot, python, folder / "cache", working_backends(facts)[0])
        results = {
            "written": {name: check(path, read) for name, path in write_all(folder, arguments.bridge).items()},
            "v21_to_v30": compare_conversions(arguments.g1, folder, python, read),
        }
    verdict = {"all_alike": is_alike(results)}
    print(
        f"Written: {write_result('lerobot_opens_written', {'lerobot': facts} | verdict | results, arguments.results)}"
    )


def write_all(folder: Path, bridge: Path) -> dict[str, Path]:
    """Write each kind of dataset that this project writes."""
    datasets = {"recorded, image": SAMPLE}
    datasets |= {f"recorded, {store}": rewrite(SAMPLE, store, folder / f"recorded_{store}") for store in STORES[1:]}
    for store in STORES:
        to = datasets[f"Bridge from RLDS, {store}"] = folder / f"bridge_{store}"
        convert(RLDSSource(bridge), to, Settings(load_convention("bridge"), store=store))
    raw = folder / "hdf5"
    (raw / "aloha").mkdir(parents=True)
    for number, length in enumerate((9, 5)):
        write_aloha(raw / f"aloha/episode_{number}.hdf5", length, compressed=True)
    write_libero(raw / "pick_up_the_bowl_demo.hdf5", [7, 4, 20])
    settings = {"aloha": Settings(load_convention("aloha"), task="stack the cups")}
    settings["libero_hdf5"] = Settings(load_convention("libero_hdf5"))
    for (name, how), path in zip(settings.items(), (raw / "aloha", raw / "pick_up_the_bowl_demo.hdf5"), strict=True):
        to = datasets[f"{name.removesuffix('_hdf5').upper()} from HDF5, image"] = folder / name
        convert(HDF5Source(path), to, how)
    return datasets


def read_by_lerobot(python: Path, cache: Path, backend: str, dataset: Path) -> Rows:
    """Read every item through `LeRobotDataset`."""
    file = cache / "rows.npz"
    run_in_lerobot(python, cache, "dump", dataset, file, CHUNK, backend)
    return dict(np.load(file))


def raw_rows(dataset: Path) -> Rows:
    """Read the parquet files alone, and pad each chunk as the format says: the last action of the episode repeats."""
    table = pq.read_table(dataset / "data")
    columns = {
        name: np.stack(table[name].to_numpy()) for name in table.column_names if not name.startswith(f"{IMAGES}.")
    }
    ends = np.searchsorted(columns["episode_index"], columns["episode_index"], side="right")
    wanted = np.arange(len(table))[:, None] + np.arange(CHUNK)
    columns |= {
        ACTION: columns[ACTION][np.minimum(wanted, ends[:, None] - 1)],
        "action_is_pad": wanted >= ends[:, None],
    }
    for name in (name for name in table.column_names if name.startswith(f"{IMAGES}.")):
        pictures = [Image.open(io.BytesIO(row["bytes"])) for row in table[name].to_pylist()]
        columns[name] = np.stack([np.asarray(picture) for picture in pictures])
    return columns


def our_rows(dataset: Path) -> Rows:
    """Read the same through `WindowDataset`."""
    info = open_dataset(dataset)
    data = WindowDataset(info, [View(camera) for camera in info.cameras], CHUNK)
    samples = [data[i] for i in range(len(data))]
    columns = {
        key: np.stack([sample.images[v] for sample in samples]) for v, key in enumerate(info.camera_keys.values())
    }
    columns |= {STATE: np.stack([sample.state for sample in samples])}
    columns |= {ACTION: np.stack([sample.actions for sample in samples])}
    columns |= {"action_is_pad": np.stack([sample.action_is_pad for sample in samples])}
    columns |= {f"stats/{key}/{name}": info.stats[key][name] for key in (STATE, ACTION) for name in STATISTICS}
    return columns | {"task": np.array([sample.task for sample in samples])}


def check(dataset: Path, read: Any) -> dict[str, Any]:
    """Have LeRobot read a dataset, and say how far what it sees is from the raw rows and from what we read."""
    theirs = read(dataset)
    counts = {"rows": len(theirs["index"]), "episodes": len(np.unique(theirs["episode_index"]))}
    return counts | {
        "largest_difference_to_raw_rows": differences(theirs, raw_rows(dataset)),
        "largest_difference_to_our_reader": differences(theirs, our_rows(dataset)),
    }


def differences(theirs: Rows, ours: Rows) -> dict[str, float | str]:
    """Give each column's largest difference, pictures' in levels of 0 to 255; texts are `same` or not."""
    return {key: difference(theirs[key], ours[key]) if key in theirs else "LeRobot has none" for key in ours}


def difference(theirs: np.ndarray, ours: np.ndarray) -> float | str:
    """Give the largest difference of two arrays of numbers, or say whether texts are the same."""
    if theirs.shape != ours.shape and theirs.size != ours.size:
        return f"shapes {theirs.shape} and {ours.shape}"
    if ours.dtype.kind in "UO":
        return "same" if np.array_equal(theirs, ours) else "differ"
    return float(np.abs(theirs.astype(np.float64).reshape(ours.shape) - ours.astype(np.float64)).max())


def compare_conversions(g1: Path, folder: Path, python: Path, read: Any) -> dict[str, Any]:
    """Convert the same v2.1 folder by LeRobot's script and by ours."""
    whole = make_whole(g1, folder / "whole")
    shutil.copytree(whole, folder / "by_lerobot/g1")
    run_in_lerobot(python, folder / "cache", "convert", folder / "by_lerobot", "g1")
    theirs, ours = folder / "by_lerobot/g1", to_v3(whole, folder / "by_us")
    tables = {name: [pq.read_table(root / name) for root in (theirs, ours)] for name in ("data", "meta/episodes")}
    stats = [json.loads((root / "meta/stats.json").read_text()) for root in (theirs, ours)]
    return {
        "rows": len(tables["data"][0]),
        "data": compare_tables(*tables["data"]),
        "read_by_us": differences(our_rows(theirs), our_rows(ours)),
        "read_by_lerobot": differences(read(theirs), read(ours)),
        "ours_beside_v21_itself": differences(our_rows(whole), our_rows(ours)),
        "episodes": compare_tables(*tables["meta/episodes"]),
        "stats": {key: compare_stats(stats[0][key], stats[1][key]) for key in stats[0]},
    }


def compare_tables(theirs: Any, ours: Any) -> dict[str, Any]:
    """Compare two parquet tables column by column, and name the columns of one alone."""
    shared = [name for name in theirs.column_names if name in ours.column_names]
    arrays = {name: [_array(table[name].to_pylist()) for table in (theirs, ours)] for name in shared}
    return {
        "largest_difference": {name: difference(*pair) for name, pair in arrays.items()},
        "lerobot_alone": [name for name in theirs.column_names if name not in shared],
        "ours_alone": [name for name in ours.column_names if name not in shared],
    }


def compare_stats(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, float | str]:
    """Compare the statistics that both have."""
    return {name: difference(_array(theirs[name]), _array(ours[name])) for name in theirs if name in ours}


def _array(values: list) -> np.ndarray:
    return np.array(values)


def is_alike(results: dict[str, Any]) -> bool:
    """Say whether LeRobot saw the same in everything written: rows and pictures to the last bit, statistics to rounding."""
    compared = [
        dataset[side]
        for dataset in results["written"].values()
        for side in ("largest_difference_to_raw_rows", "largest_difference_to_our_reader")
    ]
    conversion = results["v21_to_v30"]
    compared += [conversion["data"]["largest_difference"]]
    compared += [conversion[side] for side in ("read_by_us", "read_by_lerobot", "ours_beside_v21_itself")]
    return all(_is_same(key, value) for found in compared for key, value in found.items())


def _is_same(key: str, value: float | str) -> bool:
    if key.startswith("stats/"):
        return value == "LeRobot has none" or value < ROUNDING
    return value in (0.0, "same")


if __name__ == "__main__":
    main()
