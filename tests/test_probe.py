"""The probe: the line through measured peaks, the micro-batch it proposes, and the proof by real training."""

import gc
import subprocess
import sys
import weakref

import pytest
import torch

from hf_vla.memory.gpus import find_gpu
from hf_vla.memory.meter import GPUMeter, HostMeter, Usage
from hf_vla.memory.probe import calibrate, probe
from hf_vla.probe import TrainingRuns, longest
from hf_vla.trainer import VLATrainer
from tests.faults.fake_nvml import GIB, gpu, load_in_place_of_nvml
from tests.faults.shortage import Shortage, in_forward
from tests.tiny_run import tiny_recipe

REST, SAMPLE, OUTSIDE = 1000, 100, 50


class Machine:
    """A run and a meter of it: memory that grows by the sample, and more than the line says from `bend` samples on."""

    name = "RTX 4090"

    def __init__(self, bend: int = 1_000, memory: int = 1_000_000):
        self.bend, self.memory = bend, memory
        self.ran: list[tuple[int, int]] = []

    def __call__(self, batch_size: int, steps: int) -> bool:
        self.ran.append((batch_size, steps))
        return self._peak(batch_size) <= min(self.memory, self.budget)

    def cap(self, budget: int) -> None:
        self.budget = budget

    def start(self) -> None:
        pass

    def peak(self) -> Usage:
        peak = self._peak(self.ran[-1][0])
        return Usage(allocated=peak - OUTSIDE, reserved=peak - OUTSIDE, outside=OUTSIDE)

    def _peak(self, batch_size: int) -> int:
        return REST + SAMPLE * batch_size + (200 if batch_size >= self.bend else 0)


def test_the_largest_that_the_line_allows_is_run_before_it_is_promised():
    machine = Machine()
    result = probe(machine, machine, budget=3000, largest=64)
    assert (result.at_rest, result.per_sample) == (REST, SAMPLE)
    assert result.batch_size == 17  # 1000 + 17 * 100 = 2700, 90 % of the budget
    assert machine.ran == [(1, 3), (2, 3), (4, 3), (17, 10)]


def test_what_the_line_did_not_foresee_is_found_by_the_proof():
    machine = Machine(bend=16)
    result = probe(machine, machine, budget=3000, largest=64)
    assert result.batch_size == 15
    assert [size for size, steps in machine.ran if steps == 10] == [17, 15]
    assert result.measurements[3].usage.total > 2700


@pytest.mark.parametrize(
    ("budget", "largest", "found", "ran"),
    [
        (10_000, 8, 8, [1, 2, 4, 8]),  # no more than the effective batch
        (1400, 8, 2, [1, 2, 4, 2]),  # four fit the budget, but not 90 % of it
        (1000, 8, 0, [1]),  # not even one
        (10_000, 1, 1, [1, 1]),
    ],
)
def test_its_limits(budget, largest, found, ran):
    machine = Machine()
    assert probe(machine, machine, budget, largest).batch_size == found
    assert [size for size, _ in machine.ran] == ran


def test_what_was_measured_is_used_by_the_next_plan(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    machine = Machine()
    before = find_gpu("RTX 4090")
    calibrate(probe(machine, machine, budget=3000, largest=4))
    after = find_gpu("NVIDIA GeForce RTX 4090")
    assert after.context_bytes == OUTSIDE != before.context_bytes
    assert after.source.startswith("measured by hf-vla probe")
    assert after.bandwidth == before.bandwidth


HOLD_AND_FORGET = """
import torch
from hf_vla.memory.meter import HostMeter

meter = HostMeter()
meter.start()
before = meter.peak().total
block = torch.ones(64 * 2**20, dtype=torch.uint8)
del block
assert meter.peak().total - before > 60 * 2**20
meter.start()
assert meter.peak().total - before < 30 * 2**20
"""


def test_the_hosts_meter_sees_what_was_held_and_forgets_it():
    # In a process of its own: this one holds what other tests freed, and a new block may come out of that.
    subprocess.run([sys.executable, "-c", HOLD_AND_FORGET], check=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    with pytest.raises(ValueError, match="no GPU to measure"):
        GPUMeter()


def test_what_a_driver_keeps_to_itself_is_not_the_processes(tmp_path_factory, monkeypatch):
    """NVML counts it as used; of CUDA's bytes it is no part."""
    kept, others, context, reserved = GIB // 2, 20 * GIB, GIB // 4, 2 * GIB
    nvml = load_in_place_of_nvml(tmp_path_factory.getbasetemp(), monkeypatch)
    nvml.plug(gpu(0, used=kept + others))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: reserved)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: reserved)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: reserved)
    meter = GPUMeter()
    nvml.plug(gpu(0, used=kept + others + context + reserved))
    cuda_total = 48 * GIB - kept
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (cuda_total - others - context - reserved, cuda_total))
    assert meter.peak().outside == context


