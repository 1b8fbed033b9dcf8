"""The budget is kept to, seen through a stand-in for CUDA; in tests/faults a GPU's own allocator refuses."""

import pytest
import torch

import hf_vla.train
from hf_vla.memory.budget import MemoryBudgetError
from hf_vla.memory.cap import keep_to_budget
from hf_vla.memory.gpus import GPUS
from hf_vla.memory.sizes import GIB
from hf_vla.recipe import make_recipe
from hf_vla.train import train

GPU = GPUS["L40S"]


@pytest.fixture
def fractions(monkeypatch) -> list[float]:
    """Stand in for a GPU of 40 GiB, and collect the shares that the allocator is told to keep to."""
    given = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA L40S")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (30 * GIB, 40 * GIB))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", given.append)
    return given


@pytest.mark.parametrize(("processes", "beside"), [(1, GPU.context_bytes), (8, GPU.context_bytes + GPU.nccl_bytes)])
def test_the_allocator_keeps_to_the_budget_less_what_lies_beside_it(fractions, processes, beside):
    allowed = keep_to_budget(make_recipe({"memory": {"budget": "28GiB"}}), processes)
    assert allowed == 28 * GIB - beside
    assert fractions == [pytest.approx(allowed / (40 * GIB))]


def test_a_budget_beyond_the_gpu_caps_at_the_gpu(fractions):
    keep_to_budget(make_recipe({"memory": {"budget": "80GiB"}}))
    assert fractions == [1.0]


@pytest.mark.parametrize("sections", [{}, {"memory": {"budget": "28GiB"}, "training": {"use_cpu": True}}])
def test_without_a_budget_or_on_a_cpu_nothing_is_capped(fractions, sections):
    assert keep_to_budget(make_recipe(sections)) is None
    assert not fractions


def test_a_budget_that_cuda_itself_exceeds_is_refused(fractions):
    with pytest.raises(MemoryBudgetError, match=r"CUDA alone takes 0\.59 GiB"):
        keep_to_budget(make_recipe({"memory": {"budget": "512MiB"}}))
    assert not fractions


def test_training_keeps_to_it_before_anything_is_built(monkeypatch, tmp_path):
    def refuse(recipe, processes):
        raise MemoryBudgetError(f"asked with {recipe.memory.budget} and {processes}")

    monkeypatch.setattr(hf_vla.train, "keep_to_budget", refuse)
    monkeypatch.setattr(hf_vla.train, "build_trainer", lambda *args: pytest.fail("the model was built uncapped"))
    with pytest.raises(MemoryBudgetError, match="asked with 3GiB and 1"):
        train(make_recipe({"memory": {"budget": "3GiB"}, "training": {"use_cpu": True}}), tmp_path / "run")
