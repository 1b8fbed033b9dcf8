"""Order and dealing: every sample exactly once an epoch, whoever reads, and from wherever a run goes on."""

from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from hf_vla.data.loader import SKIPPED, RankBatches, build_loader
from hf_vla.data.order import Lanes, Order, Part
from hf_vla.sample import Sample

RANKS, WORKERS = (1, 2, 3), (0, 1, 3)
BLOCKS = (5, 1, 9, 4, 7, 2, 11)  # 39 samples
PARTS = {
    "all": Part(BLOCKS),
    "window": Part(BLOCKS, window=2),
    "wide_window": Part(BLOCKS, window=99),
    "one": Part((3,)),
}


class Numbers(Dataset):
    """Samples that are their own index."""

    def __init__(self, size: int, broken: tuple[int, ...] = ()):
        self.size, self.broken = size, broken

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> Sample:
        if i in self.broken:
            raise ValueError(f"sample {i} is broken")
        return Sample([], np.zeros(1), np.zeros((2, 1)), np.zeros(2, bool), "", 0, i, "numbers")


def collate(samples: list[Sample]) -> dict:
    return {"index": [s.frame_index for s in samples], "is_pad": [bool(s.action_is_pad.all()) for s in samples]}


def seen(batches: list[dict]) -> list[int]:
    """List the samples that count."""
    return [i for batch in batches for i, is_pad in zip(batch["index"], batch["is_pad"], strict=True) if not is_pad]


def read_epoch(order: Order, ranks: int, workers: int, started: bool = True) -> list[list[dict]]:
    """Read epoch 1 on every rank, in batches of 4; workers that aren't started leave their work to this process."""
    loaders = [
        build_loader(Numbers(len(order)), RankBatches(order, 4, r, ranks, workers), collate, workers * started)
        for r in range(ranks)
    ]
    for loader in loaders:
        loader.set_epoch(1)
    return [list(loader) for loader in loaders]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_every_sample_exactly_once_an_epoch_and_ranks_in_step(part, ranks, workers):
    order = Order((part,), seed=3)
    by_rank = read_epoch(order, ranks, workers, started=part is PARTS["window"])
    assert len({len(batches) for batches in by_rank}) == 1
    assert Counter(i for batches in by_rank for i in seen(batches)) == Counter(range(len(order)))


def test_seed_and_epoch_decide_the_order_and_nothing_else_does():
    for part in (PARTS["all"], PARTS["window"]):
        first = Order((part,), seed=1).sequence(2)
        np.random.seed(7)
        assert np.array_equal(Order((part,), seed=1).sequence(2), first)
        assert not np.array_equal(Order((part,), seed=1).sequence(3), first)
        assert not np.array_equal(Order((part,), seed=2).sequence(2), first)


