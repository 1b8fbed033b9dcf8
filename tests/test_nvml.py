import json
import os
import pwd
import subprocess
import sys

import pynvml
import pytest
from faults.fake_nvml import GIB, gpu, load_in_place_of_nvml

from hf_vla.memory import nvml
from hf_vla.memory.nvml import Holder, VisibleGPU, default_budget, read_gpus

NO_SUCH_PID = 2**31 - 1  # above the kernel's highest


@pytest.fixture
def fake_nvml(tmp_path_factory, monkeypatch):
    return load_in_place_of_nvml(tmp_path_factory.getbasetemp(), monkeypatch)


def visible(selection: str | None, **environment) -> list[str]:
    """UUIDs that a process with this CUDA_VISIBLE_DEVICES may use, without their tails."""
    environment |= {} if selection is None else {"CUDA_VISIBLE_DEVICES": selection}
    return [gpu.uuid.removesuffix("-aaaa") for gpu in read_gpus(environment).gpus]


def test_memory_and_holders_are_told(fake_nvml):
    fake_nvml.plug(
        gpu(0, used=20 * GIB, total=48 * GIB, capability="8.9"),
        f"process {NO_SUCH_PID} {3 * GIB} someone_elses_train",
        f"process {os.getpid()} {16 * GIB}",
    )
    found, problem = read_gpus()
    assert problem is None
    (only,) = found
    assert (only.number, only.name, only.compute_capability) == (0, "NVIDIA RTX 6000 Ada", (8, 9))
    assert (only.total, only.free, only.used) == (48 * GIB, 28 * GIB, 20 * GIB)
    mine, other = only.holders
    assert (mine.pid, mine.bytes, mine.user) == (os.getpid(), 16 * GIB, pwd.getpwuid(os.getuid()).pw_name)
    assert "pytest" in mine.command
    assert other == Holder(NO_SUCH_PID, None, "someone_elses_train", 3 * GIB)


def test_what_the_system_keeps_to_itself_is_none(fake_nvml):
    fake_nvml.plug(gpu(0, used=GIB), f"process {NO_SUCH_PID} -1", gpu(1), "process_error 4", gpu(2, total=-1))
    first, second, third = read_gpus().gpus
    assert first.holders == (Holder(NO_SUCH_PID, None, None, None),)
    assert second.holders is None
    assert (third.total, third.free, third.used) == (None, None, None)


def test_a_command_line_that_cannot_be_read_gives_the_name_alone(fake_nvml, monkeypatch, tmp_path):
    (tmp_path / "77").mkdir()  # hidepid leaves the folder and takes its files
    monkeypatch.setattr(nvml, "PROC", tmp_path)
    fake_nvml.plug(gpu(0), f"process 77 {GIB} python3")
    (holder,) = read_gpus().gpus[0].holders
    assert (holder.user, holder.command) == (pwd.getpwuid(os.getuid()).pw_name, "python3")


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (None, ["GPU-00000000", "GPU-00000001", "GPU-00000002"]),
        ("2,0", ["GPU-00000002", "GPU-00000000"]),
        (" 1 ", ["GPU-00000001"]),
        ("GPU-00000001-aaaa,GPU-00000000", ["GPU-00000001", "GPU-00000000"]),
        ("0,7,1", ["GPU-00000000"]),
        ("GPU-0000000", []),  # the start of three
        ("GPU-feed", []),
        ("-1", []),
        ("", []),
        ("NoDevFiles", []),
    ],
)
def test_cuda_visible_devices_is_read_as_cuda_does(fake_nvml, selection, expected):
    fake_nvml.plug(gpu(0), gpu(1), gpu(2))
    assert visible(selection) == expected
    found, problem = read_gpus({} if selection is None else {"CUDA_VISIBLE_DEVICES": selection})
    assert [gpu.number for gpu in found] == list(range(len(expected)))
    names_nothing = selection is not None and len(expected) < len(selection.split(","))
    assert bool(problem) == names_nothing


def test_a_name_given_twice_hides_all(fake_nvml):
    fake_nvml.plug(gpu(0), gpu(1))
    assert visible("0,1,GPU-00000001") == []
    assert "twice" in read_gpus({"CUDA_VISIBLE_DEVICES": "1,1"}).problem


