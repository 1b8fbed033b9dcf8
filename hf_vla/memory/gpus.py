"""Facts of the GPUs that people plan for: what the driver and the libraries take, and how fast they are.

What a GPU's own memory holds before the first tensor can't be computed, only measured: `hf-vla probe` measures it and stores
it for the GPU's name; until then a margin is stated, and the plan says so.
"""

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

MIB = 2**20

STATED = "stated margin, not measured on this GPU; `hf-vla probe` measures it"


@dataclass(frozen=True)
class GPU:
    """One kind of GPU; rates are the data sheet's, dense, and the efficiencies are what eager PyTorch reaches of them."""

    name: str
    memory: int
    """Bytes that the driver shows."""
    half_flops: float
    """bf16 multiplications and additions a second on tensor cores, sums in float32."""
    single_flops: float
    """The same in float32, without TF32, which PyTorch leaves off."""
    bandwidth: float
    """Bytes a second of its memory."""
    host_bandwidth: float
    """Bytes a second to and from the host, one way, pinned."""
    peer_bandwidth: float
    """Bytes a second to and from another GPU, one way, in a ring."""
    cublas_bytes: int
    """cuBLAS's and cuBLASLt's workspaces, one of each for every stream."""
    context_bytes: int = 600 * MIB
    """CUDA context, loaded kernels, and what libraries keep outside PyTorch's allocator."""
    nccl_bytes: int = 400 * MIB
    """NCCL's buffers and its part of the context, with more than one GPU."""
    source: str = STATED
    """Where `context_bytes` and `nccl_bytes` come from."""
    compute_efficiency: float = 0.6
    bandwidth_efficiency: float = 0.75
    launch_seconds: float = 6e-6
    """The least time from one kernel to the next in eager mode."""


_CUBLAS = (2 * 4096 + 8 * 16) * 1024 + MIB
"""PyTorch's CUBLAS_WORKSPACE_CONFIG :4096:2:16:8, and 1 MiB for cuBLASLt. Source: CublasHandlePool.cpp."""
_CUBLAS_HOPPER = 2 * 32 * MIB
"""Both at 32 MiB from compute capability 9.0 on (same file)."""

GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("RTX 6000 Ada", 49_140 * MIB, 364.2e12, 91.1e12, 960e9, 25e9, 20e9, _CUBLAS),
        GPU("L40S", 46_068 * MIB, 362.0e12, 91.6e12, 864e9, 25e9, 20e9, _CUBLAS),
        GPU("RTX 4090", 24_564 * MIB, 165.2e12, 82.6e12, 1008e9, 25e9, 12e9, _CUBLAS),
        GPU("A100-80GB", 81_920 * MIB, 312.0e12, 19.5e12, 2039e9, 25e9, 235e9, _CUBLAS),
        GPU("H100-80GB", 81_559 * MIB, 989.4e12, 66.9e12, 3352e9, 50e9, 360e9, _CUBLAS_HOPPER),
        GPU("H200", 143_771 * MIB, 989.4e12, 66.9e12, 4800e9, 50e9, 360e9, _CUBLAS_HOPPER),
    )
}
DEFAULT = "RTX 6000 Ada"


def find_gpu(name: str = DEFAULT) -> GPU:
    """Find a GPU by a part of its name, with the constants that were measured for it if there are any.

    Args:
        name: as the data sheet or NVML has it ("NVIDIA RTX 6000 Ada Generation").

    Raises:
        ValueError: for a GPU that isn't listed; names those that are.
    """
    wanted = _plain(name)
    found = [gpu for gpu in GPUS.values() if _plain(gpu.name.split("-")[0]) in wanted or wanted in _plain(gpu.name)]
    if not found:
        raise ValueError(f"No facts about a GPU named {name!r}; known are {', '.join(GPUS)}.")
    measured = read_calibration().get(found[0].name, {})
    return replace(found[0], **measured)


def facts_of(name: str) -> GPU:
    """Give the facts of a GPU that is here; one that isn't listed is planned for by another's, and the plan says so."""
    try:
        return find_gpu(name)
    except ValueError:
        source = f"{DEFAULT}'s stated margin: nothing is known about a {name}; `hf-vla probe` measures it"
    return replace(find_gpu(DEFAULT), **{"name": name, "source": source, **read_calibration().get(name, {})})


def read_calibration() -> dict[str, dict]:
    """Read the measured constants of each GPU; empty where nothing has been measured yet."""
    path = calibration_file()
    return json.loads(path.read_text()) if path.is_file() else {}


def write_calibration(gpu: GPU) -> None:
    """Store a GPU's measured constants for the next plan."""
    fields = ("memory", "context_bytes", "nccl_bytes", "source", "compute_efficiency", "bandwidth_efficiency")
    entry = {name: value for name, value in asdict(gpu).items() if name in fields}
    path = calibration_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**read_calibration(), gpu.name: entry}, indent=2) + "\n")


def calibration_file() -> Path:
    """Say where measured constants are kept: the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "hf_vla" / "gpus.json"


def _plain(name: str) -> str:
    return name.lower().replace("nvidia", "").replace("generation", "").replace("geforce", "").replace(" ", "")
