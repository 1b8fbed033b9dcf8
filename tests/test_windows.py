import multiprocessing
import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from lerobot_folders import LENGTHS, SIZE, TASKS, colour, encode, task_of, write_v2, write_v3

from hf_vla.data.frames import EmbeddedFrames
from hf_vla.data.lerobot_format import open_dataset
from hf_vla.data.windows import WindowDataset

SHARED = Path(os.environ.get("HF_VLA_SHARED", Path(__file__).parents[2] / "shared"))


def view(camera, offset=0):
    return SimpleNamespace(camera=camera, offset=offset)


PAIR = [view("front"), view("wrist")]


@pytest.fixture(scope="module", params=[write_v2, write_v3], ids=["v2.1", "v3.0"])
def info(request, tmp_path_factory):
    return open_dataset(request.param(tmp_path_factory.mktemp("doors")))


def pixel(image):
    assert image.shape == (SIZE, SIZE, 3)
    assert image.dtype == np.uint8
    assert (image == image[0, 0]).all()
    return tuple(image[0, 0].tolist())


def test_every_frame_is_one_sample_with_its_own_pictures_state_and_task(info):
    dataset = WindowDataset(info, PAIR, 2)
    assert len(dataset) == sum(LENGTHS)
    seen = []
    for i in range(len(dataset)):
        sample = dataset[i]
        e, f = sample.episode_index, sample.frame_index
        seen.append((e, f))
        assert [pixel(image) for image in sample.images] == [colour(e, f, 0), colour(e, f, 1)]
        np.testing.assert_allclose(sample.state, [e, f, e + f / 100], rtol=1e-6)
        assert sample.task == TASKS[task_of(e)]
        assert sample.source == info.name
        assert sample.state.dtype == sample.actions.dtype == np.float32
    assert seen == [(e, f) for e, length in enumerate(LENGTHS) for f in range(length)]


def test_a_chunk_repeats_the_last_action_past_the_end_and_marks_it(info):
    dataset = WindowDataset(info, PAIR, chunk_size=4)
    sample = dataset[LENGTHS[0] - 2]  # one before the last of episode 0
    assert sample.actions[:, 1].tolist() == [3, 4, 4, 4]
    assert sample.actions[:, 0].tolist() == [0] * 4
    assert sample.action_is_pad.tolist() == [False, False, True, True]
    assert not dataset[LENGTHS[0]].action_is_pad.any()


def test_an_episode_shorter_than_a_chunk_is_kept_and_padded(info):
    sample = WindowDataset(info, PAIR, chunk_size=8, episodes=[2])[0]
    assert sample.actions[:, 1].tolist() == [0, 1, 2, 2, 2, 2, 2, 2]
    assert sample.action_is_pad.sum() == 8 - LENGTHS[2]


def test_views_in_time_stay_in_their_episode(info):
    dataset = WindowDataset(info, [view("wrist", -2), view("front", "goal")], 1, episodes=[1])
    assert [pixel(dataset[f].images[0]) for f in range(7)] == [colour(1, max(0, f - 2), 1) for f in range(7)]
    assert {pixel(dataset[f].images[1]) for f in range(7)} == {colour(1, 6, 0)}


def test_chosen_episodes_only_and_in_the_order_given(info):
    dataset = WindowDataset(info, PAIR, 1, episodes=[3, 1])
    assert len(dataset) == LENGTHS[3] + LENGTHS[1]
    assert [dataset.locate(i)[0].index for i in (0, LENGTHS[3] - 1, LENGTHS[3], len(dataset) - 1)] == [3, 3, 1, 1]
    assert dataset[LENGTHS[3]].state[0] == 1


def test_windows_are_the_samples_without_pictures(info):
    dataset = WindowDataset(info, PAIR, 3)
    windows = dataset.windows([4, 0, 20])
    for row, i in enumerate((4, 0, 20)):
        for name, values in windows._asdict().items():
            np.testing.assert_array_equal(values[row], getattr(dataset[i], name))


def test_it_survives_pickling_and_forked_workers(info):
    dataset = WindowDataset(info, PAIR, 2)
    expected = [pixel(dataset[i].images[1]) for i in range(len(dataset))]
    copy = pickle.loads(pickle.dumps(dataset))
    assert [pixel(copy[i].images[1]) for i in range(len(copy))] == expected
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size=4,
        num_workers=2,
        collate_fn=list,
        multiprocessing_context=multiprocessing.get_context("fork"),
    )
    assert [pixel(sample.images[1]) for batch in loader for sample in batch] == expected


def test_cached_pictures_are_the_same_and_decoded_once_as_long_as_there_is_room(info, monkeypatch):
    decoded = []
    read = EmbeddedFrames.read
    monkeypatch.setattr(EmbeddedFrames, "read", lambda *args: decoded.append(args[1:]) or read(*args))
    picture_bytes = SIZE * SIZE * 3
    dataset = WindowDataset(info, PAIR, 2, cache_bytes=2 * 10 * picture_bytes + 1)
    first = [[pixel(image) for image in dataset[i].images] for i in range(len(dataset))]
    assert len(decoded) == 2 * len(dataset)
    decoded.clear()
    assert [[pixel(image) for image in dataset[i].images] for i in range(len(dataset))] == first
    assert len(decoded) == 2 * (len(dataset) - 10)
    decoded.clear()
    with pytest.raises(ValueError, match="read-only"):
        dataset[0].images[0][0] = 0
    assert len(pickle.dumps(dataset)) < len(pickle.dumps(WindowDataset(info, PAIR, 2))) + 1000
    pickle.loads(pickle.dumps(dataset))[0]
    assert len(decoded) == 2


