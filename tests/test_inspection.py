"""What an inspection finds: nothing in a good set, and each fault that is put into it."""

import json
import os
import re
import shutil
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from hf_vla.cli import app
from hf_vla.data.lerobot_writer import LeRobotWriter, image_feature, vector_feature
from hf_vla.data.video import said_rate
from hf_vla.inspection import inspect
from hf_vla.inspection.number_checks import Vector, check_commands
from tests import lerobot_folders, rlds_files
from tests.tiny_run import SAMPLE

SHARED = Path(os.environ.get("HF_VLA_SHARED", Path(__file__).parents[2] / "shared"))
LENGTHS = (22, 30, 20, 26, 28, 22)
SIDE = 32


def drive(episode, length):
    """Smooth movement that differs from episode to episode, and two cameras that see it."""
    draw = np.random.default_rng(episode)
    phase = np.linspace(0, 2, length)[:, None] + draw.uniform(0, 3, 3)
    state = np.sin(phase * [1, 1.3, 1.7]).astype(np.float32)
    action = np.gradient(state, axis=0).astype(np.float32) + draw.normal(0, 0.01, state.shape).astype(np.float32)
    gripper = (np.arange(length) > length / 2).astype(np.float32)[:, None]
    pictures = {
        camera: [picture(state[i], shade) for i in range(length)] for camera, shade in (("top", 60), ("wrist", 140))
    }
    return np.hstack([state, gripper]), np.hstack([action, gripper]), pictures


def picture(state, shade):
    frame = np.full((SIDE, SIDE, 3), shade, np.uint8)
    x, y = ((state[:2] + 1) * (SIDE - 8) / 2).astype(int)
    frame[y : y + 8, x : x + 8] = (230, 40, 40)
    return frame


def write(root, storage="image", change=lambda episode, state, action, pictures: None):
    names = ["x", "y", "z", "gripper"]
    features = {f"observation.images.{camera}": image_feature(SIDE, SIDE, storage) for camera in ("top", "wrist")}
    features |= {"observation.state": vector_feature(names), "action": vector_feature(names)}
    with LeRobotWriter(root, 10, features) as writer:
        for episode, length in enumerate(LENGTHS):
            state, action, pictures = drive(episode, length)
            change(episode, state, action, pictures)
            columns = {f"observation.images.{camera}": seen for camera, seen in pictures.items()}
            writer.add_episode({**columns, "observation.state": state, "action": action}, f"task {episode % 2}")
        return writer.finish()


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return write(tmp_path_factory.mktemp("good") / "toy")


def rewrite(root, **columns):
    """Change columns of the one data file: name to function of the values."""
    file = root / "data/chunk-000/file-000.parquet"
    table = pq.read_table(file)
    for name, change in columns.items():
        place = table.schema.get_field_index(name)
        values = change(np.stack(table[name].to_numpy()))
        array = pa.array(values.tolist(), table.schema.field(place).type)
        table = table.set_column(place, table.schema.field(place), array)
    pq.write_table(table, file)


def with_rows(rows, value):
    def change(values):
        values = values.copy()
        values[rows] = value
        return values

    return change


def rewrite_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def cut(path, share=0.5):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def slow_episode(values):
    values = values.copy()
    values[: LENGTHS[0]] *= 2
    return values


def wrong_length(root):
    file = root / "meta/episodes/chunk-000/file-000.parquet"
    table = pq.read_table(file)
    place = table.schema.get_field_index("length")
    pq.write_table(table.set_column(place, "length", pa.array([5, *LENGTHS[1:]])), file)


def wrong_mean(root):
    stats = json.loads((root / "meta/stats.json").read_text())
    stats["action"]["mean"] = [5.0] * 4
    (root / "meta/stats.json").write_text(json.dumps(stats))