def test_a_window_holds_few_blocks_and_mixes_them():
    part = Part((10,) * 12, window=3)
    sequence = part.permutation((0, 0))
    windows = [set(window.tolist()) for window in (sequence // 10).reshape(4, 30)]
    assert [len(blocks) for blocks in windows] == [3] * 4
    assert len(set.union(*windows)) == 12
    assert len(set((sequence[:6] // 10).tolist())) > 1


def test_each_worker_of_each_rank_reads_blocks_of_its_own():
    ranks, workers, batch_size = 2, 3, 4
    order = Order((Part((10,) * 240, window=2),))
    blocks = {}
    for rank in range(ranks):
        for k, batch in enumerate(RankBatches(order, batch_size, rank, ranks, workers)):
            blocks.setdefault((rank, k % workers), set()).update(draw.index // 10 for draw in batch)
    shared = sum(map(len, blocks.values())) - 240
    assert shared <= 2 * len(blocks)  # where a stretch of the order ends, within a window


@pytest.mark.parametrize("before", [(1, 0, 4), (2, 3, 4), (3, 0, 1)], ids=str)
@pytest.mark.parametrize("after", [(1, 0, 4), (2, 3, 4), (3, 1, 2), (1, 0, 5)], ids=str)
@pytest.mark.parametrize("name", ["all", "window"])
def test_going_on_with_other_processes_keeps_what_is_still_to_be_seen(name, before, after):
    order = Order((PARTS[name],), seed=5)
    (ranks, workers, batch_size), accumulation = before, 2
    old = [RankBatches(order, batch_size, r, ranks, workers) for r in range(ranks)]
    steps = 2
    done = [draw.index for batches in old for batch in list(batches)[:steps] for draw in batch]
    position, lanes = len(done), old[0].lanes
    assert position == steps * ranks * batch_size
    ranks, workers, batch_size = after
    by_rank = []
    for rank in range(ranks):
        batches = RankBatches(order, batch_size, rank, ranks, workers)
        begun = batches.seek(0, position, lanes, accumulation)
        assert begun % accumulation == 0
        by_rank.append(list(batches))
        assert begun + len(by_rank[-1]) == len(batches)
    rest = [draw.index for batches in by_rank for batch in batches for draw in batch if not draw.is_padding]
    assert Counter(done + rest) == Counter(range(len(order)))
    first_step = [draw for batches in by_rank for batch in batches[:accumulation] for draw in batch]
    assert any(not draw.is_padding for draw in first_step)


def test_seeking_goes_on_with_the_very_batches():
    order = Order((PARTS["window"],), seed=5)
    whole = RankBatches(order, 4, 1, 2, 3)
    whole.set_epoch(3)
    sought = RankBatches(order, 4, 1, 2, 3)
    begun = sought.seek(3, 2 * 8, whole.lanes)
    assert begun == 2
    assert list(sought) == list(whole)[2:]
    for batches in (whole, sought):
        batches.set_epoch(4)
    assert list(sought) == list(whole)


def test_a_mixture_without_weights_sees_each_sample_once():
    order = Order((Part((5, 6)), Part(BLOCKS, window=2), Part((1,))), seed=1)
    for epoch in range(3):
        assert sorted(order.sequence(epoch, Lanes(3, 2)).tolist()) == list(range(51))


@pytest.mark.parametrize("lanes", [None, Lanes(6, 2)], ids=["global", "lanes"])
def test_a_weighted_mixture_draws_by_weight_and_each_part_goes_through_its_own_epochs(lanes):
    parts = (Part((4, 3), weight=3.0), Part((30, 11), weight=1.0))
    order = Order(parts, seed=1)
    drawn = [order.sequence(epoch, lanes) for epoch in range(7)]
    small = [sequence[sequence < 7] for sequence in drawn]
    assert {len(draws) for draws in small} == {36}
    counts = np.bincount(np.concatenate(small), minlength=7)  # 7 * 36 draws: 36 whole epochs of 7
    assert counts.tolist() == [36] * 7
    large = np.bincount(np.concatenate([sequence[sequence >= 7] - 7 for sequence in drawn]), minlength=41)
    assert (large.min(), large.max()) == (2, 3)  # 84 draws of 41


def test_a_weighted_part_is_in_its_own_order():
    parts = (Part((4, 3), weight=1.0), Part((21,), weight=1.0))
    sequence = Order(parts, seed=9).sequence(2)
    draws = sequence[sequence < 7]  # numbers 28 to 41: its epochs 4 and 5
    own = [parts[0].permutation((9, epoch, 0)) for epoch in (4, 5)]
    assert np.array_equal(draws, np.concatenate(own))


@pytest.mark.parametrize("parts", [(), (Part(()),), (Part((1,), weight=1.0), Part((1,))), (Part((1,), weight=0.0),)])
def test_an_order_of_nothing_or_half_weights_is_refused(parts):
    with pytest.raises(ValueError, match=r"nothing to draw|weight above 0"):
        Order(parts)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_sample_stops_the_loader_or_is_skipped_and_told(workers):
    order = Order((Part((20,)),))
    broken = Numbers(20, broken=(3, 4, 11))
    with pytest.raises(ValueError, match="is broken"):
        list(build_loader(broken, RankBatches(order, 4), collate, workers))
    batches = list(build_loader(broken, RankBatches(order, 4), collate, workers, on_error="skip"))
    assert sorted(seen(batches)) == [i for i in range(20) if i not in broken.broken]
    assert sorted(text for batch in batches for text in batch[SKIPPED]) == [
        f"sample {i} is broken" for i in (11, 3, 4)
    ]
    with pytest.raises(ValueError, match="broken as a whole"):
        list(build_loader(Numbers(20, tuple(range(20))), RankBatches(order, 4), collate, workers, on_error="skip"))


def test_the_loader_leaves_torchs_generator_alone():
    before = torch.get_rng_state()
    read_epoch(Order((PARTS["all"],)), 1, 1)
    assert torch.equal(torch.get_rng_state(), before)
