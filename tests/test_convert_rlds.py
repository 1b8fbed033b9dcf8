"""RLDS to LeRobot: what is read, what is written, and what is left after a kill or a full disk."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from hf_vla.convert.convention import load_convention
from hf_vla.convert.parts import Settings, convert, convert_shard
from hf_vla.convert.rlds import RLDSSource
from hf_vla.convert.tfrecord import crc32c, parse_example, read_records
from hf_vla.data.lerobot_format import open_dataset
from hf_vla.data.windows import WindowDataset
from hf_vla.prepare import build_trainer
from hf_vla.recipe import View
from tests import rlds_files
from tests.tiny_run import tiny_recipe

ROOT = Path(__file__).parent.parent
LENGTHS = [[4, 5], [3], [6, 2]]


@pytest.fixture(scope="module")
def bridge(tmp_path_factory):
    numbers = iter(range(100))
    shards = [[rlds_files.bridge_episode(next(numbers), n, f"task {n % 2}") for n in shard] for shard in LENGTHS]
    return rlds_files.write(tmp_path_factory.mktemp("rlds") / "toy/1.0.0", shards)


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch, request):
    """Convert without starting workers, which cost seconds each, but where a test is about them."""
    if "slow" not in request.keywords:
        monkeypatch.setattr("hf_vla.convert.parts.ProcessPoolExecutor", _ThisProcess)


class _ThisProcess:
    def __init__(self, *arguments, **settings):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def shutdown(self, **settings):
        pass

    def submit(self, function, *arguments):
        from concurrent.futures import Future

        future = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


def settings(convention="bridge", **changes):
    return Settings(load_convention(convention), **changes)


@pytest.mark.parametrize("data", [b"", b"a", b"123456789", os.urandom(1000), os.urandom(4097)], ids=len)
def test_the_checksum_is_crc32c(data):
    assert crc32c(data) == rlds_files.crc32c(data)


def test_an_example_is_read_as_it_was_written(tmp_path):
    features = {"floats": np.float32([1.5, -2]), "numbers": np.int64([3, -4, 2**40]), "texts": [b"a", b""], "none": []}
    found = parse_example(rlds_files.example(features))
    assert found["floats"].tolist() == [1.5, -2] and found["numbers"].tolist() == [3, -4, 2**40]
    assert found["texts"] == [b"a", b""] and found["none"] == []


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: data[:-40], "record 1 is damaged, it has .* cut short"),
        (lambda data: data[:-500] + bytes([data[-500] ^ 1]) + data[-499:], "record 1 is damaged, its checksum"),
        (lambda data: data[: len(data) // 2], "cut short"),
        (lambda data: data + b"\1\2\3", "record 2 is damaged, its length"),
        (lambda data: b"\1" + data[1:], "record 0 is damaged, its length"),
    ],
    ids=["cut", "flipped", "half", "tail", "length"],
)
def test_a_damaged_file_is_named_with_its_record(bridge, tmp_path, damage, words):
    source = next(bridge.glob("*-00000-of-*"))
    file = tmp_path / "damaged"
    file.write_bytes(damage(source.read_bytes()))
    with pytest.raises(ValueError, match=f"damaged.*{words}"):
        list(read_records(file))


def test_missing_files_and_splits_are_errors(bridge, tmp_path):
    with pytest.raises(FileNotFoundError, match="no TFRecord file of split 'val'; it has train"):
        RLDSSource(bridge, "val").shards()
    with pytest.raises(FileNotFoundError, match="expected one RLDS dataset"):
        RLDSSource(tmp_path)
    copy = rlds_files.write(tmp_path / "copy", [[rlds_files.bridge_episode(0, 2)]] * 3)
    next(copy.glob("*-00001-of-*")).unlink()
    with pytest.raises(FileNotFoundError, match="1 of 3 files are missing, first 1"):
        RLDSSource(copy).shards()


def test_a_file_that_ends_between_records_is_noticed(tmp_path):
    folder = rlds_files.write(tmp_path / "toy", [[rlds_files.bridge_episode(e, 3) for e in range(2)]])
    file = next(folder.glob("*.tfrecord-*"))
    data = file.read_bytes()
    file.write_bytes(data[: len(rlds_files.frame(next(read_records(file))))])
    source = RLDSSource(folder)
    with pytest.raises(ValueError, match=r"1 episodes, where dataset_info\.json says 2"):
        list(source.episodes(source.shards()[0]))


def test_episodes_become_rows_of_a_dataset_that_trains(bridge, tmp_path):
    steps = []
    tally = convert(RLDSSource(bridge.parent), tmp_path / "out", settings(), 1, lambda *step: steps.append(step))
    assert (tally.episodes, tally.frames, tally.skipped) == (5, sum(map(sum, LENGTHS)) - 5, [])
    assert steps[0] == ("convert", 0, 3) and steps[3] == ("convert", 3, 3) and steps[-1] == ("merge", 3, 3)
    info = open_dataset(tmp_path / "out")
    assert info.cameras == ("image_0", "image_1", "image_2") and info.fps == 5
    assert info.action_names == ["dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper"]
    data = WindowDataset(info, [View("image_0"), View("image_2")], 4)
    assert [e.length for e in info.episodes] == [3, 4, 2, 5, 1]
    last = data[len(data) - 1]  # episode 4, whose step 0 was dropped
    assert np.allclose(last.state, [4, 1, 0, 0, 0, 0, 0.5]) and np.allclose(last.actions[0], last.state / 10)
    assert last.task == "task 0" and last.action_is_pad.tolist() == [False, True, True, True]
    assert np.abs(last.images[1].mean((0, 1)) - [40, 20, 120]).max() < 4
    table = pq.read_table(tmp_path / "out/data")
    assert table["index"].to_pylist() == list(range(len(data)))
    rows = pq.read_table(tmp_path / "out/meta/episodes").to_pylist()
    assert [(r["dataset_from_index"], r["dataset_to_index"]) for r in rows] == [
        (0, 3),
        (3, 7),
        (7, 9),
        (9, 14),
        (14, 15),
    ]
    assert rows[4]["stats/index/min"] == [14] and rows[4]["stats/episode_index/max"] == [4]
    assert rows[2]["stats/task_index/mean"] == [table["task_index"].to_pylist()[7]]


def test_what_was_converted_trains_as_an_image_pair(bridge, tmp_path):
    convert(RLDSSource(bridge), tmp_path / "out", settings())
    views = [{"camera": "image_0"}, {"camera": "image_2"}]
    trainer = build_trainer(tiny_recipe(data={"dataset": str(tmp_path / "out"), "views": views}), tmp_path / "run")
    assert np.isfinite(trainer.train().training_loss) and trainer.processing_class.views == ["image_0", "image_2"]


def test_encoded_pictures_stay_the_bytes_they_were(bridge, tmp_path):
    convert(RLDSSource(bridge), tmp_path / "out", settings())
    given = next(read_records(next(bridge.glob("*-00000-of-*"))))
    kept = pq.read_table(tmp_path / "out/data")["observation.images.image_1"][0].as_py()["bytes"]
    assert kept == parse_example(given)["steps/observation/image_1"][1]


def test_relabelled_actions_are_what_the_state_did_next(bridge, tmp_path):
    convert(RLDSSource(bridge), tmp_path / "out", settings("bridge_relabelled"))
    data = WindowDataset(open_dataset(tmp_path / "out"), [View("image_0")], 1)
    first = data.info.episodes[0]
    assert first.length == LENGTHS[0][0] - 2
    assert np.allclose(np.diff(data.states[: first.length], axis=0)[:, :6], data.actions[: first.length - 1, :6])
    assert np.allclose(data.actions[:, 1], 1) and set(data.actions[:, 6]) == {0.0}


def test_episodes_that_cannot_be_used_are_named_or_skipped_and_counted(tmp_path):
    broken = rlds_files.bridge_episode(1, 3)
    broken["steps/action"] = np.full(21, np.nan, np.float32)
    folder = rlds_files.write(
        tmp_path / "toy", [[rlds_files.bridge_episode(0, 3), broken, rlds_files.bridge_episode(2, 1)]]
    )
    with pytest.raises(ValueError, match=r"tfrecord-00000-of-00001: episode record 1: action isn't finite at 2 steps"):
        convert(RLDSSource(folder), tmp_path / "out", settings())
    assert not (tmp_path / "out").exists()
    for leftover in tmp_path.glob(".out.parts/*"):
        assert leftover.name in ("plan.json", "lock")
    (tmp_path / ".out.parts/plan.json").unlink()
    tally = convert(RLDSSource(folder), tmp_path / "out", settings(skip_broken=True))
    assert tally.episodes == 1 and len(tally.skipped) == 2 and "no step is left" in tally.skipped[1]
    assert json.loads((tmp_path / "out/meta/recording.json").read_text())["skipped"] == tally.skipped


def test_an_episode_without_text_needs_one(tmp_path):
    folder = rlds_files.write(tmp_path / "toy", [[rlds_files.bridge_episode(0, 3, text="")]])
    with pytest.raises(ValueError, match=r"episode record 0: has no instruction under language_instruction; .*--task"):
        convert(RLDSSource(folder), tmp_path / "out", settings())
    convert(RLDSSource(folder), tmp_path / "told", settings(task="do it"))
    assert open_dataset(tmp_path / "told").episodes[0].tasks == ("do it",)


def test_other_settings_do_not_go_on_with_parts(bridge, tmp_path):
    source = RLDSSource(bridge)
    folder = tmp_path / ".out.parts"
    convert(source, tmp_path / "other", settings())
    folder.mkdir()
    (folder / "plan.json").write_text("{}")
    with pytest.raises(FileExistsError, match="another source or other settings"):
        convert(source, tmp_path / "out", settings())


def test_oxe_and_libero_layouts_are_read(tmp_path):
    length = 3
    pictures = [rlds_files.picture(step, 0, 0) for step in range(length)]
    oxe = {
        "observation": rlds_files.group(
            state=rlds_files.tensor(7), image=rlds_files.image(), natural_language_instruction=rlds_files.TEXT
        ),
        "action": rlds_files.group(
            world_vector=rlds_files.tensor(3),
            rotation_delta=rlds_files.tensor(3),
            open_gripper=rlds_files.tensor(dtype="bool"),
        ),
    }
    episode = {
        "steps/observation/state": np.zeros(7 * length, np.float32),
        "steps/observation/image": pictures,
        "steps/observation/natural_language_instruction": [b"wipe"] * length,
        "steps/action/world_vector": np.arange(3 * length, dtype=np.float32),
        "steps/action/rotation_delta": np.zeros(3 * length, np.float32),
        "steps/action/open_gripper": np.int64([0, 1, 1]),
    }
    convert(RLDSSource(rlds_files.write(tmp_path / "oxe", [[episode]], oxe)), tmp_path / "a", settings("bridge_oxe"))
    data = WindowDataset(open_dataset(tmp_path / "a"), [View("image")], 1)
    assert data.actions.tolist() == [[3, 4, 5, 0, 0, 0, 1], [6, 7, 8, 0, 0, 0, 1]] and set(data.tasks) == {"wipe"}
    libero = {
        "observation": rlds_files.group(
            state=rlds_files.tensor(8), image=rlds_files.image(), wrist_image=rlds_files.image()
        ),
        "action": rlds_files.tensor(7),
        "language_instruction": rlds_files.TEXT,
    }
    action = np.zeros((length, 7), np.float32)
    action[:, 6] = [-1, 1, 0]
    episode = {
        "steps/observation/state": np.zeros(8 * length, np.float32),
        "steps/observation/image": pictures,
        "steps/observation/wrist_image": pictures,
        "steps/action": action.reshape(-1),
        "steps/language_instruction": [b"lift"] * length,
    }
    source = RLDSSource(rlds_files.write(tmp_path / "libero", [[episode]], libero))
    convert(source, tmp_path / "b", settings("libero_rlds"))
    data = WindowDataset(open_dataset(tmp_path / "b"), [View("image"), View("wrist_image")], 1)
    assert data.actions[:, 6].tolist() == [1, 0, 1]  # open, closed, open


def convert_apart(folder: Path, source_class: str, limit: int | None = None) -> subprocess.CompletedProcess:
    """Convert in a process of its own, as a user's command does, perhaps with a limit on the size of files."""
    code = f"""
import resource, signal
from pathlib import Path
from hf_vla.convert.convention import load_convention
from hf_vla.convert.parts import Settings, convert
from hf_vla.convert.rlds import RLDSSource
from tests.rlds_files import Interrupted
if __name__ == "__main__":
    if {limit}:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
    folder = Path({str(folder)!r})
    convert({source_class}(folder / "toy"), folder / "out", Settings(load_convention("bridge")), 2)
"""
    script = folder / "run.py"
    script.write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, script], cwd=ROOT, env=environment, capture_output=True, text=True)