def test_the_variable_of_this_process_counts(fake_nvml, monkeypatch):
    fake_nvml.plug(gpu(0), gpu(1))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert [g.uuid for g in read_gpus().gpus] == ["GPU-00000001-aaaa"]


MIG_MACHINE = (
    gpu(0, mig_mode=1, capability="8.0", name="A100"),
    f"mig MIG-11 {10 * GIB} {GIB} A100 MIG 1g.10gb",
    f"process 1 {GIB}",
    f"mig MIG-22 {20 * GIB} {2 * GIB} A100 MIG 2g.20gb",
    gpu(1, mig_mode=0, capability="8.0", name="A100"),
    gpu(2, mig_mode=1, capability="8.0", name="A100"),  # MIG mode without an instance
)


@pytest.mark.parametrize(
    ("selection", "expected"),
    [("MIG-22", ["MIG-22"]), ("0", ["MIG-11"]), ("1", ["GPU-00000001"]), ("2", []), ("MIG-22,MIG-11", ["MIG-22"])],
)
def test_mig_instances_stand_for_their_gpu(fake_nvml, selection, expected):
    fake_nvml.plug(*MIG_MACHINE)
    assert visible(selection) == expected


def test_a_mig_instance_has_its_own_memory_and_its_gpus_capability(fake_nvml):
    fake_nvml.plug(*MIG_MACHINE)
    (instance,) = read_gpus({"CUDA_VISIBLE_DEVICES": "MIG-22"}).gpus
    assert (instance.free, instance.total, instance.compute_capability) == (18 * GIB, 20 * GIB, (8, 0))
    assert instance.name == "A100 MIG 2g.20gb" and instance.holders == ()


def test_gpus_of_two_kinds_want_a_stated_order(fake_nvml):
    fake_nvml.plug(gpu(0, name="T400"), gpu(1, name="RTX 6000 Ada"))
    assert "CUDA_DEVICE_ORDER=PCI_BUS_ID" in read_gpus({}).problem
    assert read_gpus({"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}).problem is None


@pytest.mark.parametrize(("code", "says"), [(9, "Driver Not Loaded"), (18, "version mismatch")])
def test_a_driver_that_fails_leaves_no_gpu_and_says_why(fake_nvml, code, says):
    fake_nvml.plug(f"init {code}", gpu(0))
    found, problem = read_gpus()
    assert found == () and says.lower() in problem.lower()


def test_no_gpu_in_the_machine(fake_nvml):
    assert read_gpus().gpus == () and "none is there" in read_gpus().problem


def run_elsewhere(environment: dict[str, str]) -> dict:
    code = (
        "import json; from hf_vla.memory.nvml import read_gpus; gpus, problem = read_gpus();"
        "print(json.dumps({'free': [g.free for g in gpus], 'problem': problem}))"
    )
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return json.loads(result.stdout)


def test_the_stand_in_is_found_by_the_real_librarys_name(fake_nvml):
    fake_nvml.plug(gpu(0, used=20 * GIB), gpu(1))
    assert run_elsewhere(fake_nvml.environment()) == {"free": [28 * GIB, 48 * GIB], "problem": None}


def test_nvml_absent(monkeypatch):
    def not_there(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(pynvml, "nvmlLib", None)
    monkeypatch.setattr(pynvml, "CDLL", not_there)
    found, problem = read_gpus()
    assert found == () and "NVML isn't there" in problem and "driver" in problem


def with_free(*free: int | None) -> list[VisibleGPU]:
    return [VisibleGPU(i, f"GPU-{i}", "any", f and 48 * GIB, f, (8, 9), ()) for i, f in enumerate(free)]


@pytest.mark.parametrize(
    ("free", "budget"), [((28 * GIB, 20 * GIB), 18 * GIB), ((0, GIB), 0), ((28 * GIB, None), None), ((), None)]
)
def test_the_default_budget_is_what_the_fullest_has_free_less_a_tenth(free, budget):
    assert default_budget(with_free(*free)) == budget
