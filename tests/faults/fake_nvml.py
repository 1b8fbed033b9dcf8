"""A stand-in library loaded in place of NVML, compiled from fake_nvml.c, and the machines that it can pretend to be.

A machine is told by lines; each belongs to the one above it:

    init CODE                                        what nvmlInit returns
    gpu UUID MAJOR.MINOR TOTAL USED MIG_MODE NAME    MIG_MODE 1 on, 0 off, -1 not supported; TOTAL -1: memory isn't told
    mig UUID TOTAL USED NAME                         an instance of the GPU above
    process PID BYTES [NAME]                         BYTES -1: N/A; without NAME it isn't told either
    process_error CODE                               what asking for processes returns
"""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pynvml
import pytest

SOURCE = Path(__file__).with_name("fake_nvml.c")
MIB = 2**20
GIB = 2**30


class FakeNVML:
    """The machine behind the stand-in; `plug` replaces it.

    Args:
        folder: where the library and its description of the machine lie; fits `LD_LIBRARY_PATH`.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.machine = folder / "machine.txt"

    def plug(self, *lines: str) -> None:
        self.machine.write_text("\n".join(lines) + "\n")

    def environment(self) -> dict[str, str]:
        """What makes another process load the stand-in by the real library's name."""
        return {**os.environ, "LD_LIBRARY_PATH": str(self.folder), "FAKE_NVML": str(self.machine)}


def gpu(number: int, used: int = 0, total: int = 48 * GIB, capability="8.9", mig_mode=-1, name="RTX 6000 Ada") -> str:
    return f"gpu GPU-{number:08x}-aaaa {capability} {total} {used} {mig_mode} NVIDIA {name}"


def load_in_place_of_nvml(folder: Path, monkeypatch: pytest.MonkeyPatch) -> FakeNVML:
    """Build the stand-in in a folder, unless it is there, and load it: no GPU in it yet, and none hidden."""
    library = folder / "libnvidia-ml.so.1"
    if not library.exists():
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            pytest.skip("no C compiler to build the stand-in for NVML with")
        subprocess.run([compiler, "-shared", "-fPIC", "-o", library, SOURCE], check=True)
    fake = FakeNVML(folder)
    fake.plug()
    monkeypatch.setenv("FAKE_NVML", str(fake.machine))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    monkeypatch.setattr(pynvml, "nvmlLib", ctypes.CDLL(str(library)))
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
    return fake
