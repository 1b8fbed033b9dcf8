import json
import logging
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from lerobot_folders import LENGTHS, TASKS, write_v2, write_v3

from hf_vla.data import columns, source
from hf_vla.data.lerobot_format import open_dataset

SHARED = Path(os.environ.get("HF_VLA_SHARED", Path(__file__).parents[2] / "shared"))


@pytest.mark.parametrize("write", [write_v2, write_v3])
def test_both_layouts_open_as_the_same_description(tmp_path, write):
    info = open_dataset(write(tmp_path / "doors"))
    assert (info.name, info.fps, info.cameras) == ("doors", 10, ("front", "wrist"))
    assert (info.state_dim, info.action_dim, info.action_names) == (3, 3, ["x", "y", "gripper"])
    assert [episode.length for episode in info.episodes] == list(LENGTHS)
    assert [episode.tasks for episode in info.episodes] == [(TASKS[0],), (TASKS[1],)] * 2
    assert info.tasks == dict(enumerate(TASKS))
    for episode in info.episodes:
        rows = columns.matrix(info.table, "action", episode.first_row, episode.length)
        np.testing.assert_array_equal(rows[:, 0], episode.index)
        np.testing.assert_array_equal(rows[:, 1], np.arange(episode.length))


@pytest.mark.parametrize("write", [write_v2, write_v3])
def test_missing_index_columns_are_rebuilt_and_said_so_once(tmp_path, caplog, write):
    whole = open_dataset(write(tmp_path / "whole"))
    bare = open_dataset(write(tmp_path / "bare", drop=("episode_index", "frame_index", "index", "timestamp")))
    assert [e.first_row for e in bare.episodes] == [e.first_row for e in whole.episodes]
    messages = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(messages) == 1
    assert "episode_index is missing" in messages[0]


def test_a_partial_dataset_is_what_is_on_disk(tmp_path, caplog):
    root = write_v2(tmp_path / "part")
    (root / "data/chunk-000/episode_000000.parquet").unlink()
    (root / "data/chunk-001/episode_000003.parquet").unlink()
    info = open_dataset(root)
    assert [episode.index for episode in info.episodes] == [1, 2]
    assert "2 of the 4 episodes" in caplog.text
    assert len(info.table) == LENGTHS[1] + LENGTHS[2]


def test_the_rows_win_over_meta(tmp_path, caplog):
    root = write_v3(tmp_path / "liar", fps=25)
    path = root / "meta/episodes/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    pq.write_table(table.set_column(table.column_names.index("length"), "length", pa.array([50, 7, 3, 6])), path)
    info = open_dataset(root)
    assert info.fps == pytest.approx(10)
    assert info.episodes[0].length == LENGTHS[0]
    assert "25 fps" in caplog.text
    assert "another length" in caplog.text


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([["a", "b", "c"]], ["a", "b", "c"]),
        ({"motors": ["a", "b", "c"]}, ["a", "b", "c"]),
        ({"c": 2, "a": 0, "b": 1}, ["a", "b", "c"]),
        (None, ["action_0", "action_1", "action_2"]),
        (["a", "b"], ["action_0", "action_1", "action_2"]),
    ],
)
def test_names_in_every_form(tmp_path, names, expected):
    root = write_v3(tmp_path / "named")
    raw = json.loads((root / "meta/info.json").read_text())
    raw["features"]["action"]["names"] = names
    (root / "meta/info.json").write_text(json.dumps(raw))
    assert open_dataset(root).action_names == expected


def test_stats_are_computed_where_meta_has_no_quantiles(tmp_path):
    partial = {"mean": [9, 9, 9], "std": [9, 9, 9], "min": [9, 9, 9], "max": [9, 9, 9], "count": [21]}
    info = open_dataset(write_v3(tmp_path / "old", stats={"action": partial, "observation.state": partial}))
    rows = columns.matrix(info.table, "action")
    np.testing.assert_allclose(info.stats["action"]["mean"], rows.mean(0), rtol=1e-6)
    np.testing.assert_allclose(info.stats["action"]["q99"], np.quantile(rows, 0.99, axis=0), rtol=1e-6)


def test_stats_of_meta_are_taken_where_complete_and_of_these_rows(tmp_path):
    known = {name: [i, i, i] for i, name in enumerate(("mean", "std", "min", "max", "q01", "q99"))}
    root = write_v3(tmp_path / "known", stats={"action": known, "observation.state": known})
    assert open_dataset(root).stats["action"]["q99"].tolist() == [5, 5, 5]
    (root / "data/chunk-000/file-001.parquet").unlink()
    assert open_dataset(root).stats["action"]["max"].tolist() == pytest.approx([1, 6, 1.06])


