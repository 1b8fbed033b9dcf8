"""LeRobot v2.1 folders to v3.0: nothing is encoded again, and each row and picture is where it belongs."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_vla.convert.lerobot_v2 import to_v3
from hf_vla.data.lerobot_format import open_dataset
from hf_vla.data.windows import WindowDataset
from hf_vla.recipe import View
from tests.lerobot_folders import CAMERAS, FPS, LENGTHS, TASKS, write_v2

SIDE = 32


def windows(root, episodes=None):
    info = open_dataset(root)
    return WindowDataset(info, [View(camera) for camera in info.cameras], 2, episodes)


def assert_same(old, new):
    assert len(old) == len(new)
    assert np.array_equal(old.states, new.states) and np.array_equal(old.actions, new.actions)
    assert old.tasks == new.tasks
    for i in range(len(old)):
        assert all(np.array_equal(a, b) for a, b in zip(old.pictures(i), new.pictures(i), strict=True)), i


def edit_column(file, name, values):
    table = pq.read_table(file)
    place = table.schema.get_field_index(name)
    pq.write_table(table.set_column(place, name, pa.array(values, table.schema.field(name).type)), file)


def episode_file(root, episode):
    return root / f"data/chunk-{episode // 2:03d}/episode_{episode:06d}.parquet"


def store_as_video(root, codecs):
    """Put the first camera's pictures into a video file an episode, that of episode i by the i-th codec."""
    from hf_vla.data.video import VideoWriter

    info = json.loads((root / "meta/info.json").read_text())
    key = f"observation.images.{CAMERAS[0]}"
    info["features"][key] |= {"dtype": "video", "shape": [3, SIDE, SIDE]}
    info["video_path"] = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
    (root / "meta/info.json").write_text(json.dumps(info))
    for episode, (length, codec) in enumerate(zip(LENGTHS, codecs, strict=True)):
        path = root / info["video_path"].format(episode_chunk=episode // 2, video_key=key, episode_index=episode)
        video = VideoWriter(path, FPS, codec, SIDE, SIDE)
        for frame in range(length):
            video.add(np.full((SIDE, SIDE, 3), 20 + 40 * episode + 5 * frame, np.uint8))
        video.close()
        file = episode_file(root, episode)
        pq.write_table(pq.read_table(file).drop_columns([key]), file)
    return root


def test_rows_and_embedded_pictures_are_copied(tmp_path):
    old = write_v2(tmp_path / "old")
    new = to_v3(old, tmp_path / "new")
    assert open_dataset(new).version == "v3.0"
    assert_same(windows(old), windows(new))
    before = pq.read_table(episode_file(old, 1), columns=[f"observation.images.{CAMERAS[0]}"]).to_pylist()
    after = pq.read_table(new / "data/chunk-000/file-000.parquet", columns=list(before[0])).to_pylist()
    assert after[LENGTHS[0] : LENGTHS[0] + LENGTHS[1]] == before, "the very bytes"


@pytest.mark.parametrize(
    ("codecs", "files"), [(["h264"] * 4, 1), (["av1"] * 4, 1), (["h264", "h264", "av1", "h264"], 3)]
)
def test_video_is_copied_packet_by_packet(tmp_path, codecs, files):
    pytest.importorskip("av")
    old = store_as_video(write_v2(tmp_path / "old"), codecs)
    new = to_v3(old, tmp_path / "new")
    assert len(list((new / "videos").rglob("*.mp4"))) == files, "files that are encoded alike are put together"
    assert_same(windows(old), windows(new))
    key = f"observation.images.{CAMERAS[0]}"
    ends = pq.read_table(new / "meta/episodes").column(f"videos/{key}/to_timestamp").to_pylist()
    starts = pq.read_table(new / "meta/episodes").column(f"videos/{key}/from_timestamp").to_pylist()
    assert np.allclose(np.subtract(ends, starts), np.array(LENGTHS) / FPS)
    assert json.loads((new / "meta/info.json").read_text())["features"][key]["shape"] == [SIDE, SIDE, 3]


def test_an_instruction_that_changes_on_the_way_does_so_after(tmp_path):
    old = write_v2(tmp_path / "old")
    edit_column(episode_file(old, 0), "task_index", [0, 0, 1, 1, 1])
    new = to_v3(old, tmp_path / "new")
    assert windows(new).tasks[:5] == [TASKS[0]] * 2 + [TASKS[1]] * 3
    assert pq.read_table(new / "meta/episodes").column("tasks").to_pylist()[0] == list(TASKS)


def test_part_of_a_dataset_is_renumbered(tmp_path):
    old = write_v2(tmp_path / "old")
    episode_file(old, 0).unlink()
    new = windows(to_v3(old, tmp_path / "new"))
    assert [episode.index for episode in new.episodes] == [0, 1, 2]
    assert_same(windows(old), new)


def test_what_v3_has_no_place_for_is_refused_and_nothing_is_left(tmp_path):
    old = write_v2(tmp_path / "old")
    edit_column(episode_file(old, 2), "timestamp", [0.0, 0.1, 0.25])
    with pytest.raises(ValueError, match=r"episode_000002.parquet: episode 2 has a row 0.0500 s off"):
        to_v3(old, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_a_video_with_too_few_pictures_is_named(tmp_path):
    pytest.importorskip("av")
    old = store_as_video(write_v2(tmp_path / "old"), ["h264"] * 4)
    videos = sorted((old / "videos").rglob("*.mp4"))
    videos[1].write_bytes(videos[2].read_bytes())
    with pytest.raises(ValueError, match=r"episode_000001.mp4: 3 pictures, where its episode has 7 rows"):
        to_v3(old, tmp_path / "new")
