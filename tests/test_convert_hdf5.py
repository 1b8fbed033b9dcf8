"""HDF5 to LeRobot, from real files in the layouts of LIBERO, robomimic and ALOHA."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from hf_vla.convert.convention import load_convention
from hf_vla.convert.parts import Settings, Tally, convert_shard
from hf_vla.data.lerobot_format import open_dataset
from hf_vla.data.windows import WindowDataset
from hf_vla.recipe import View

h5py = pytest.importorskip("h5py")

from hf_vla.convert.hdf5 import HDF5Source  # noqa: E402

SIDE = 12


def pictures(length, corner):
    """Dark pictures whose upper left corner says where they are."""
    stack = np.zeros((length, SIDE, SIDE, 3), np.uint8)
    stack[:, :4, :4] = corner
    return stack


def write_libero(path, lengths, instruction="pick up the bowl"):
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["problem_info"] = json.dumps({"language_instruction": list(instruction)})
        for number, length in enumerate(lengths):
            demo = data.create_group(f"demo_{number}")
            demo["actions"] = np.tile(np.float64([0.1 * number, 0, 0, 0, 0, 0, 0]), (length, 1))
            demo["actions"][:, 6] = np.where(np.arange(length) % 2, 1, -1)
            demo["dones"] = np.zeros(length, np.uint8)
            demo["obs/agentview_rgb"] = pictures(length, (250, 0, 0))
            demo["obs/eye_in_hand_rgb"] = pictures(length, (0, 250, 0))
            demo["obs/ee_states"] = np.full((length, 6), number, np.float64)
            demo["obs/gripper_states"] = np.zeros((length, 2))
    return path


def write_robomimic(path, length=4):
    with h5py.File(path, "w") as file:
        demo = file.create_group("data/demo_0")
        demo["actions"] = np.zeros((length, 7))
        demo["obs/agentview_image"] = pictures(length, (0, 0, 250))
        demo["obs/robot0_eye_in_hand_image"] = pictures(length, (0, 250, 0))
        demo["obs/robot0_eef_pos"] = np.ones((length, 3))
        half = np.sqrt(0.5)
        demo["obs/robot0_eef_quat"] = np.tile([0, 0, half, half], (length, 1))  # a quarter turn about z
        demo["obs/robot0_gripper_qpos"] = np.zeros((length, 2))
    return path


def write_aloha(path, length, compressed):
    with h5py.File(path, "w") as file:
        file.attrs["sim"] = False
        file["action"] = np.arange(14) + np.arange(length)[:, None] / 10
        file["observations/qpos"] = np.zeros((length, 14))
        file["observations/qvel"] = np.zeros((length, 14))
        for camera, corner in (("cam_high", (250, 0, 0)), ("cam_left_wrist", (0, 0, 250))):
            raw = pictures(length, corner)
            file[f"observations/images/{camera}"] = padded(raw) if compressed else raw
    return path


def padded(raw):
    encoded = []
    for picture in raw:
        stream = io.BytesIO()
        Image.fromarray(picture).save(stream, "JPEG", quality=95)
        encoded.append(np.frombuffer(stream.getvalue(), np.uint8))
    rows = np.zeros((len(raw), max(map(len, encoded)) + 7), np.uint8)
    for row, picture in zip(rows, encoded, strict=True):
        row[: len(picture)] = picture
    return rows


def convert(path, to, convention, **changes) -> tuple[WindowDataset, Tally]:
    """Convert the first file of a source: one part is a dataset already."""
    source = HDF5Source(path)
    settings = Settings(load_convention(convention), **changes)
    tally = convert_shard(source, source.shards()[0], to / "part-000000", settings)
    info = open_dataset(to / "part-000000")
    return WindowDataset(info, [View(name) for name in info.cameras], 2), tally


def brightest_corner(picture):
    halves = [picture[:6, :6], picture[:6, 6:], picture[6:, :6], picture[6:, 6:]]
    return int(np.argmax([half.astype(int).sum() for half in halves]))


def test_libero_pictures_are_turned_and_one_means_open(tmp_path):
    path = write_libero(tmp_path / "LIVING_ROOM_bowl_demo.hdf5", [3] * 11)
    data, tally = convert(path, tmp_path, "libero_hdf5")
    assert (tally.episodes, tally.frames) == (11, 33) and data.info.fps == 20
    assert data.states[-1][0] == 10 and data.states[6][0] == 2, "demo_10 comes after demo_9"
    assert data.actions[:3, 6].tolist() == [1, 0, 1], "-1 is open"
    assert set(data.tasks) == {"pick up the bowl"}
    sample = data[0]
    assert [brightest_corner(picture) for picture in sample.images] == [3, 3]
    assert sample.images[0][-1, -1].argmax() == 0 and sample.images[1][-1, -1].argmax() == 1


def test_the_file_name_is_the_task_where_nothing_else_is(tmp_path):
    path = write_libero(tmp_path / "open_the_drawer_demo.hdf5", [2], instruction="")
    data, _ = convert(path, tmp_path, "libero_hdf5")
    assert set(data.tasks) == {"open the drawer"}


def test_robomimic_quaternions_become_axis_times_angle(tmp_path):
    with pytest.raises(ValueError, match=r"low_dim\.hdf5: episode demo_0: has no instruction"):
        convert(write_robomimic(tmp_path / "low_dim.hdf5"), tmp_path, "robomimic")
    data, _ = convert(tmp_path / "low_dim.hdf5", tmp_path, "robomimic", task="lift")
    assert np.allclose(data.states[0], [1, 1, 1, 0, 0, np.pi / 2, 0, 0])
    assert brightest_corner(data[0].images[0]) == 0


@pytest.mark.parametrize("compressed", [False, True], ids=["raw", "compressed"])
def test_aloha_files_are_one_episode_each(tmp_path, compressed):
    folder = tmp_path / "aloha"
    folder.mkdir()
    for number in (10, 9):
        write_aloha(folder / f"episode_{number}.hdf5", number, compressed)
    assert [shard.file.stem for shard in HDF5Source(folder).shards()] == ["episode_9", "episode_10"]
    data, tally = convert(folder, tmp_path, "aloha", task="stack")
    assert tally.frames == 9 and data.info.action_dim == 14 and data.info.fps == 50
    assert np.allclose(data.actions[8], np.arange(14) + 0.8)
    assert brightest_corner(data[0].images[0]) == 0
    assert data[0].images[0][1, 1].argmax() == 0 and data[0].images[1][1, 1].argmax() == 2


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda path: path.write_bytes(b"\x89HDF no more"), "can't be read as HDF5"),
        (lambda path: path.write_bytes(write_libero(path, [30]).read_bytes()[:-9000]), "can't be read as HDF5"),
        (lambda path: h5py.File(path, "w").create_group("poses").file.close(), "neither /data/demo_<i>"),
    ],
    ids=["no_hdf5", "cut", "other"],
)
def test_a_file_that_is_something_else_is_named(tmp_path, write, words):
    path = tmp_path / "bad.hdf5"
    write(path)
    with pytest.raises(ValueError, match=rf"bad\.hdf5: .*{words}"):
        convert(path, tmp_path, "libero_hdf5")
    assert not list(tmp_path.glob("*part*"))


def test_an_empty_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no \.hdf5 or \.h5 file"):
        HDF5Source(tmp_path).shards()


def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path):
    with pytest.raises(ValueError, match=r"demo_0: has no column 'obs/agentview_rgb'; it has actions, "):
        convert(write_robomimic(tmp_path / "x.hdf5"), tmp_path, "libero_hdf5")