def test_a_missing_action_column_is_named_with_those_there_are(tmp_path):
    with pytest.raises(ValueError, match=r"no column 'action'.*observation\.state, timestamp"):
        open_dataset(write_v3(tmp_path / "idle", drop=("action",)))


def test_a_cut_file_is_named(tmp_path):
    root = write_v2(tmp_path / "cut")
    file = root / "data/chunk-001/episode_000002.parquet"
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"episode_000002\.parquet.*parquet"):
        open_dataset(root)


def test_no_data_at_all_names_the_first_file(tmp_path):
    root = write_v2(tmp_path / "empty")
    for file in (root / "data").rglob("*.parquet"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match=r"4 episodes.*episode_000000\.parquet"):
        open_dataset(root)


def test_a_dataset_of_no_episodes_is_said_to_be_one(tmp_path):
    root = write_v2(tmp_path / "empty")
    (root / "meta/episodes.jsonl").write_text("")
    with pytest.raises(ValueError, match="empty: the dataset has no episodes"):
        open_dataset(root)


def test_a_scattered_episode_is_refused(tmp_path):
    root = write_v2(tmp_path / "torn")
    files = sorted((root / "data").rglob("*.parquet"))
    pq.write_table(pa.concat_tables([pq.read_table(files[3]), pq.read_table(files[0])]), files[3])
    with pytest.raises(ValueError, match="rows of episode 0 don't follow"):
        open_dataset(root)


def test_what_is_not_a_dataset(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no meta/info\.json"):
        open_dataset(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no folder.*record_metaworld"):
        open_dataset("./nowhere/at/all")
    with pytest.raises(ValueError, match=r"v1\.6.*v2\.0, v2\.1 and v3\.0"):
        open_dataset(write_v2(tmp_path / "ancient", codebase_version="v1.6"))
    broken = write_v2(tmp_path / "broken")
    (broken / "meta/episodes.jsonl").write_text('{"episode_index": 0,')
    with pytest.raises(ValueError, match=r"episodes\.jsonl: can't be read"):
        open_dataset(broken)


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (GatedRepoError, "Ask for access at .*datasets/someone/doors"),
        (RepositoryNotFoundError, "the Hub has no such dataset"),
        (LocalEntryNotFoundError, "can't be reached.*hf download someone/doors"),
        (ConnectionError, "can't be reached"),
    ],
)
def test_each_failure_of_the_hub_says_what_to_do(monkeypatch, error, advice):
    def fail(*args, **kwargs):
        raise error("no") if issubclass(error, (LocalEntryNotFoundError, ConnectionError)) else _http(error)

    monkeypatch.setattr(source, "snapshot_download", fail)
    with pytest.raises(FileNotFoundError, match=advice):
        open_dataset("someone/doors")


def test_a_hub_repo_is_fetched_at_its_revision_and_keeps_its_name(tmp_path, monkeypatch):
    root, asked = write_v3(tmp_path / "snapshot"), {}

    def fetch(repo_id, repo_type, revision, allow_patterns):
        asked.update(repo_id=repo_id, repo_type=repo_type, revision=revision)
        return str(root)

    monkeypatch.setattr(source, "snapshot_download", fetch)
    assert open_dataset("someone/doors", revision="v3.0").name == "someone/doors"
    assert asked == {"repo_id": "someone/doors", "repo_type": "dataset", "revision": "v3.0"}


def _http(error):
    exception = error.__new__(error)
    Exception.__init__(exception, "no")
    return exception


@pytest.mark.skipif(not (SHARED / "data/g1_inspire_v21_dev").is_dir(), reason="no shared reference data here")
def test_the_real_humanoid_dataset_opens_as_the_part_that_is_there(caplog):
    info = open_dataset(SHARED / "data/g1_inspire_v21_dev")
    assert (info.version, info.fps, info.cameras, info.action_dim) == ("v2.1", 30, ("cam_high",), 26)
    assert [(e.index, e.length) for e in info.episodes] == [(29, 221), (30, 277)]
    assert info.action_names[0] == "kLeftShoulderPitch"
    assert (info.stats["action"]["q01"] <= info.stats["action"]["q99"]).all()
    assert "2 of the 100 episodes" in caplog.text
