import json
import os
import shutil
import subprocess
from types import SimpleNamespace

import pytest
import torch
from faults.fake_nvml import GIB, gpu, load_in_place_of_nvml
from tiny_run import tiny_recipe
from typer.testing import CliRunner

from hf_vla.cli import app
from hf_vla.memory import preflight, preflight_sources
from hf_vla.memory.check import Check, checks_to_json, format_checks, refuse_on_failure
from hf_vla.memory.nvml import Inventory, VisibleGPU, read_gpus
from hf_vla.memory.preflight import (
    check_batch,
    check_disk,
    check_gpus,
    check_memory,
    check_precision,
    check_shared_memory,
    run_checks,
)
from hf_vla.memory.sizes import format_size
from hf_vla.planning import plan_for_here
from hf_vla.recipe import RecipeError


def find(checks: list[Check], title: str) -> Check:
    (found,) = [check for check in checks if check.title == title]
    return found


@pytest.fixture
def fake_nvml(tmp_path_factory, monkeypatch):
    return load_in_place_of_nvml(tmp_path_factory.getbasetemp(), monkeypatch)


@pytest.fixture
def cuda_build(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.fixture
def one_process(monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def test_a_tiny_recipe_passes_on_a_cpu(monkeypatch, tmp_path, one_process):
    monkeypatch.setattr(preflight_sources, "CONSTRAINTS", tmp_path / "none")  # whichever releases are here
    checks = run_checks(tiny_recipe(), tmp_path / "run")
    assert [check.title for check in checks] == [
        "GPUs",
        "Effective batch",
        "Mixed precision",
        "What trains",
        "Weights of VGGT",
        "Weights of the language encoder",
        "Tokenizer",
        "Dataset",
        "Disk",
        "Packages",
    ]
    assert all(check.status == "ok" for check in checks), format_checks(checks)
    refuse_on_failure(checks)
    assert not (tmp_path / "run").exists()


# GPUs and who holds them -----------------------------------------------------------------------------------------------


def test_every_ranks_gpu_is_compared_with_the_plan(fake_nvml, one_process, cuda_build, tmp_path):
    fake_nvml.plug(gpu(0, used=20 * GIB), gpu(1, used=25 * GIB), gpu(2, used=30 * GIB), gpu(3, used=1 * GIB))
    recipe = tiny_recipe(memory={"gpus": 3}, training={"use_cpu": False, "bf16": True})
    checks = run_checks(recipe, tmp_path, planned_peak=22 * GIB)
    statuses = {c.title: c.status for c in checks if c.title.startswith("Memory")}
    assert statuses == {"Memory of GPU 0": "ok", "Memory of GPU 1": "warn", "Memory of GPU 2": "fail"}
    assert "GPU-00000003-aaaa" in find(checks, "Memory of GPU 2").advice
    with pytest.raises(
        RecipeError, match=r"1 of \d+ checks failed:\n✗ Memory of GPU 2: 18\.00 GiB of 48\.00 GiB free"
    ):
        refuse_on_failure(checks)


def test_the_doctor_plans_for_the_gpus_that_are_here(fake_nvml, one_process, cuda_build, tmp_path):
    fake_nvml.plug(gpu(0, used=20 * GIB), gpu(1, used=46 * GIB))
    recipe = tiny_recipe(training={"use_cpu": False, "bf16": True})
    recipe.save(tmp_path / "tiny.json")
    told = CliRunner().invoke(app, ["doctor", str(tmp_path / "tiny.json"), "--json"])
    checks = {check["title"]: check for check in json.loads(told.stdout)["checks"]}
    total = format_size(plan_for_here(recipe).total)
    assert checks["Plan"]["status"] == "ok" and f"planned peak {total}" in checks["Plan"]["detail"]
    assert all(f"{total} are needed" in checks[f"Memory of GPU {number}"]["detail"] for number in (0, 1))


def test_a_dataset_that_cannot_be_opened_is_the_doctors_to_say(fake_nvml, one_process, tmp_path):
    fake_nvml.plug(gpu(0))
    (tmp_path / "empty").mkdir()
    recipe = tiny_recipe(data={"dataset": str(tmp_path / "empty")}, training={"use_cpu": False})
    assert plan_for_here(recipe) is None
    assert find(run_checks(recipe, tmp_path), "Dataset").status == "fail"


def test_a_launcher_of_several_machines_checks_this_ones_gpus(
    fake_nvml, one_process, cuda_build, monkeypatch, tmp_path
):
    fake_nvml.plug(gpu(0), gpu(1))
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    checks = run_checks(tiny_recipe(training={"use_cpu": False, "bf16": True}), tmp_path, planned_peak=GIB)
    assert "4 x accumulation 1 x GPUs 4 = 16" in find(checks, "Effective batch").detail
    assert find(checks, "GPUs").status == "ok" and find(checks, "Memory of GPU 1").status == "ok"


def test_the_rest_of_a_gpu_has_names(fake_nvml):
    holders = [f"process {2**31 - 2 - i} {(7 - i) * GIB} job_{i}" for i in range(6)]
    fake_nvml.plug(gpu(0, used=40 * GIB), *holders, f"process {2**31 - 9} -1")
    detail = check_memory(read_gpus().gpus[0], needed=4 * GIB).detail
    assert detail.startswith(
        "8.00 GiB of 48.00 GiB free; held: 7.00 GiB by an unknown user (pid 2147483646, job_0); 6.00"
    )
    assert "2.00 GiB by 2 more" in detail and "job_5" not in detail  # one of them doesn't tell its size
    assert "13.00 GiB by the driver and by processes that it doesn't list" in detail
    assert detail.endswith("4.00 GiB are needed")


def test_what_this_process_holds_counts_as_free(fake_nvml):
    fake_nvml.plug(gpu(0, used=47 * GIB), f"process {os.getpid()} {46 * GIB}")
    check = check_memory(read_gpus().gpus[0], needed=30 * GIB)
    assert check.status == "ok" and "47.00 GiB of 48.00 GiB free" in check.detail and "held" not in check.detail


@pytest.mark.parametrize("needed", [None, 10 * GIB])
def test_a_gpu_without_free_memory_fails_planned_or_not(fake_nvml, needed):
    fake_nvml.plug(gpu(0, used=48 * GIB))
    check = check_memory(read_gpus().gpus[0], needed)
    assert check.status == "fail" and "--budget" not in check.advice and "ended for you" in check.advice


def test_unknown_memory_and_a_missing_plan_are_for_the_user_to_judge(fake_nvml):
    fake_nvml.plug(gpu(0, total=-1), gpu(1), "process_error 4")
    unknown, unplanned = (check_memory(g, needed) for g, needed in zip(read_gpus().gpus, (GIB, None), strict=True))
    assert unknown.status == "warn" and "doesn't tell" in unknown.detail
    assert unplanned.status == "warn" and "doesn't list who" in unplanned.detail and "hf-vla plan" in unplanned.advice


def test_fewer_gpus_than_processes(fake_nvml, cuda_build):
    fake_nvml.plug(gpu(0), gpu(1))
    check = check_gpus(read_gpus({"CUDA_VISIBLE_DEVICES": "0,5"}), wanted=2)
    assert check.status == "fail" and "2 are wanted" in check.detail and "'5'" in check.detail


def test_gpus_that_this_pytorch_cannot_use(fake_nvml, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    fake_nvml.plug(gpu(0))
    check = check_gpus(read_gpus(), wanted=1)
    assert check.status == "fail" and "built without CUDA" in check.detail and "use_cpu" in check.advice


def test_a_driver_that_is_too_old_for_this_pytorch(fake_nvml, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    fake_nvml.plug(gpu(0))
    check = check_gpus(read_gpus(), wanted=1)
    assert check.status == "fail" and "built for CUDA 13.0" in check.detail and "nvidia-smi" in check.advice


def test_no_driver_is_said():
    check = check_gpus(Inventory((), "NVML isn't there"), wanted=1)
    assert (check.status, check.detail) == ("warn", "none, so this trains on the CPU. NVML isn't there")


def test_a_plan_over_the_budget_fails(fake_nvml, one_process, tmp_path):
    checks = run_checks(tiny_recipe(), tmp_path, planned_peak=30 * GIB, budget=28 * GIB)
    assert find(checks, "Plan").status == "fail" and "--budget 28.0GiB" in find(checks, "Plan").advice


# The recipe against the machine ----------------------------------------------------------------------------------------


def test_the_effective_batch_is_shown():
    recipe = tiny_recipe(data={"batch_size": 2}, training={"gradient_accumulation_steps": 4})
    assert check_batch(recipe, 8).detail == "batch 2 x accumulation 4 x GPUs 8 = 64 samples a step"


def card(capability) -> VisibleGPU:
    return VisibleGPU(0, "GPU-0", "T4", 16 * GIB, 16 * GIB, capability, ())


@pytest.mark.parametrize(
    ("training", "gpus", "status"),
    [
        ({"bf16": True}, [card((8, 9))], "ok"),
        ({"bf16": True}, [card((8, 9)), card((7, 5))], "fail"),
        ({"bf16": True}, [card(None)], "ok"),
        ({"bf16": True, "use_cpu": True}, [], "ok"),
        ({"bf16": True, "use_cpu": False}, [], "fail"),
        ({"bf16": False, "fp16": True}, [card((7, 5))], "ok"),
        ({"bf16": False, "fp16": True}, [], "fail"),
        ({"bf16": False}, [card((8, 9))], "warn"),
        ({"bf16": False}, [], "ok"),
    ],
)
def test_mixed_precision_must_be_in_the_hardware(training, gpus, status):
    check = check_precision(tiny_recipe(training=training), gpus)
    assert check.status == status and (status == "ok" or "Set " in check.advice)


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({}, ["vggt trained (", "lang_encoder trained ("]),
        ({"model": {"freeze_vggt": True}}, ["vggt frozen;", "lang_encoder trained ("]),
        (
            {
                "model": {"freeze_vggt": True, "freeze_lang_encoder": True},
                "lora": {"apply_to": ["lang_encoder"], "r": 2},
            },
            ["vggt frozen;", "lang_encoder LoRA ("],
        ),
    ],
)
def test_what_trains_is_read_off_the_model(sections, expected, tmp_path, one_process):
    check = find(run_checks(tiny_recipe(**sections), tmp_path), "What trains")
    assert check.status == "ok"
    assert all(text in check.detail for text in [*expected, "fusion trained (", "head trained ("])


def test_a_backbone_that_is_not_frozen_as_asked_fails(tmp_path, one_process, monkeypatch):
    build = preflight.build_on_meta
    monkeypatch.setattr(preflight, "build_on_meta", lambda *args: build(*args).requires_grad_(True))
    recipe = tiny_recipe(model={"freeze_vggt": True})
    check = find(run_checks(recipe, tmp_path), "What trains")
    assert check.status == "fail" and check.detail == "vggt should be frozen, and isn't"


def test_a_model_that_cannot_be_built_fails_with_its_reason(tmp_path, one_process):
    recipe = tiny_recipe(
        model={"freeze_lang_encoder": True}, lora={"apply_to": ["lang_encoder"], "target_modules": ["q_prooj"]}
    )
    check = find(run_checks(recipe, tmp_path), "What trains")
    assert check.status == "fail" and "q_prooj" in check.detail


# Disk ----------------------------------------------------------------------------------------------------------------


class Tiny(torch.nn.Module):
    """250 trained float32 parameters in the head, 50 frozen in VGGT, which began as random numbers."""

    def __init__(self):
        super().__init__()
        self.model = torch.nn.ModuleDict({"vggt": torch.nn.Linear(50, 1, bias=False).requires_grad_(False)})
        self.head = torch.nn.Linear(250, 1, bias=False)


@pytest.mark.parametrize(
    ("training", "expected"),
    [
        ({"save_total_limit": 2, "max_steps": 100, "save_steps": 10}, 3 * 3200 + 1200),
        ({"save_total_limit": 5, "max_steps": 100, "save_steps": 50}, 3 * 3200 + 1200),
        ({"save_total_limit": None, "max_steps": 100, "save_steps": 0.25}, 5 * 3200 + 1200),
        ({"save_total_limit": None, "max_steps": -1, "num_train_epochs": 3}, 2 * 3200 + 1200),
        ({"save_total_limit": 1, "save_only_model": True}, 2 * 1200 + 1200),
        ({"save_strategy": "no"}, 1200),
    ],
)
def test_checkpoints_hold_what_trains_and_began_random_with_two_moments(training, expected):
    assert preflight.run_bytes(tiny_recipe(training=training), Tiny()) == expected


def test_a_full_disk_fails(monkeypatch, tmp_path):
    usage = shutil.disk_usage(tmp_path)
    recipe = tiny_recipe(training={"save_total_limit": 1, "max_steps": 10, "save_steps": 1})
    for free, status in ((5000, "fail"), (7700, "warn"), (9000, "ok")):  # 7600 are needed
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        assert check_disk(recipe, tmp_path / "not" / "there", Tiny()).status == status


CONFIG = SimpleNamespace(num_views=2, pool_grid=2, vggt_config=SimpleNamespace(embed_dim=16))


@pytest.mark.parametrize(
    ("cached", "training", "needed"),
    [
        ([], {}, 3 * 2 * 2 * 4 * 2 * 28 * 28 * 3),  # processes, workers, batches of each, samples, views, pixels
        ([], {"dataloader_prefetch_factor": 5}, 3 * 2 * 5 * 4 * 2 * 28 * 28 * 3),
        (["vggt"], {}, 3 * 2 * 2 * 4 * 2 * 2 * 2 * 32 * 2),  # grid, channels of both halves, bytes of bfloat16
    ],
    ids=["pictures", "more ahead", "features"],
)
def test_workers_that_hand_over_more_than_shared_memory_holds_fail(monkeypatch, tmp_path, cached, training, needed):
    usage = shutil.disk_usage(tmp_path)
    recipe = tiny_recipe(data={"num_workers": 2}, training=training)
    for free, status in ((needed - 1, "fail"), (needed, "ok")):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        check = check_shared_memory(recipe, SimpleNamespace(config=CONFIG), cached, 3, tmp_path)
        assert (check.status, "--shm-size" in check.advice) == (status, status == "fail")


def test_a_recipe_with_workers_is_checked_for_shared_memory(tmp_path, one_process):
    titles = [check.title for check in run_checks(tiny_recipe(data={"num_workers": 1}), tmp_path / "run")]
    assert titles[-2] == "Shared memory"


def test_a_file_where_the_run_should_go_fails(tmp_path):
    (tmp_path / "run").touch()
    assert check_disk(tiny_recipe(), tmp_path / "run" / "x", None).status == "fail"


# The list itself -------------------------------------------------------------------------------------------------------

THREE = [Check("ok", "A", "fine"), Check("warn", "B", "so so", "Look."), Check("fail", "C", "bad", "Mend it.")]


def test_each_line_has_its_mark_and_what_to_do():
    assert format_checks(THREE).splitlines() == [
        "✓ A: fine",
        "! B: so so",
        "    → Look.",
        "✗ C: bad",
        "    → Mend it.",
    ]


def test_json_holds_the_worst_status_and_every_field():
    told = json.loads(checks_to_json(THREE))
    assert told["status"] == "fail" and told["checks"][1] == vars(THREE[1])
    assert (
        json.loads(checks_to_json(THREE[:2]))["status"] == "warn" and json.loads(checks_to_json([]))["status"] == "ok"
    )


def test_only_failures_keep_a_training_from_starting():
    refuse_on_failure(THREE[:2])
    with pytest.raises(RecipeError) as caught:
        refuse_on_failure(THREE)
    assert (
        "1 of 3 checks failed" in str(caught.value)
        and "Mend it." in str(caught.value)
        and "so so" not in str(caught.value)
    )


def test_nothing_is_ever_ended(fake_nvml, tmp_path):
    with subprocess.Popen(["sleep", "60"]) as other:
        fake_nvml.plug(gpu(0, used=48 * GIB), f"process {other.pid} {47 * GIB}")
        check = check_memory(read_gpus().gpus[0], needed=GIB)
        is_alive = other.poll() is None
        other.kill()
    assert is_alive and check.status == "fail" and "sleep 60" in check.detail
