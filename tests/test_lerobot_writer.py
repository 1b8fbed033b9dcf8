"""What LeRobotWriter puts on disk, against the layout of LeRobotDataset v3.0 and against numpy."""

import io
import json

import datasets
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hf_vla.data.lerobot_stats import PictureStats, vector_stats
from hf_vla.data.lerobot_writer import LeRobotWriter, image_feature, vector_feature

CAMERA = "observation.images.front"
FPS = 10


def features(storage="image", side=16):
    return {
        CAMERA: image_feature(side, side, storage),
        "observation.state": vector_feature(["x", "y", "z"]),
        "action": vector_feature(["dx", "dy"]),
        "next.reward": vector_feature(["reward"]),
    }


def make_episode(length, seed, side=16):
    draw = np.random.default_rng(seed)
    return {
        CAMERA: [draw.integers(0, 256, (side, side, 3), dtype=np.uint8) for _ in range(length)],
        "observation.state": draw.normal(3.0, 2.0, (length, 3)).astype(np.float32),
        "action": draw.uniform(-1, 1, (length, 2)).astype(np.float32),
        "next.reward": draw.uniform(0, 1, (length, 1)).astype(np.float32),
    }


EPISODES = [(make_episode(5, 0), "push"), (make_episode(3, 1), "pull"), (make_episode(4, 2), "push")]


def write(root, episodes=EPISODES, storage="image", recording=None, **settings):
    with LeRobotWriter(root, FPS, features(storage), robot_type="toy", **settings) as writer:
        for columns, task in episodes:
            writer.add_episode(columns, task)
        return writer.finish(recording)


def jpeg(picture):
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "jpeg", quality=95)
    return buffer.getvalue()


def test_rows_are_what_was_given_and_datasets_decodes_them(tmp_path):
    root = write(tmp_path / "toy")
    rows = datasets.Dataset.from_parquet(str(root / "data/chunk-000/file-000.parquet"), cache_dir=str(tmp_path))
    assert len(rows) == 12
    given = {key: np.concatenate([np.asarray(columns[key]) for columns, _ in EPISODES]) for key in features()}
    assert np.array_equal(np.stack([np.asarray(picture) for picture in rows[CAMERA]]), given[CAMERA])
    assert np.array_equal(np.array(rows["observation.state"], np.float32), given["observation.state"])
    assert np.array_equal(np.array(rows["next.reward"], np.float32), given["next.reward"][:, 0])
    assert rows["index"][:] == list(range(12))
    assert rows["episode_index"][:] == [0] * 5 + [1] * 3 + [2] * 4
    assert rows["frame_index"][:] == [0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3]
    assert rows["task_index"][:] == [0] * 5 + [1] * 3 + [0] * 4
    assert np.array_equal(np.array(rows["timestamp"][:5], np.float32), np.float32([0, 0.1, 0.2, 0.3, 0.4]))
    assert rows.features["timestamp"].dtype == "float32" and rows.features["action"].length == 2


