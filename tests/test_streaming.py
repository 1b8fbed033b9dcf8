"""Streamed datasets: the samples of one that is read whole, a few episodes in memory, and faults that name their place."""

import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import IterableDataset
from lerobot_faults import break_actions, break_parquet, break_tasks, remove_parquet, shorten
from lerobot_folders import LENGTHS, write_v2, write_v3

from hf_vla.data.lerobot_format import open_dataset
from hf_vla.data.loader import RankBatches, build_loader
from hf_vla.data.mixture import build_datasets, order_of
from hf_vla.data.streaming import StreamedDataset, open_stream
from hf_vla.data.windows import WindowDataset
from hf_vla.recipe import RecipeError, make_recipe
from hf_vla.sample import Sample

SHARED = Path(os.environ.get("HF_VLA_SHARED", Path(__file__).parents[2] / "shared"))


def view(camera, offset=0):
    return SimpleNamespace(camera=camera, offset=offset)


PAIR = [view("wrist", -1), view("front", "goal")]


def assert_same(sample: Sample, expected: Sample) -> None:
    for a, b in zip(sample, expected, strict=True):
        if isinstance(b, list):
            assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
        elif isinstance(b, np.ndarray):
            assert a.dtype == b.dtype
            assert np.array_equal(a, b)
        else:
            assert a == b


def in_small_row_groups(root: Path) -> Path:
    for file in (root / "data").rglob("*.parquet"):
        pq.write_table(pq.read_table(file), file, row_group_size=4)
    return root


@pytest.fixture(params=["v2.1", "v3.0", "v3.0_row_groups"])
def root(request, tmp_path):
    if request.param == "v2.1":
        return write_v2(tmp_path / "doors")
    root = write_v3(tmp_path / "doors")
    return in_small_row_groups(root) if "row_groups" in request.param else root


def test_the_samples_are_those_of_a_dataset_read_whole(root):
    whole = WindowDataset(open_dataset(root), PAIR, 4, [0, 1, 3])
    streamed = StreamedDataset(open_stream(root), PAIR, 4, [0, 1, 3], kept_episodes=2)
    assert len(streamed) == len(whole)
    for i in np.random.default_rng(0).permutation(len(whole)).tolist():
        assert_same(streamed[i], whole[i])
        assert streamed.locate(i)[1] == whole.locate(i)[1]
    assert len(streamed._kept) == 2
    assert streamed.tasks == whole.tasks
    assert np.array_equal(streamed.numbers().states, whole.states)
    assert np.array_equal(streamed.numbers().actions, whole.actions)
    for a, b in zip(streamed.windows([9, 0, 5]), whole.windows([9, 0, 5]), strict=True):
        assert np.array_equal(a, b)
    for key, stats in open_dataset(root).stats.items():
        for name, values in stats.items():
            np.testing.assert_allclose(open_stream(root).stats[key][name], values, rtol=1e-6)


def test_a_real_dataset_with_video_streams_alike():
    root = SHARED / "data/g1_inspire_v21_dev"
    if not root.is_dir():
        pytest.skip("the real samples aren't here")
    pytest.importorskip("av")
    views = [view("cam_high"), view("cam_high", -8)]
    whole, streamed = (
        kind(opened(root), views, 8)
        for kind, opened in ((WindowDataset, open_dataset), (StreamedDataset, open_stream))
    )
    assert len(streamed) == len(whole)
    for i in (0, 100, 300, len(whole) - 1):
        assert_same(streamed[i], whole[i])


def test_workers_read_it_and_it_can_be_pickled(root):
    streamed = StreamedDataset(open_stream(root), PAIR, 4, kept_episodes=2)
    streamed[0]
    streamed = pickle.loads(pickle.dumps(streamed))
    batches = RankBatches(order_of(streamed, 0), 4, workers=2)
    loader = build_loader(
        streamed, batches, lambda samples: {"at": [(s.episode_index, s.frame_index) for s in samples]}, 2
    )
    seen = [place for batch in loader for place in batch["at"]]
    assert sorted(seen) == [(e, f) for e, length in enumerate(LENGTHS) for f in range(length)]