FAULTS = {
    "nan": (
        "error",
        lambda root: rewrite(root, action=with_rows(40, np.nan)),
        "episodes 1; first in episode 1, frame 18",
    ),
    "out_of_range": (
        "warning",
        lambda root: rewrite(root, action=with_rows((40, 1), 90.0)),
        "90 in episode 1, frame 18",
    ),
    "near_constant": (
        "warning",
        lambda root: rewrite(root, action=lambda v: v * [1, 1, 1e-3, 1]),
        "action: z hardly move",
    ),
    "constant": (
        "warning",
        lambda root: rewrite(root, action=with_rows((slice(None), 2), 1.0)),
        "the same number in z",
    ),
    "jump": (
        "warning",
        lambda root: rewrite(root, **{"observation.state": with_rows((slice(40, 46), 0), 3.0)}),
        "episode 1 at frame 18 (x)",
    ),
    "wrong_fps": ("warning", lambda root: rewrite_json(root / "meta/info.json", fps=30), "info.json says 30 fps"),
    "mixed_fps": ("error", lambda root: rewrite(root, timestamp=slow_episode), "another rate than"),
    "uneven_time": ("warning", lambda root: rewrite(root, timestamp=with_rows(30, 0.65)), "in episode 1 (frame 8"),
    "lengths_disagree": ("warning", wrong_length, "1 episodes have another length than meta/ says"),
    "task_without_text": (
        "error",
        lambda root: rewrite(root, task_index=with_rows(50, 7)),
        "task_index 7 has no text",
    ),
    "wrong_stats": ("error", wrong_mean, "meta/stats.json isn't of these rows"),
    "frame_numbers": ("error", lambda root: rewrite(root, frame_index=with_rows(30, 77)), "in episodes 1"),
    "unreadable": (
        "error",
        lambda root: cut(root / "data/chunk-000/file-000.parquet"),
        "file-000.parquet: can't be read",
    ),
    "missing_file": ("error", lambda root: (root / "data/chunk-000/file-000.parquet").unlink(), "none has its files"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_each_fault_put_into_a_good_set_is_found(good, tmp_path, kind):
    level, spoil, words = FAULTS[kind]
    root = tmp_path / "toy"
    shutil.copytree(good, root)
    spoil(root)
    found = inspect(root, tmp_path / "page.html").findings
    kind = {"missing_file": "unreadable"}.get(kind, kind)
    texts = [finding.text for finding in found if (finding.level, finding.kind) == (level, kind)]
    assert len(texts) == 1 and words in texts[0], found


def repeat(episode, state, action, pictures):
    """Make the first and the last episode one, as far as actions go."""
    if episode in (0, 5):
        action[:] = np.arange(22)[:, None] / 22


def darken(episode, state, action, pictures):
    pictures["wrist"] = [frame * 0 + 1 for frame in pictures["wrist"]]


def darken_one(episode, state, action, pictures):
    if episode == 2:
        darken(episode, state, action, pictures)


def freeze(episode, state, action, pictures):
    pictures["top"] = [pictures["top"][0]] * len(state)


def twin(episode, state, action, pictures):
    pictures["wrist"] = pictures["top"]


def zero_first(episode, state, action, pictures):
    action[0, :3] = 0


@pytest.mark.parametrize(
    ("kind", "level", "change", "words"),
    [
        ("black_camera", "error", darken, "Camera wrist is black wherever"),
        ("black_camera", "warning", darken_one, "Camera wrist is black in episodes 2"),
        ("frozen_camera", "error", freeze, "Camera top shows one and the same"),
        ("same_camera", "error", twin, "Cameras top and wrist show the same"),
        ("duplicates", "error", repeat, "1 episodes repeat another's actions exactly: 0 = 5"),
        ("first_action_zero", "warning", zero_first, "zero in x, y, z"),
    ],
)
def test_faults_of_cameras_and_commands_are_found(tmp_path, kind, level, change, words):
    found = inspect(write(tmp_path / "toy", change=change), tmp_path / "page.html").findings
    assert [words in f.text for f in found if (f.level, f.kind) == (level, kind)] == [True], found


def test_a_good_set_has_no_findings_and_the_page_shows_it(good, tmp_path):
    recordings = inspect(good, tmp_path / "page.html")
    assert recordings.findings == []
    page = (tmp_path / "page.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 24 and page.count("<svg") == 9
    assert "http" not in re.sub(r"base64,[^\"]*", "", page), "self-contained"
    assert "task 1" in page and "32 x 32" in page


def test_broken_pictures_are_named_with_their_file(tmp_path):
    pytest.importorskip("av")
    root = write(tmp_path / "toy", "video")
    assert inspect(root, tmp_path / "page.html").findings == []
    cut(next((root / "videos/observation.images.wrist").rglob("*.mp4")))
    (found,) = [f for f in inspect(root, tmp_path / "page.html").findings if f.level == "error"]
    assert found.kind == "unreadable_pictures" and "file-000.mp4" in found.text and "Camera wrist" in found.text
    assert "unreadable" in (tmp_path / "page.html").read_text()


def test_episodes_of_a_few_steps_are_looked_at(tmp_path):
    root = lerobot_folders.write_v3(
        tmp_path / "toy", lengths=(3, 2, 9, 1)
    )  # actions are the states, as where joints lead
    assert "short_episodes" in kinds(root, tmp_path)


def test_a_video_that_lies_about_its_rate_is_told_and_read_all_the_same(tmp_path):
    root = write(tmp_path / "toy", "video")
    file = next((root / "videos/observation.images.wrist").rglob("*.mp4"))
    with av.open(str(file)) as container:
        pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    with av.open(str(file), "w") as container:
        stream = container.add_stream("mpeg4", rate=10, width=SIDE, height=SIDE, pix_fmt="yuv420p")
        for k, shown in enumerate([*pictures, pictures[-1]]):
            frame = av.VideoFrame.from_ndarray(shown, format="rgb24")
            frame.pts = k if k < len(pictures) else 10 * k  # one late frame, and the mean rate is another
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    (found,) = inspect(root, tmp_path / "page.html").findings
    assert (found.level, found.kind) == ("note", "container_rate") and "wrist: " in found.text


def test_a_gripper_between_open_and_closed_is_told(tmp_path):
    root = write(tmp_path / "toy", change=lambda e, state, action, p: action[5:7].__setitem__((slice(None), 3), 0.4))
    (found,) = inspect(root, tmp_path / "page.html").findings
    assert found.kind == "gripper_between" and "in 12 of 148 rows" in found.text


def test_a_missing_file_in_the_middle_is_found_and_the_rest_looked_at(tmp_path):
    root = lerobot_folders.write_v2(tmp_path / "toy")
    (root / "data/chunk-000/episode_000001.parquet").unlink()
    recordings = inspect(root, tmp_path / "page.html")
    (found,) = [finding for finding in recordings.findings if finding.kind == "unreadable"]
    assert found.level == "error" and "episode_000001.parquet: missing" in found.text
    assert recordings.lengths == [5, 3, 6]


def test_a_part_of_a_set_is_found(tmp_path):
    root = lerobot_folders.write_v2(tmp_path / "toy")
    (root / "data/chunk-001/episode_000003.parquet").unlink()
    found = {finding.kind: finding for finding in inspect(root, tmp_path / "page.html").findings}
    assert found["partial"].level == "warning" and "3 of the 4 episodes" in found["partial"].text


def test_a_part_that_spreads_less_than_the_whole_is_found(tmp_path):
    root = lerobot_folders.write_v2(tmp_path / "toy")
    rows = [np.array(lerobot_folders.episode_rows(e, 0)["action"]) for e in range(len(lerobot_folders.LENGTHS))]
    stats = [{"mean": r.mean(0).tolist(), "std": r.std(0).tolist(), "count": [len(r)]} for r in rows]
    lines = [{"episode_index": e, "stats": {"action": s}} for e, s in enumerate(stats)]
    lerobot_folders.write_lines(root / "meta/episodes_stats.jsonl", lines)
    assert "subset_stats" not in kinds(root, tmp_path)
    for episode in (0, 1, 2):
        next(root.rglob(f"episode_{episode:06d}.parquet")).unlink()
    (found,) = [f for f in inspect(root, tmp_path / "page.html").findings if f.kind == "subset_stats"]
    assert found.text.startswith("action: over all 4 episodes in meta/, x (") and "y (" not in found.text


def test_episodes_that_are_judged_by_must_not_be_trained_on(good, tmp_path):
    other = write(tmp_path / "other", change=lambda e, s, a, p: a.__imul__(1 if e == 1 else 0.5))
    (found,) = [f for f in inspect(good, tmp_path / "page.html", against=[other]).findings if f.kind == "overlap"]
    assert found.level == "error" and f"1 of 6 episodes of {other}" in found.text


def test_a_dataset_to_judge_by_that_is_not_there_is_named_before_any_looking(good, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder 'nosuch'"):
        inspect(good, tmp_path / "page.html", against=["nosuch"])
    assert not (tmp_path / "page.html").exists()
    (found,) = inspect("nosuch", tmp_path / "page.html", against=[good]).findings
    assert found.kind == "unreadable" and (tmp_path / "page.html").exists()


def test_commands_that_lead_are_found():
    steps = np.arange(100)
    position = 1 + np.sin(steps / 25)[:, None] * [1, 2]
    episodes = [(0, slice(0, 92))]
    state, action = Vector("s", ["a", "b"], position[:92], episodes), Vector("a", ["a", "b"], position[8:], episodes)
    (found,) = check_commands(state, action)
    assert found.kind == "action_leads" and "about 8 frames later" in found.text
    assert not list(check_commands(state, state))


def test_the_traps_of_an_rlds_set_are_found(tmp_path):
    steps = {
        **rlds_files.BRIDGE,
        "action": {**rlds_files.tensor(7), "description": "[7x joint velocities, 2x gripper]"},
    }
    steps |= {"reward": rlds_files.tensor(), "is_terminal": rlds_files.tensor(dtype="bool")}
    episodes = [rlds_files.bridge_episode(e, 10, noisy=True) for e in range(5)]
    for e, episode in enumerate(episodes):
        action = np.random.default_rng(e).normal(size=(10, 7)).astype(np.float32)
        action[0, :6] = 0
        episode |= {"steps/action": action.reshape(-1), "episode_metadata/has_image_1": np.int64([0])}
        episode |= {"steps/reward": np.zeros(10, np.float32), "steps/is_terminal": np.zeros(10, np.int64)}
        episode["steps/observation/image_3"] = [rlds_files.picture(0, 0, 0)] * 10
    folder = rlds_files.write(tmp_path / "toy/1.0.0", [episodes], steps)
    rlds_files.write(tmp_path / "val", [episodes[::-1]], steps, "val")
    shutil.copy(next((tmp_path / "val").glob("*.tfrecord-*")), folder)
    features = json.loads((folder / "features.json").read_text())
    features["featuresDict"]["features"]["episode_metadata"] = rlds_files.group(
        has_image_1=rlds_files.tensor(dtype="bool"), file_path=rlds_files.TEXT
    )
    (folder / "features.json").write_text(json.dumps(features))
    recordings = inspect(tmp_path / "toy", tmp_path / "page.html")
    found = {finding.kind: finding.text for finding in recordings.findings}
    assert "image_3 is black" in found["black_camera"] and "5 of 5 episodes of the split val" in found["overlap"]
    assert "All 5 episodes have 10 steps" in found["one_length"] and "has_image_1 deny what" in found["wrong_flag"]
    assert "describes 9" in found["wrong_description"] and "action_0" in found["first_action_zero"]
    assert {"is_last_never", "is_terminal_never", "reward_never", "no_rate", "short_episodes"} <= set(found)


@pytest.mark.parametrize(("split", "words"), [("val", None), ("train", "record 1 is damaged")])
def test_an_rlds_set_is_read_by_the_split_it_has_and_its_damage_named(tmp_path, split, words):
    episodes = [rlds_files.bridge_episode(e, 4 + e, noisy=True) for e in range(2)]
    folder = rlds_files.write(tmp_path / "toy", [episodes], split=split)
    if words:
        cut(next(folder.glob("*.tfrecord-*")), 0.9)
    recordings = inspect(folder, tmp_path / "page.html")
    texts = [finding.text for finding in recordings.findings if finding.kind == "unreadable"]
    assert [words in text for text in texts] == ([True] if words else [])
    assert words or recordings.name.endswith("(val)")


def test_the_command_says_what_was_found_and_fails_on_errors(good, tmp_path):
    run = CliRunner().invoke(app, ["inspect", str(SAMPLE), "--output", str(tmp_path / "page.html")])
    assert run.exit_code == 0 and "note: 3 of 9 episodes are shorter than 16 steps" in run.output
    shutil.copytree(good, tmp_path / "toy")
    FAULTS["nan"][1](tmp_path / "toy")
    run = CliRunner().invoke(app, ["inspect", str(tmp_path / "toy"), "--output", str(tmp_path / "page.html")])
    assert run.exit_code == 1 and "error: action: 1 of 148 rows aren't finite" in run.output


def kinds(source, tmp_path):
    return {finding.kind for finding in inspect(source, tmp_path / "page.html").findings}


@pytest.mark.skipif(not (SHARED / "data/g1_inspire_v21_dev").is_dir(), reason="no shared reference data here")
def test_the_traps_of_the_real_humanoid_are_found(tmp_path):
    wanted = {"partial", "nested_names", "one_camera", "missing_stats", "near_constant", "action_leads", "one_task"}
    wanted.add("subset_stats")
    assert kinds(SHARED / "data/g1_inspire_v21_dev", tmp_path) == wanted


@pytest.mark.skipif(not (SHARED / "data/g1_inspire_v21_dev").is_dir(), reason="no shared reference data here")
def test_the_real_humanoid_s_videos_say_the_rate_that_their_frames_have():
    # Their README calls the container's rate garbage; FFmpeg 5 and 8 read 30, so a made video has to show the trap.
    for file in (SHARED / "data/g1_inspire_v21_dev").rglob("*.mp4"):
        with av.open(str(file)) as container:
            times = [frame.time for frame in container.decode(video=0)]
        assert np.allclose(np.diff(times), 1 / 30) and said_rate(file) == 30


@pytest.mark.skipif(not (SHARED / "data/octo_bridge_debug").is_dir(), reason="no shared reference data here")
def test_the_traps_of_the_real_widowx_are_found(tmp_path):
    wanted = {"overlap", "black_camera", "wrong_flag", "wrong_description", "first_action_zero", "one_length"}
    wanted |= {"is_last_never", "is_terminal_never", "reward_never", "no_rate", "short_episodes", "gripper_between"}
    assert kinds(SHARED / "data/octo_bridge_debug", tmp_path) == wanted