def test_real_training_under_the_hosts_meter(tmp_path):
    """Two samples fit: four are seen to fail, three are tried in vain, and two are proven."""
    runs = TrainingRuns(tiny_recipe(data={"batch_size": 4}), tmp_path)
    in_forward(runs.model, Shortage(rows=2))
    result = probe(runs, HostMeter(), budget=2**40, largest=4)
    assert [(m.batch_size, m.fits) for m in result.measurements] == [
        (1, True),
        (2, True),
        (4, False),
        (3, False),
        (2, True),
    ]
    assert result.batch_size == 2
    assert all(m.usage.total > 2**26 for m in result.measurements)
    assert (tmp_path / "2x10/checkpoint-10/trainer_state.json").is_file()


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"training": {"optim": "adamw_bnb_8bit"}},
        {"training": {"max_grad_norm": 0.0}, "memory": {"optimizer_in_backward": True}},
    ],
    ids=["", "8 bits", "in backward"],
)
def test_a_run_leaves_nothing_to_the_next_on_the_same_model(tmp_path, monkeypatch, sections):
    if "8bit" in str(sections):
        pytest.importorskip("bitsandbytes")
    optimizers, create = [], VLATrainer.create_optimizer

    def create_and_note(trainer, model=None):
        optimizers.append(weakref.ref(create(trainer, model)))
        return optimizers[-1]()

    monkeypatch.setattr(VLATrainer, "create_optimizer", create_and_note)
    runs = TrainingRuns(tiny_recipe(**sections), tmp_path)
    weights = {name: p.detach().clone() for name, p in runs.model.named_parameters()}
    for batch_size in (1, 2):
        assert runs(batch_size, 2)
        moved = [name for name, p in runs.model.named_parameters() if not torch.equal(p, weights[name])]
        assert len(moved) > len(weights) / 2
        weights = {name: p.detach().clone() for name, p in runs.model.named_parameters()}
    gc.collect()
    assert optimizers and not [optimizer for optimizer in optimizers if optimizer()]


def test_the_longest_prompts_come_first(tmp_path):
    runs = TrainingRuns(tiny_recipe(), tmp_path)
    tasks = sorted(runs.train_dataset.tasks, key=len, reverse=True)
    assert [longest(runs.train_dataset, 3)[i].task for i in range(3)] == tasks[:3]
    assert len(longest(runs.train_dataset, len(tasks) + 5)) == len(tasks) + 5


@pytest.mark.gpu
def test_on_a_gpu_what_is_verified_stays_under_the_budget(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = {"vggt": {"embed_dim": 256, "depth": 4, "num_heads": 4, "encoder_depth": 4, "encoder_num_heads": 4}}
    recipe = tiny_recipe(model=model, data={"image_size": 224, "batch_size": 64}, training={"use_cpu": False})
    meter, budget = GPUMeter(), 2 * 2**30
    result = probe(TrainingRuns(recipe, tmp_path), meter, budget, largest=64)
    assert 1 <= result.batch_size <= 64
    proof = result.measurements[-1]
    assert proof.fits
    assert proof.usage.total <= 0.9 * budget
    line = result.at_rest + result.per_sample * result.batch_size
    assert line == pytest.approx(proof.usage.total, rel=0.1)