def test_an_index_past_the_end_is_an_index_error_so_that_a_loop_ends(info):
    dataset = WindowDataset(info, PAIR, 2)
    with pytest.raises(IndexError):
        dataset[len(dataset)]
    assert len(list(dataset)) == len(dataset)


def test_wrong_views_are_named_with_those_there_are(info):
    with pytest.raises(ValueError, match=r"no camera 'wrst'; it has front, wrist\. Did you mean 'wrist'"):
        WindowDataset(info, [view("wrst")], 2)
    with pytest.raises(ValueError, match=r"offset 3 .* future"):
        WindowDataset(info, [view("wrist", 3)], 2)
    with pytest.raises(ValueError, match=r"no episode \[9\]; its 4 episodes run from 0 to 3"):
        WindowDataset(info, PAIR, 2, episodes=[9])


def rewrite(root, file, change):
    """Apply `change` to the rows of a parquet file, as lists of Python values."""
    path = root / file
    table = pq.read_table(path)
    columns = table.to_pydict()
    change(columns)
    pq.write_table(pa.table({name: pa.array(columns[name], table.schema.field(name).type) for name in columns}), path)


def test_nan_actions_name_file_episode_and_frame(tmp_path):
    root = write_v2(tmp_path / "nan")
    rewrite(
        root, "data/chunk-000/episode_000001.parquet", lambda c: c["action"].__setitem__(4, [1.0, float("nan"), 0.0])
    )
    info = open_dataset(root)
    with pytest.raises(ValueError, match=r"episode_000001\.parquet: action of episode 1 .* at frame 4"):
        WindowDataset(info, PAIR, 2)
    assert len(WindowDataset(info, PAIR, 2, episodes=[0, 2, 3])) == sum(LENGTHS) - LENGTHS[1]


def test_a_task_without_text_names_file_episode_and_frame(tmp_path):
    root = write_v2(tmp_path / "dumb")
    rewrite(root, "data/chunk-000/episode_000001.parquet", lambda c: c["task_index"].__setitem__(2, 7))
    with pytest.raises(ValueError, match=r"episode_000001\.parquet: episode 1, frame 2 has task_index 7.*\[0, 1\]"):
        WindowDataset(open_dataset(root), PAIR, 2)


def test_without_task_index_the_episodes_own_instruction_is_used(tmp_path):
    dataset = WindowDataset(open_dataset(write_v3(tmp_path / "plain", drop=("task_index",))), PAIR, 2)
    assert [dataset[i].task for i in (0, LENGTHS[0])] == list(TASKS)


def test_a_broken_picture_names_file_episode_and_frame(tmp_path):
    root = write_v2(tmp_path / "torn")
    key = "observation.images.front"
    rewrite(
        root,
        "data/chunk-000/episode_000001.parquet",
        lambda c: c[key].__setitem__(3, {"bytes": encode((0, 0, 0))[:40], "path": None}),
    )
    dataset = WindowDataset(open_dataset(root), PAIR, 2)
    with pytest.raises(ValueError, match=r"episode_000001\.parquet: .*front of episode 1, frame 3, can't be decoded"):
        dataset[LENGTHS[0] + 3]
    assert pixel(dataset[LENGTHS[0] + 2].images[0]) == colour(1, 2, 0)


def test_pictures_kept_as_files_are_read_by_their_path(tmp_path):
    root = write_v2(tmp_path / "files")
    (root / "images").mkdir()
    (root / "images/7.png").write_bytes(encode((1, 2, 3)))
    rewrite(
        root,
        "data/chunk-000/episode_000001.parquet",
        lambda c: c["observation.images.front"].__setitem__(3, {"bytes": None, "path": "images/7.png"}),
    )
    assert pixel(WindowDataset(open_dataset(root), PAIR, 2)[LENGTHS[0] + 3].images[0]) == (1, 2, 3)


@pytest.mark.skipif(not (SHARED / "data/g1_inspire_v21_dev").is_dir(), reason="no shared reference data here")
def test_real_av1_frames_are_those_that_decoding_in_order_gives():
    av = pytest.importorskip("av")
    root = SHARED / "data/g1_inspire_v21_dev"
    dataset = WindowDataset(open_dataset(root), [view("cam_high"), view("cam_high", "goal")], 16, episodes=[29])
    with av.open(str(root / "videos/chunk-000/observation.images.cam_high/episode_000029.mp4")) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert len(frames) == len(dataset)
    for i in (0, 1, 2, 150, 151, 153, 40, 41, 220, 0):
        now, goal = dataset[i].images
        assert (now == frames[i]).all(), i
        assert (goal == frames[-1]).all()
    assert (pickle.loads(pickle.dumps(dataset))[150].images[0] == frames[150]).all()


def test_an_episode_of_another_rate_is_named_with_its_file(tmp_path):
    root = write_v3(tmp_path / "toy")
    file = root / "data/chunk-000/file-001.parquet"
    table = pq.read_table(file)
    seconds = table["timestamp"].to_numpy() * np.where(table["episode_index"].to_numpy() == 3, 2, 1)
    place = table.schema.get_field_index("timestamp")
    pq.write_table(table.set_column(place, "timestamp", pa.array(seconds, pa.float32())), file)
    info = open_dataset(root)
    with pytest.raises(ValueError, match=r"file-001\.parquet: episode 3 has 5 frames a second .* the dataset has 10"):
        WindowDataset(info, [view("front")], 4)
    assert len(WindowDataset(info, [view("front")], 4, [0, 1, 2])) == sum(LENGTHS[:3])