def test_metadata_follows_version_3(tmp_path):
    root = write(tmp_path / "toy", recording={"seed": 1})
    info = json.loads((root / "meta/info.json").read_text())
    assert info["codebase_version"] == "v3.0" and info["fps"] == FPS and info["robot_type"] == "toy"
    assert (info["total_episodes"], info["total_frames"], info["total_tasks"]) == (3, 12, 2)
    assert info["splits"] == {"train": "0:3"} and info["video_path"] is None
    assert info["features"]["action"] == {"dtype": "float32", "shape": [2], "names": ["dx", "dy"]}
    assert info["features"][CAMERA]["shape"] == [16, 16, 3]
    assert info["features"]["timestamp"] == {"dtype": "float32", "shape": [1], "names": None}
    assert json.loads((root / "meta/recording.json").read_text()) == {"seed": 1}
    tasks = pd.read_parquet(root / "meta/tasks.parquet")
    assert tasks.iloc[1].name == "pull" and int(tasks.loc["push"].task_index) == 0
    episodes = pq.read_table(root / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    assert [(e["episode_index"], e["tasks"], e["length"]) for e in episodes] == [
        (0, ["push"], 5),
        (1, ["pull"], 3),
        (2, ["push"], 4),
    ]
    assert [(e["dataset_from_index"], e["dataset_to_index"]) for e in episodes] == [(0, 5), (5, 8), (8, 12)]
    assert all(e["data/chunk_index"] == e["data/file_index"] == 0 for e in episodes)
    assert np.allclose(episodes[1]["stats/action/mean"], EPISODES[1][0]["action"].mean(0), atol=1e-6)
    assert np.shape(episodes[1][f"stats/{CAMERA}/q50"]) == (3, 1, 1)


def test_stats_are_those_of_all_rows(tmp_path):
    stats = json.loads((write(tmp_path / "toy") / "meta/stats.json").read_text())
    states = np.concatenate([columns["observation.state"] for columns, _ in EPISODES])
    assert np.allclose(stats["observation.state"]["std"], states.std(0), atol=1e-6)
    assert np.allclose(stats["observation.state"]["q99"], np.quantile(states, 0.99, axis=0), atol=1e-5)
    assert stats["observation.state"]["count"] == [12] and len(stats["next.reward"]["q10"]) == 1
    pictures = np.concatenate([np.stack(columns[CAMERA]) for columns, _ in EPISODES]) / 255
    assert np.allclose(np.reshape(stats[CAMERA]["mean"], 3), pictures.mean((0, 1, 2)))
    assert np.allclose(np.reshape(stats[CAMERA]["std"], 3), pictures.std((0, 1, 2)))
    assert stats[CAMERA]["count"] == [12]
    assert {*stats} == {*features(), "timestamp", "frame_index", "episode_index", "index", "task_index"}


def test_picture_stats_are_exact_quantiles_of_the_pixels():
    draw = np.random.default_rng(0)
    pictures = draw.integers(10, 200, (5, 20, 20, 3), dtype=np.uint8)
    counted = PictureStats()
    for picture in pictures:
        counted.add(picture)
    expected = np.quantile(pictures.reshape(-1, 3), 0.9, axis=0, method="inverted_cdf") / 255
    stats = counted.stats()
    assert np.allclose(np.reshape(stats["q90"], 3), expected)
    assert np.allclose(np.reshape(stats["min"], 3), pictures.min((0, 1, 2)) / 255)
    assert np.allclose(np.reshape(stats["max"], 3), pictures.max((0, 1, 2)) / 255)


def test_vector_stats_keep_a_small_spread_around_a_large_offset():
    values = np.float32(4096.0) + np.float32([[0.0], [0.5], [1.0]])
    assert np.isclose(vector_stats(values)["std"][0], np.std([0, 0.5, 1]))


def test_encoded_pictures_are_embedded_untouched(tmp_path):
    columns, task = EPISODES[0]
    encoded = [jpeg(picture) for picture in columns[CAMERA]]
    root = write(tmp_path / "toy", [({**columns, CAMERA: encoded}, task)])
    rows = pq.read_table(root / "data/chunk-000/file-000.parquet")[CAMERA].to_pylist()
    assert [row["bytes"] for row in rows] == encoded


def test_full_files_are_followed_by_new_ones_with_one_row_group_an_episode(tmp_path):
    root = write(tmp_path / "toy", data_files_size_in_mb=0)
    files = sorted((root / "data/chunk-000").iterdir())
    assert [file.name for file in files] == ["file-000.parquet", "file-001.parquet", "file-002.parquet"]
    episodes = pq.read_table(root / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    assert [e["data/file_index"] for e in episodes] == [0, 1, 2]
    assert pq.read_table(files[2])["index"].to_pylist() == [8, 9, 10, 11]
    whole = pq.ParquetFile(write(tmp_path / "whole") / "data/chunk-000/file-000.parquet")
    assert [whole.metadata.row_group(i).num_rows for i in range(whole.num_row_groups)] == [5, 3, 4]


@pytest.mark.parametrize("codec", ["h264", "av1"])
@pytest.mark.parametrize("limit", [0, 100])
def test_video_frames_stand_at_their_times(tmp_path, codec, limit):
    av = pytest.importorskip("av")
    shades = [[40, 90, 140, 190], [220, 60]]
    episodes = []
    for seed, grey in enumerate(shades):
        columns = make_episode(len(grey), seed, side=64)
        episodes.append(({**columns, CAMERA: [np.full((64, 64, 3), value, np.uint8) for value in grey]}, "push"))
    root = tmp_path / "toy"
    with LeRobotWriter(root, FPS, features("video", 64), video_codec=codec, video_files_size_in_mb=limit) as writer:
        for columns, task in episodes:
            writer.add_episode(columns, task)
        writer.finish()
    info = json.loads((root / "meta/info.json").read_text())
    assert info["features"][CAMERA]["info"]["video.codec"] == codec
    assert CAMERA not in pq.read_schema(root / "data/chunk-000/file-000.parquet").names
    rows = pq.read_table(root / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    assert len(list((root / "videos").rglob("*.mp4"))) == (2 if limit == 0 else 1)
    for row, grey in zip(rows, shades, strict=True):
        video = {key: row[f"videos/{CAMERA}/{key}"] for key in ("chunk_index", "file_index", "from_timestamp")}
        path = root / info["video_path"].format(video_key=CAMERA, **video)
        with av.open(str(path)) as container:
            assert container.streams.video[0].pix_fmt == info["features"][CAMERA]["info"]["video.pix_fmt"]
            decoded = {
                round(frame.time * FPS, 6): frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)
            }
        start = video["from_timestamp"] * FPS
        assert np.allclose([decoded[round(start + k, 6)].mean() for k in range(len(grey))], grey, atol=4)
        assert row[f"videos/{CAMERA}/to_timestamp"] == pytest.approx(video["from_timestamp"] + len(grey) / FPS)


def test_nothing_is_left_behind_unless_finished(tmp_path):
    root = tmp_path / "toy"
    with pytest.raises(KeyboardInterrupt), LeRobotWriter(root, FPS, features()) as writer:
        writer.add_episode(*EPISODES[0])
        assert not root.exists()
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="at least one episode"):
        write(root, episodes=[])
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_overwritten(tmp_path):
    (tmp_path / "toy").mkdir()
    with pytest.raises(FileExistsError, match="is already there; remove it"):
        write(tmp_path / "toy")
    assert list((tmp_path / "toy").iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"action": None}, "must have the columns"),
        ({"reward": np.zeros(5)}, "must have the columns"),
        ({"action": np.zeros((4, 2))}, "one length"),
        ({"action": np.zeros((5, 3))}, r"action: each row must have the shape \(2,\), not \(3,\)"),
        ({CAMERA: [np.zeros((16, 8, 3), np.uint8)] * 5}, r"shape \(16, 16, 3\), not \(16, 8, 3\)"),
        ({CAMERA: [jpeg(np.zeros((8, 16, 3), np.uint8))] * 5}, r"shape \(16, 16, 3\), not \(8, 16, 3\)"),
    ],
)
def test_an_episode_that_does_not_fit_is_one_clear_error(tmp_path, change, message):
    columns = {key: value for key, value in (EPISODES[0][0] | change).items() if value is not None}
    with LeRobotWriter(tmp_path / "toy", FPS, features()) as writer, pytest.raises(ValueError, match=message):
        writer.add_episode(columns, "push")


def test_features_that_lerobot_has_no_column_for_are_refused(tmp_path):
    for bad in ({"a/b": vector_feature(["x"])}, {"a": {"dtype": "float32", "shape": [2, 2], "names": None}}):
        with pytest.raises(ValueError, match=r"LeRobot allows no '/'|a picture or a vector"):
            LeRobotWriter(tmp_path / "toy", FPS, bad)
    assert list(tmp_path.iterdir()) == []
