"""Conventions: what a file of them may say, and what it does to numbers and pictures."""

import numpy as np
import pytest

from hf_vla.convert import rotations
from hf_vla.convert.convention import CHANGES, KNOWN, load_convention, read_columns, read_task, settle
from hf_vla.convert.episode import RawEpisode
from hf_vla.convert.rotations import convert_rotation

TEXT = """
about: a toy
fps: 10
cameras: {front: {source: picture, rotate: 180, channels: bgr}}
state: [{source: state, columns: [1, 0], names: [b, a]}]
action: [{source: state, names: [da, db], then: [next_difference]}]
task: [told, otherwise]
drop_first: 1
drop_last: 1
"""


def load(tmp_path, old="", new=""):
    assert old in TEXT
    file = tmp_path / "toy.yaml"
    file.write_text(TEXT.replace(old, new))
    return load_convention(str(file))


def episode(length=5, texts=None, **changed):
    picture = np.zeros((length, 4, 4, 3), np.uint8)
    picture[:, 0, 0] = (255, 0, 0)
    columns = {"picture": picture, "state": np.arange(2.0 * length).reshape(length, 2) ** 2, **changed}
    return RawEpisode("demo", tuple(columns), columns.get, texts or {})


@pytest.mark.parametrize("name", sorted(path.stem for path in KNOWN.glob("*.yaml")))
def test_every_known_convention_can_be_read(name):
    assert load_convention(name).about


def test_columns_are_chosen_changed_and_cut(tmp_path):
    columns = read_columns(episode(), load(tmp_path), encode=False)
    assert columns["observation.state"].tolist() == [[9, 4], [25, 16], [49, 36]]
    assert columns["action"].tolist() == [[12, 16], [20, 24], [28, 32]]
    assert columns["observation.images.front"][0][3, 3].tolist() == [0, 0, 255]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("fps: 10", "fps: ten", "fps: Input should be a valid integer"),
        ("fps: 10", "speed: 10", "fps: Field required|speed"),
        ("rotate: 180", "rotate: 90", r"cameras\.front\.rotate"),
        ("next_difference", "next_diference", "no change is called 'next_diference'"),
        ("drop_last: 1", "", "set drop_last: 1"),
        ("then: [next_difference]", "rotation: [euler, matrix]", r"rotation is \[given, wanted\]"),
        ("about: a toy", "about: {", "can't be read as YAML"),
    ],
)
def test_a_mistake_is_named_with_its_file_and_key(tmp_path, old, new, words):
    with pytest.raises(ValueError, match=rf"(?s)toy\.yaml: .*({words})"):
        load(tmp_path, old, new)


def test_an_unknown_convention_names_the_known(tmp_path):
    with pytest.raises(FileNotFoundError, match="known are aloha, bridge, "):
        load_convention("brige")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"state": np.zeros((4, 2))}, "columns disagree in length"),
        ({"state": np.zeros((5, 1))}, r"state has 1 numbers a step, and the convention asks for \[1\]"),
        ({"state": np.zeros((5, 3))}, r"state gives 3 numbers, and the convention names \['da', 'db'\]"),
        ({"state": np.full((5, 2), np.inf)}, "observation.state isn't finite at 3 steps, first at step 1"),
        ({"picture": [b"no jpeg"] * 5}, "a picture that can't be decoded"),
        ({"picture": np.zeros((5, 4, 4, 3))}, "isn't pictures"),
    ],
)
def test_an_episode_that_does_not_fit_says_how(tmp_path, changed, words):
    with np.errstate(invalid="ignore"), pytest.raises(ValueError, match=words):
        read_columns(episode(**changed), load(tmp_path))


def test_the_instruction_is_looked_for_in_order(tmp_path):
    convention = load(tmp_path)
    assert read_task(episode(texts={"otherwise": " b "}), convention) == "b"
    assert read_task(episode(texts={"otherwise": "b"}, told=[b"a"] * 5), convention) == "a"
    assert read_task(episode(told=[b""] * 5), convention, "c") == "c"
    with pytest.raises(ValueError, match="no instruction under told or otherwise"):
        read_task(episode(), convention)


def test_a_gripper_goes_where_its_next_decided_command_says():
    commands = np.float32([[0.5], [1.0], [0.6], [0.0], [0.4], [0.3], [0.97], [0.6]])
    assert settle(commands)[:, 0].tolist() == [1, 1, 0, 0, 1, 1, 1, 1]


def test_a_difference_of_angles_takes_the_short_way():
    turned = CHANGES["next_angle_difference"](np.float32([[3.1], [-3.1], [-3.0]]))
    assert np.allclose(turned[:2, 0], [2 * np.pi - 6.2, 0.1], atol=1e-5) and np.isnan(turned[2])


@pytest.mark.parametrize("way", ["euler_xyz", "axis_angle", "quaternion_xyzw"])
def test_rotations_come_back(way):
    draw = np.random.default_rng(0)
    quaternions = draw.normal(size=(200, 4))
    quaternions[:3] = [[1, 0, 0, 0], [0, 0, 0, 1], [1e-9, 0, 0, 1]]
    matrices = rotations.TO_MATRIX["quaternion_xyzw"][1](quaternions)
    assert np.allclose(matrices @ matrices.transpose(0, 2, 1), np.eye(3)) and np.allclose(np.linalg.det(matrices), 1)
    back = rotations.TO_MATRIX[way][1](rotations.FROM_MATRIX[way](matrices))
    assert np.allclose(back, matrices, atol=1e-7)


def test_rotations_mean_what_they_say():
    quarter = convert_rotation(np.float32([[0, 0, np.pi / 2]]), "euler_xyz", "rotation_6d")
    assert np.allclose(quarter, [[0, 1, 0, -1, 0, 0]], atol=1e-6)
    half = np.sqrt(0.5)
    wxyz = np.float32([[half, half, 0, 0]])
    assert np.allclose(convert_rotation(wxyz, "quaternion_wxyz", "axis_angle"), [[np.pi / 2, 0, 0]], atol=1e-6)
    # Roll first, about the fixed x; then yaw: the hand's y axis ends up along z.
    both = convert_rotation(np.float32([[np.pi / 2, 0, np.pi / 2]]), "euler_xyz", "rotation_6d")
    assert np.allclose(both, [[0, 1, 0, 0, 0, 1]], atol=1e-6)
    with pytest.raises(ValueError, match="euler_xyz has 3 numbers, here are 4"):
        convert_rotation(wxyz, "euler_xyz", "axis_angle")