def where(samples: list[Sample]) -> dict:
    return {"at": [(s.episode_index, s.frame_index) for s in samples], "process": os.getpid()}


@pytest.mark.parametrize("workers", [0, 2])
def test_training_reads_it_as_a_stream_of_datasets_in_our_order_from_any_place(root, workers):
    streamed = StreamedDataset(open_stream(root), PAIR, 4, kept_episodes=2)
    batches = RankBatches(order_of(streamed, 0), 4, workers=workers)
    loader = build_loader(streamed, batches, where, workers)
    assert isinstance(loader.dataset, IterableDataset)
    epochs = []
    for epoch in range(3):
        loader.set_epoch(epoch)
        epochs.append(list(loader))
        wanted = [[streamed.locate(turn.index) for turn in batch] for batch in batches]
        assert [batch["at"] for batch in epochs[-1]] == [[(e.index, f) for e, f in batch] for batch in wanted]
    assert len(epochs[0]) == len(loader) and epochs[0] != epochs[1]
    assert len({batch["process"] for batches in epochs for batch in batches}) == max(1, workers)  # they are kept

    sought = RankBatches(order_of(streamed, 0), 4, workers=workers)
    assert sought.seek(1, 2 * 4, batches.lanes) == 2
    loader = build_loader(streamed, sought, where, workers)
    rest = [epochs[1][2:], epochs[2]]
    for epoch, batches_left in zip((1, 2), rest, strict=True):
        loader.set_epoch(epoch)
        assert [batch["at"] for batch in loader] == [batch["at"] for batch in batches_left]


