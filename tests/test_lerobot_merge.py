"""Datasets put together, against one dataset written in one go."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from hf_vla.data.lerobot_format import open_dataset
from hf_vla.data.lerobot_merge import merge_datasets
from hf_vla.data.lerobot_writer import LeRobotWriter
from hf_vla.data.windows import WindowDataset
from hf_vla.recipe import View
from tests.test_lerobot_writer import CAMERA, FPS, features, make_episode

EPISODES = [(make_episode(n, seed), task) for seed, (n, task) in enumerate([(5, "a"), (3, "b"), (4, "b"), (2, "c")])]


def write(root, episodes, storage="image", fps=FPS, side=16, **settings):
    with LeRobotWriter(root, fps, features(storage, side), "toy", **settings) as writer:
        for columns, task in episodes:
            writer.add_episode(columns, task)
        return writer.finish()


def parts(tmp_path, *settings, **more):
    pieces = [EPISODES[:1], EPISODES[1:3], EPISODES[3:]]
    return [write(tmp_path / f"part-{i}", piece, *settings, **more) for i, piece in enumerate(pieces)]


@pytest.mark.parametrize("limit", [0, 100])
def test_parts_together_are_what_one_dataset_would_be(tmp_path, limit):
    merged = merge_datasets(parts(tmp_path, data_files_size_in_mb=limit), tmp_path / "merged")
    whole = write(tmp_path / "whole", EPISODES, data_files_size_in_mb=limit)
    assert json.loads((merged / "meta/info.json").read_text()) == json.loads((whole / "meta/info.json").read_text())
    assert (merged / "meta/tasks.parquet").read_bytes() == (whole / "meta/tasks.parquet").read_bytes()
    files = sorted(path.relative_to(whole) for path in (whole / "data").rglob("*.parquet"))
    assert files == sorted(path.relative_to(merged) for path in (merged / "data").rglob("*.parquet"))
    assert all(pq.read_table(merged / file).equals(pq.read_table(whole / file)) for file in files)
    episodes = [pq.read_table(root / "meta/episodes").to_pylist() for root in (merged, whole)]
    assert episodes[0] == episodes[1]
    stats = [json.loads((root / "meta/stats.json").read_text()) for root in (merged, whole)]
    for key in stats[1]:
        exact = ("min", "max", "mean", "std", "count") if key == CAMERA else tuple(stats[1][key])
        assert all(np.allclose(stats[0][key][name], stats[1][key][name]) for name in exact), key


def test_an_instruction_that_changes_on_the_way_is_counted_row_by_row(tmp_path):
    changing = (make_episode(4, 5), ["c", "b", "b", "d"])  # 0, 1, 1, 2 in its part; b is first in the whole
    pieces = [EPISODES[1:2], [changing, EPISODES[0]]]
    merged = merge_datasets([write(tmp_path / f"part-{i}", piece) for i, piece in enumerate(pieces)], tmp_path / "all")
    whole = write(tmp_path / "whole", [EPISODES[1], changing, EPISODES[0]])
    rows = [pq.read_table(root / "meta/episodes").to_pylist() for root in (merged, whole)]
    assert rows[0] == rows[1]
    assert rows[0][1]["stats/task_index/mean"] == [np.mean([1, 0, 0, 2])]
    assert rows[0][1]["stats/task_index/std"] == [np.std([1, 0, 0, 2])]


def test_videos_keep_their_frames(tmp_path):
    pytest.importorskip("av")
    merged = merge_datasets(parts(tmp_path, "video"), tmp_path / "merged")
    assert len(list((merged / "videos").rglob("*.mp4"))) == 3
    data = WindowDataset(open_dataset(merged), [View("front")], 2)
    begin = 0
    for i, (columns, _) in enumerate(EPISODES):
        part = WindowDataset(open_dataset(tmp_path / f"part-{[0, 1, 1, 2][i]}"), [View("front")], 2)
        at = {2: 3}.get(i, 0)  # the third episode comes after three frames of its part
        assert np.array_equal(data[begin].images[0], part[at].images[0])
        assert np.array_equal(data[begin].state, columns["observation.state"][0])
        begin += len(columns["action"])


def test_parts_that_differ_are_named(tmp_path):
    first = write(tmp_path / "a", EPISODES[:1])
    with pytest.raises(ValueError, match=r"b: its fps differ from those of .*a: 20 and 10"):
        merge_datasets([first, write(tmp_path / "b", EPISODES[:1], fps=20)], tmp_path / "merged")
    other = write(tmp_path / "c", [(make_episode(2, 0, side=32), "a")], side=32)
    with pytest.raises(ValueError, match=r"c: its features differ .*observation\.images\.front: .*32"):
        merge_datasets([first, other], tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]
