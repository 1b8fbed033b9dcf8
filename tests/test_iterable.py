"""Samples as a stream of `datasets`: each once, and on from any place."""

import json
from itertools import islice

import numpy as np
import pytest
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader

from hf_vla.data.iterable import SHARD, iterable_dataset
from hf_vla.data.mixture import CameraView, order_of
from hf_vla.data.streaming import StreamedDataset, open_stream
from tests.tiny_run import SAMPLE


@pytest.fixture
def streamed() -> StreamedDataset:
    info = open_stream(SAMPLE)
    return StreamedDataset(info, [CameraView(camera) for camera in info.cameras], chunk_size=4, kept_episodes=2)


def places(rows) -> list[tuple[int, int]]:
    return [(row["episode_index"], row["frame_index"]) for row in rows]


def test_rows_are_the_samples_in_the_order_of_training(streamed):
    order = order_of(streamed, 0)
    rows = list(iterable_dataset(streamed, order, epoch=3))
    wanted = [streamed[i] for i in order.sequence(3)]
    assert places(rows) == [(sample.episode_index, sample.frame_index) for sample in wanted]
    for row, sample in zip(rows[:3], wanted, strict=False):
        assert row["task"] == sample.task and "view_features" not in row
        np.testing.assert_array_equal(row["actions"], sample.actions)
        np.testing.assert_array_equal(row["images"][1], sample.images[1])


@pytest.mark.parametrize("stopped_after", [1, SHARD - 1, SHARD, SHARD + 7, 130])
def test_it_goes_on_where_it_stopped(streamed, stopped_after):
    order = order_of(streamed, 0)
    whole = places(iterable_dataset(streamed, order))
    running = iterable_dataset(streamed, order)
    seen = places(islice(running, stopped_after))
    state = json.loads(json.dumps(running.state_dict()))
    another = iterable_dataset(streamed, order)
    another.load_state_dict(state)
    assert seen + places(another) == whole


def test_going_on_reads_no_more_than_a_shard_again(streamed, monkeypatch):
    order, read = order_of(streamed, 0), []
    running = iterable_dataset(streamed, order)
    list(islice(running, 100))
    another = iterable_dataset(streamed, order)
    another.load_state_dict(running.state_dict())
    get = StreamedDataset.__getitem__
    monkeypatch.setattr(StreamedDataset, "__getitem__", lambda self, i: (read.append(i), get(self, i))[1])
    next(iter(another))
    assert len(read) <= SHARD


@pytest.mark.parametrize(("ranks", "workers"), [(1, 2), (2, 0), (2, 2), (3, 1)])
def test_ranks_and_workers_see_each_sample_once(streamed, ranks, workers):
    seen = []
    for rank in range(ranks):
        stream = iterable_dataset(streamed, order_of(streamed, 0), readers=ranks * max(1, workers))
        part = split_dataset_by_node(stream, rank, ranks)
        seen += places(DataLoader(part, batch_size=None, num_workers=workers))
    assert len(seen) == len(streamed) and len(set(seen)) == len(seen)