@pytest.fixture(scope="module")
def five_shards(tmp_path_factory):
    lengths = (5, 7, 3, 6, 8, 4, 2, 9, 1)
    root = write_v3(tmp_path_factory.mktemp("data") / "doors", lengths=lengths)
    assert len(list((root / "data").rglob("*.parquet"))) == 5
    frames = [(epoch, e, f) for epoch in (0, 1) for e, length in enumerate(lengths) for f in range(length)]
    return root, frames


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("streaming", [False, True], ids=["map", "streamed"])
def test_real_workers_read_every_frame_of_real_files_exactly_once_an_epoch(five_shards, streaming, ranks, workers):
    root, frames = five_shards
    data = make_recipe({"data": {"dataset": str(root), "eval_fraction": 0, "streaming": streaming}}).data
    data.shuffle_episodes = 2
    samples, _ = build_datasets(data, 4, 0)

    def collate(batch):
        return {"at": [(s.episode_index, s.frame_index) for s in batch if not s.action_is_pad.all()]}

    loaders = [
        build_loader(samples, RankBatches(order_of(samples, 0), 4, r, ranks, workers), collate, workers)
        for r in range(ranks)
    ]
    seen, rounds = [], set()
    for loader in loaders:
        for epoch in (0, 1):
            loader.set_epoch(epoch)
            batches = list(loader)
            rounds.add(len(batches))
            seen += [(epoch, *place) for batch in batches for place in batch["at"]]
    assert sorted(seen) == frames
    assert len(rounds) == 1, "ranks and epochs are in step"


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (break_parquet, r"can't be read"),
        (remove_parquet, r"No such file"),
        (break_actions, r"action of episode [23] has values that aren't finite"),
        (break_tasks, r"episode [23], frame 0 has task_index 7"),
        (shorten, r"[25] rows of episode [23], which has [36] by meta"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("write", [write_v2, write_v3], ids=["v2.1", "v3.0"])
def test_a_fault_names_file_and_episode_or_is_skipped_and_counted(tmp_path, write, fault, words):
    root = write(tmp_path / "doors")
    streamed = StreamedDataset(open_stream(root), PAIR, 4)
    fault(root)  # after it was opened: streaming sees it when it gets there
    batches = RankBatches(order_of(streamed, 0), 4)
    collate = lambda samples: {"is_pad": [s.action_is_pad.all() for s in samples]}  # noqa: E731
    with pytest.raises(ValueError, match=words) as error:
        list(build_loader(streamed, batches, collate))
    assert ".parquet" in str(error.value)
    read = list(build_loader(streamed, batches, collate, on_error="skip"))
    skipped = [text for batch in read for text in batch["skipped"]]
    assert len(skipped) == sum(is_pad for batch in read for is_pad in batch["is_pad"]) > 0
    assert len(skipped) < len(streamed)


def test_a_mixture_is_its_datasets_one_behind_the_other(tmp_path):
    roots = [str(write_v3(tmp_path / "a")), str(write_v2(tmp_path / "b"))]
    mixture = [{"dataset": roots[0], "weight": 3.0}, {"dataset": roots[1], "weight": 1.0, "views": ["wrist", "front"]}]
    for streaming in (False, True):
        recipe = make_recipe({"data": {"mixture": mixture, "eval_fraction": 0.5, "streaming": streaming}})
        train, held_out = build_datasets(recipe.data, 3, 0)
        assert len(train) + len(held_out) == 2 * sum(LENGTHS)
        first, second = train.datasets
        assert_same(train[len(first)], second[0])
        assert_same(train[len(train) - 1], second[len(second) - 1])
        assert [v.camera for v in second.views] == ["wrist", "front"]
        assert train.info.state_dim == 3
        indices = [len(train) - 1, 0, len(first)]
        assert np.array_equal(train.windows(indices).actions, np.stack([train[i].actions for i in indices]))
        order = order_of(train, 0)
        drawn = np.bincount(order.sequence(0) < len(first), minlength=2) / len(order)
        assert drawn[1] == pytest.approx(0.75, abs=0.03)


def test_merged_stats_are_those_of_the_mixture():
    from hf_vla.data.lerobot_stats import vector_stats
    from hf_vla.data.mixed import merge_stats

    a, b = np.random.default_rng(0).normal([0, 5], [1, 2], (2, 300, 2))
    merged = merge_stats([vector_stats(a), vector_stats(b)], [0.5, 0.5])
    together = vector_stats(np.concatenate([a, b]))
    for name in ("mean", "std", "min", "max"):
        np.testing.assert_allclose(merged[name], together[name], rtol=1e-5)
    assert (merged["q01"] <= together["q01"]).all()
    assert (merged["q99"] >= together["q99"]).all()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"dataset": "a/b", "mixture": [{"dataset": "c/d"}]}, "both name datasets"),
        ({"mixture": [{"dataset": "c/d", "weight": 1.0}, {"dataset": "e/f"}]}, "to each of the 2"),
        ({"mixture": [{"dataset": "c/d", "weight": 0.0}]}, "above 0"),
        ({"mixture": [{"datset": "c/d"}]}, "datset"),
        ({"shuffle_episodes": 0}, "shuffle_episodes is 0.*or equal to 1"),
        ({"streaming": "yes"}, "data.streaming"),
        ({"on_error": "ignore"}, "data.on_error"),
    ],
)
def test_a_data_section_that_contradicts_itself_is_refused(data, words):
    with pytest.raises(RecipeError, match=words):
        make_recipe({"data": data})


def test_datasets_that_no_policy_can_mix_are_refused(tmp_path):
    roots = [str(write_v3(tmp_path / name)) for name in ("a", "b")]
    data = make_recipe({"data": {"mixture": [{"dataset": roots[0]}, {"dataset": roots[1], "views": ["front"]}]}}).data
    with pytest.raises(ValueError, match="differ in their views"):
        build_datasets(data, 3, 0)
