"""What NVML tells about the GPUs that this process may use: their memory, and who holds it.

NVML counts a whole device with all its users and the driver's own share; PyTorch counts this process alone. Everything here
only looks: no process is ever signalled. In a container, NVML's process ids are the host's, so names may be missing.
"""

import os
import pwd
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pynvml

PROC = Path("/proc")
BUDGET_SHARE = 90
"""Percent of what is free that a run may use where no budget is given."""


@dataclass(frozen=True)
class Holder:
    """A process that holds memory of a GPU; None is what NVML or the system keeps to itself."""

    pid: int
    user: str | None
    command: str | None
    bytes: int | None


@dataclass(frozen=True)
class VisibleGPU:
    """One GPU or MIG instance that this process may use; None is what its driver doesn't tell."""

    number: int
    """As PyTorch counts, the N of cuda:N."""
    uuid: str
    name: str
    total: int | None
    free: int | None
    compute_capability: tuple[int, int] | None
    holders: tuple[Holder, ...] | None
    """Most memory first; None where the driver lists no processes."""

    @property
    def used(self) -> int | None:
        """Count the bytes that are taken, by whomever."""
        return None if self.total is None else self.total - self.free


class Inventory(NamedTuple):
    """The GPUs that this process may use, and why they are none or not those that were meant, if so."""

    gpus: tuple[VisibleGPU, ...]
    problem: str | None


def read_gpus(environment: Mapping[str, str] = os.environ) -> Inventory:
    """Ask NVML about the GPUs that `CUDA_VISIBLE_DEVICES` leaves visible, in PyTorch's order."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return Inventory((), f"NVML isn't there ({error}): no NVIDIA GPU, or no driver")
    try:
        found, problem = _visible(_machine(), environment)
        return Inventory(tuple(_describe(number, unit) for number, unit in enumerate(found)), problem)
    except pynvml.NVMLError as error:
        return Inventory((), f"NVML fails ({error}); see whether nvidia-smi works")
    finally:
        pynvml.nvmlShutdown()


def default_budget(gpus: Sequence[VisibleGPU]) -> int | None:
    """Give the free memory of the fullest of the GPUs to be used, less 10 %; None where it isn't known."""
    free = [gpu.free for gpu in gpus]
    return None if not free or None in free else min(free) * BUDGET_SHARE // 100


class _Unit(NamedTuple):
    """What CUDA counts as one device: a GPU, or an instance of one that runs in MIG mode."""

    handle: Any
    gpu: Any
    """The whole GPU's handle."""
    uuid: str

    @property
    def is_mig(self) -> bool:
        return self.handle is not self.gpu


class _GPU(NamedTuple):
    uuid: str
    name: str
    units: list[_Unit]


def _ask(question, *args) -> Any:
    """Give NVML's answer, None where this driver, device or user gets none."""
    try:
        return question(*args)
    except pynvml.NVMLError:
        return None


def _machine() -> list[_GPU]:
    handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    return [_GPU(pynvml.nvmlDeviceGetUUID(h), pynvml.nvmlDeviceGetName(h), _units(h)) for h in handles]


def _units(gpu: Any) -> list[_Unit]:
    current_mode, _ = _ask(pynvml.nvmlDeviceGetMigMode, gpu) or (0, 0)
    if not current_mode:
        return [_Unit(gpu, gpu, pynvml.nvmlDeviceGetUUID(gpu))]
    slots = range(_ask(pynvml.nvmlDeviceGetMaxMigDeviceCount, gpu) or 0)
    instances = [_ask(pynvml.nvmlDeviceGetMigDeviceHandleByIndex, gpu, slot) for slot in slots]
    return [_Unit(i, gpu, pynvml.nvmlDeviceGetUUID(i)) for i in instances if i is not None]


