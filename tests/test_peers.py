import json
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.lerobot_environment import is_made
from benchmarks.peers import ask_lerobot, ratios
from benchmarks.training_cost import Memory, count_flops, device, parameters

needs_lerobot = pytest.mark.skipif(not is_made(), reason="needs LeRobot's environment, which benchmarks.peers makes")


def test_arithmetic_of_attention_counts_on_a_cpu_forward_and_backward():
    query, key, value = (torch.randn(1, 2, 8, 16, requires_grad=True) for _ in range(3))
    product = 2 * 2 * 8 * 8 * 16  # multiplications and additions of 2 heads, 8 x 8 pairs, 16 channels
    assert count_flops(lambda: F.scaled_dot_product_attention(query, key, value)) == 2 * product
    both = count_flops(lambda: F.scaled_dot_product_attention(query, key, value).sum().backward())
    assert both == (2 + 5) * product  # the backward computes the scores again


def test_frozen_parameters_are_counted_but_not_as_trained():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2).requires_grad_(False))
    assert parameters(model) == {"parameters": 16 + 10, "trained_parameters": 16}


def test_memory_sees_what_came_and_went_since_its_start_and_knows_what_was_there():
    memory = Memory()
    memory.start()
    torch.ones(2**26, device=device())  # 256 MiB, gone at once
    taken = memory.taken()
    assert taken["peak_bytes"] - taken["library_bytes"] == pytest.approx(2**28, rel=0.1)
    memory.start()
    assert memory.taken()["peak_bytes"] < taken["peak_bytes"]


def test_ratios_leave_out_what_libraries_take():
    naive = {"samples_per_second": 2.0, "flops_a_sample": 10, "peak_bytes": 300, "library_bytes": 100}
    other = {"samples_per_second": 8.0, "flops_a_sample": 5, "peak_bytes": 300, "library_bytes": 200}
    found = {name: each["other"] for name, each in ratios({"naive": naive, "other": other}).items()}
    assert found == {"speed": 4, "flops_a_sample": 0.5, "flops_per_second": 2, "memory": 0.5}


@pytest.mark.slow
def test_our_ways_run_beside_the_naive_one_and_are_written(tmp_path):
    command = [sys.executable, "-m", "benchmarks.peers", "--scale=small", "--rounds=1", f"--results={tmp_path}"]
    subprocess.run([*command, "--ways", "ours", "ours_cached"], check=True, capture_output=True)
    ways = json.loads((tmp_path / "peers.json").read_text())["ways"]
    assert ways["ours"]["flops_a_sample"] > ways["naive"]["flops_a_sample"]  # checkpointing computes some twice
    assert ways["ours_cached"]["flops_a_sample"] < ways["ours"]["flops_a_sample"]
    assert ways["ours_cached"]["parameters"] < ways["ours"]["parameters"]  # VGGT isn't there
    assert ways["ours_cached"]["trained_parameters"] == ways["ours"]["trained_parameters"]


@pytest.mark.slow
@needs_lerobot
def test_lerobots_policy_has_its_published_size_and_trains_at_a_thousandth_of_it():
    full = ask_lerobot("size", "full")
    # arXiv 2506.01844: 450 M, about 100 of them the expert's
    assert full["parameters"] / 1e6 == pytest.approx(450, abs=1)
    assert full["trained_parameters"] / 1e6 == pytest.approx(100, abs=1)
    small = ask_lerobot("train", "proportional", 2, 4)
    assert 800 < full["flops_a_sample"] / small["flops_a_sample"] < 1200
