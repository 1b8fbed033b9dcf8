import gc
import itertools

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig, LlamaModel

from hf_vla.memory.allocator import MIB, CachingAllocator, reserved_peak
from hf_vla.memory.ledger import TELLING
from hf_vla.memory.tracker import MemoryTracker


def bytes_of(tracker: MemoryTracker, component: str, kind: str) -> int:
    ledger = tracker.ledger()
    return ledger.breakdown(len(ledger.size) - 1).get(component, {}).get(kind, 0)


def test_it_counts_storages_not_views():
    with MemoryTracker() as tracker:
        x = torch.zeros(1024)
        views = [x[:10], x.view(32, 32), x.t()]
        assert bytes_of(tracker, "other", "temporaries") == 4096
        del x, views
    assert bytes_of(tracker, "other", "temporaries") == 0


def test_blocks_are_rounded_as_cuda_rounds_them():
    with MemoryTracker() as tracker:
        x = torch.zeros(1)
    assert bytes_of(tracker, "other", "temporaries") == 512
    assert x.nbytes == 4


def test_a_phase_knows_its_own_peak():
    with MemoryTracker() as tracker:
        with tracker.phase("forward"):
            x = torch.zeros(1024) + 1
        with tracker.phase("backward"):
            y = x + torch.ones(1024)
        with tracker.phase("step"):
            pass
    ledger = tracker.ledger()
    assert [ledger.peak(phase)[0] for phase in ("forward", "backward", "step")] == [8192, 12288, 8192]
    assert y.shape == x.shape


def test_what_autograd_saves_becomes_an_activation_of_whoever_made_it():
    inner, outer = nn.Linear(64, 64), nn.Linear(64, 64)
    with MemoryTracker() as tracker:
        tracker.label([*inner.parameters(), *outer.parameters()], "other", "weights")
        tracker.follow(inner, "vggt")
        tracker.follow(outer, "head")
        with tracker.phase("forward"), tracker.saved_as_activations():
            hidden = inner(torch.zeros(32, 64)).exp()
            loss = outer(hidden).square().sum()  # square saves what `outer` made
        assert bytes_of(tracker, "head", "activations") == 32 * 64 * 4
        with tracker.phase("backward"):
            loss.backward()
        del hidden, loss
        # gradients begin as temporaries of the part whose forward made their node
        assert (
            bytes_of(tracker, "vggt", "temporaries") == bytes_of(tracker, "head", "temporaries") == 64 * 64 * 4 + 512
        )
        tracker.label([p.grad for p in inner.parameters()], "vggt", "gradients")
    assert bytes_of(tracker, "vggt", "gradients") == 64 * 64 * 4 + 512


def test_host_memory_is_not_the_devices():
    with MemoryTracker() as tracker:
        with tracker.host():
            x = torch.zeros(1 << 20)
        y = x.clone()
    ledger = tracker.ledger()
    assert ledger.host_peak() == x.nbytes
    assert ledger.totals()[-1] == y.nbytes


def run_llama(batch_size: int, fake: bool):
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=50
    )
    gc.disable()
    try:
        with FakeTensorMode() if fake else torch.no_grad(), torch.enable_grad():
            model = LlamaModel(config)
            optimizer = torch.optim.AdamW(model.parameters())
            with MemoryTracker() as tracker:
                tracker.label(model.parameters(), "language", "weights")
                for _ in range(2):
                    with tracker.phase("forward"), tracker.saved_as_activations():
                        output = model(torch.zeros(batch_size, 7, dtype=torch.long), use_cache=False)
                    with tracker.phase("backward"):
                        output.last_hidden_state.sum().backward()
                    with tracker.phase("step"):
                        optimizer.step()
                        optimizer.zero_grad()
                    del output
    finally:
        gc.enable()
    return tracker


def test_fake_tensors_take_what_real_ones_take():
    fake, real = run_llama(3, fake=True).ledger(), run_llama(3, fake=False).ledger()
    for phase in ("forward", "backward", "step"):
        assert fake.peak(phase)[0] == pytest.approx(real.peak(phase)[0], rel=0.01)


def test_one_micro_batch_tells_every_other_exactly():
    telling, itself = (run_llama(size, fake=True).ledger(batch_size=size) for size in (TELLING, 9))
    told = telling.at_batch(9)
    assert told.size.tolist() == itself.size.tolist()
    assert reserved_peak(told) == reserved_peak(itself)
    with pytest.raises(ValueError, match="knows no other"):
        itself.at_batch(8)


def test_work_counts_attention_and_matrices():
    work = run_llama(2, fake=True).work()
    tokens, width, hidden, layers, steps = 2 * 7, 32, 64, 2, 2
    linear = 2 * tokens * (4 * width * width + 3 * width * hidden)
    attention = 4 * 2 * 2 * 7 * 7 * 16  # two products of (7 x 16) by (16 x 7), two heads, two sequences
    assert work.flops_of(("forward",))["other"] == steps * layers * (linear + attention)


def test_the_allocator_hands_out_segments_as_pytorch_does():
    allocator = CachingAllocator()
    small = allocator.take(600 * 1024)
    assert allocator.reserved == 2 * MIB
    allocator.take(900 * 1024)  # cut from the same segment
    assert allocator.reserved == 2 * MIB
    allocator.take(5 * MIB)
    assert allocator.reserved == 22 * MIB
    large = allocator.take(30 * MIB + 1)
    assert allocator.reserved == 54 * MIB
    allocator.give_back(large)
    assert allocator.take(32 * MIB) == large
    assert allocator.reserved == 54 * MIB
    allocator.give_back(small)
    assert allocator.take(580 * 1024) == small  # the 548 KiB behind the two are too few


def test_pieces_never_overlap_and_all_come_back():
    generator = torch.Generator().manual_seed(0)
    allocator, held = CachingAllocator(), {}
    for draw in torch.rand(3000, generator=generator).tolist():
        if draw < 0.45 and held:
            address = list(held)[int(draw * 7919) % len(held)]
            del held[address]
            allocator.give_back(address)
        else:
            size = int(2 ** (8 + 17 * draw))
            held[allocator.take(size)] = size
    ends = sorted((address, address + size) for address, size in held.items())
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ends))
    for address in held:
        allocator.give_back(address)
    assert sum(size for pieces in allocator._free.values() for size, _ in pieces) == allocator.reserved