def _visible(machine: list[_GPU], environment: Mapping[str, str]) -> tuple[list[_Unit], str | None]:
    """Choose as CUDA does: in the order given, up to the first name that isn't there."""
    wanted = environment.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        # CUDA shows a process one MIG instance of a GPU at most
        units, problem = [gpu.units[0] for gpu in machine if gpu.units], None
    else:
        units, problem = _named(machine, wanted)
    if units and units[0].is_mig:
        units = units[:1]
    if not units:
        return (
            [],
            problem or "no GPU of this machine can be used: none is there, or MIG mode is on without an instance",
        )
    return units, problem or _order_problem(machine, environment)


def _named(machine: list[_GPU], wanted: str) -> tuple[list[_Unit], str | None]:
    """Find the units of a list of names; CUDA shows none of them where one is named twice."""
    here = ", ".join(f"{i} {gpu.uuid}" for i, gpu in enumerate(machine)) or "none"
    units: list[_Unit] = []
    for name in wanted.split(","):
        unit = _find(machine, name.strip())
        if unit in units:
            return [], f"CUDA_VISIBLE_DEVICES={wanted!r} names {name!r} twice, which hides every GPU; here are {here}"
        if unit is None:
            hidden = "it and all after it" if units else "every GPU"
            return units, f"CUDA_VISIBLE_DEVICES={wanted!r} hides {hidden} at {name!r}; here are {here}"
        units.append(unit)
    return units, None


def _find(machine: list[_GPU], name: str) -> _Unit | None:
    """Find what an index, the start of a GPU's UUID or that of a MIG instance names; None if not exactly one."""
    if name.isdecimal():
        return next(iter(machine[int(name)].units), None) if int(name) < len(machine) else None
    if not name.startswith(("GPU-", "MIG-")):
        return None
    by_gpu = [next(iter(gpu.units), None) for gpu in machine if gpu.uuid.startswith(name)]
    by_instance = [unit for gpu in machine for unit in gpu.units if unit.is_mig and unit.uuid.startswith(name)]
    found = by_gpu + by_instance
    return found[0] if len(found) == 1 else None


def _order_problem(machine: list[_GPU], environment: Mapping[str, str]) -> str | None:
    if len({gpu.name for gpu in machine}) < 2 or environment.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID":
        return None
    return "GPUs differ, and CUDA counts the fastest first, nvidia-smi by slot: set CUDA_DEVICE_ORDER=PCI_BUS_ID"


def _describe(number: int, unit: _Unit) -> VisibleGPU:
    memory = _ask(pynvml.nvmlDeviceGetMemoryInfo, unit.handle)
    return VisibleGPU(
        number=number,
        uuid=unit.uuid,
        name=_ask(pynvml.nvmlDeviceGetName, unit.handle) or pynvml.nvmlDeviceGetName(unit.gpu),
        total=memory and memory.total,
        free=memory and memory.free,
        compute_capability=_ask(pynvml.nvmlDeviceGetCudaComputeCapability, unit.gpu),
        holders=_holders(unit.handle),
    )


def _holders(handle: Any) -> tuple[Holder, ...] | None:
    questions = (pynvml.nvmlDeviceGetGraphicsRunningProcesses, pynvml.nvmlDeviceGetComputeRunningProcesses)
    answers = [_ask(question, handle) for question in questions]
    if answers == [None, None]:
        return None
    processes = {process.pid: process for answer in answers for process in answer or ()}
    holders = [Holder(pid, _user(pid), _command(pid), process.usedGpuMemory) for pid, process in processes.items()]
    return tuple(sorted(holders, key=lambda holder: holder.bytes or 0, reverse=True))


def _user(pid: int) -> str | None:
    try:
        uid = (PROC / str(pid)).stat().st_uid
    except OSError:
        return None
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _command(pid: int) -> str | None:
    """Give a process's command line, or its name where the system hides the rest."""
    try:
        words = (PROC / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        words = ""
    return words or _ask(pynvml.nvmlSystemGetProcessName, pid)