def files_of(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_killed_it_goes_on_and_ends_as_if_undisturbed(bridge, tmp_path):
    folder = tmp_path / "killed"
    source = rlds_files.write(folder / "toy", [[rlds_files.bridge_episode(e, 4 + e)] * 2 for e in range(3)])
    (source / "kill").touch()
    assert convert_apart(folder, "Interrupted").returncode == -signal.SIGKILL
    assert not (folder / "out").exists() and (folder / ".out.parts/part-000000.json").exists()
    first = (folder / ".out.parts/part-000000.json").stat().st_mtime_ns
    assert not (folder / ".out.parts/part-000001.json").exists()
    done = convert_apart(folder, "Interrupted")
    assert done.returncode == 0, done.stderr
    assert not (folder / ".out.parts").exists() and first
    convert(RLDSSource(source), tmp_path / "undisturbed", settings())
    assert files_of(folder / "out") == files_of(tmp_path / "undisturbed")


@pytest.mark.slow
def test_a_full_disk_is_one_error_and_leaves_nothing_that_looks_whole(tmp_path):
    folder = tmp_path / "full"
    rlds_files.write(
        folder / "toy", [[rlds_files.bridge_episode(0, 3)], [rlds_files.bridge_episode(1, 120, noisy=True)]]
    )
    failed = convert_apart(folder, "RLDSSource", limit=60_000)
    assert failed.returncode == 1
    assert failed.stderr.strip().splitlines()[-1].startswith(f"OSError: {folder / 'out'}: no room left to write")
    assert sorted(path.name for path in (folder / ".out.parts").iterdir()) == [
        "lock",
        "part-000000",
        "part-000000.json",
        "plan.json",
    ]
    assert not (folder / "out").exists()
    assert convert_apart(folder, "RLDSSource").returncode == 0
    assert [episode.length for episode in open_dataset(folder / "out").episodes] == [2, 119]


def test_a_part_without_a_tally_is_made_anew(bridge, tmp_path):
    source = RLDSSource(bridge)
    part = tmp_path / "part-000000"
    first = convert_shard(source, source.shards()[0], part, settings())
    (tmp_path / "part-000000.json").unlink()
    assert convert_shard(source, source.shards()[0], part, settings()) == first
