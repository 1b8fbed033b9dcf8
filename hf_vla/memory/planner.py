"""The planner: recipe and budget to a Plan that says whether it fits, who holds how much, and what it rests on.

What tensors hold is traced; what the allocator reserves beyond that is replayed; what the GPU and its libraries keep is a
constant of the GPU, measured or stated. Each stands on a line of its own, with its source.
"""

import dataclasses
from collections import Counter
from dataclasses import dataclass
from typing import Any

from hf_vla.memory.allocator import reserved_peak
from hf_vla.memory.budget import MemoryBudgetError
from hf_vla.memory.encode_ahead import micro_batches_at_once
from hf_vla.memory.gpus import DEFAULT, GPU, facts_of, find_gpu
from hf_vla.memory.ledger import PHASES, Ledger
from hf_vla.memory.nvml import default_budget, read_gpus
from hf_vla.memory.shapes import Shapes, read_shapes
from hf_vla.memory.sizes import parse_size
from hf_vla.memory.trace import Trace, trace
from hf_vla.recipe import Recipe

__all__ = ["Line", "MemoryBudgetError", "Plan", "make_plan", "plan_recipe"]

INT8_OUTLIERS = 0.05
"""Share of the activations that LLM.int8() keeps apart as outlier columns: it depends on the numbers, so it is stated."""


@dataclass(frozen=True)
class Line:
    """One part of the plan that no tensor of the model holds."""

    name: str
    bytes: int
    source: str


@dataclass(frozen=True)
class Plan:
    """What a recipe takes of each GPU."""

    batch_size: int
    accumulation: int
    gpus: int
    gpu: str
    budget: int | None
    """Bytes that the run may use on each GPU; None if nobody said."""
    components: dict[str, dict[str, int]]
    """Component, then kind, to bytes when the most are held."""
    tensor_peak: int
    """Their sum."""
    peak_phase: str
    phases: dict[str, int]
    """Each phase's own peak."""
    lines: tuple[Line, ...]
    host_bytes: int
    """Pinned memory of the host, for what is offloaded or paged."""
    parameters: dict[str, int]
    flops: dict[str, float]
    """Forward and backward of one sample, by component."""
    samples_per_second: float
    """Of all GPUs together; a roofline that ranks recipes, no measurement."""
    notes: tuple[str, ...]
    """What the plan assumes, and what the recipe costs in exactness."""

    @property
    def effective_batch(self) -> int:
        """Samples of one optimizer step."""
        return self.batch_size * self.accumulation * self.gpus

    @property
    def total(self) -> int:
        """Bytes that the run takes of each GPU."""
        return self.tensor_peak + sum(line.bytes for line in self.lines)

    @property
    def headroom(self) -> int | None:
        """Bytes of the budget that are left, or, below zero, that are missing."""
        return None if self.budget is None else self.budget - self.total

    @property
    def fits(self) -> bool | None:
        """Whether it fits; None without a budget."""
        return None if self.budget is None else self.total <= self.budget

    def to_dict(self) -> dict[str, Any]:
        """Give everything as JSON can hold it."""
        derived = ("effective_batch", "total", "headroom", "fits")
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in derived}


def plan_recipe(
    recipe: Recipe,
    budget: int | str | None = None,
    gpus: int | None = None,
    gpu: str | None = None,
    shapes: Shapes | None = None,
) -> Plan:
    """Plan a recipe.

    Args:
        recipe: the run.
        budget: bytes, or a size such as "28GiB", on each GPU; None takes the recipe's, else what is free here, less 10 %.
        gpus: how many; None takes the recipe's, else 1.
        gpu: the kind of GPU, by name; None takes the one that is here, else a common one.
        shapes: what the data brings; None reads the dataset if it is here.

    Raises:
        ValueError: for a budget that isn't a size, or a GPU that isn't known.
    """
    shapes = shapes or read_shapes(recipe)
    count = gpus or recipe.memory.gpus or 1
    budget = find_budget(recipe, budget, count)
    return make_plan(recipe, trace(recipe, shapes), budget, count, gpu_to_plan_for(gpu), shapes)


def make_plan(recipe: Recipe, traced: Trace, budget: int | None, gpus: int, gpu: GPU, shapes: Shapes) -> Plan:
    """Make the plan of a recipe that has been traced."""
    ledger = traced.ledger.sharded(gpus) if is_sharded(recipe, gpus) else traced.ledger
    peak, event = ledger.peak()
    return Plan(
        batch_size=ledger.batch_size,
        accumulation=recipe.training["gradient_accumulation_steps"],
        gpus=gpus,
        gpu=gpu.name,
        budget=budget,
        components=ledger.breakdown(event),
        tensor_peak=peak,
        peak_phase=PHASES[ledger.phase[event]],
        phases={phase: most for phase in PHASES[1:] if (most := ledger.peak(phase)[0])},
        lines=tuple(_lines(recipe, traced, ledger, gpus, gpu)),
        host_bytes=ledger.host_peak(),
        parameters=traced.parameters,
        flops=flops_a_sample(recipe, traced),
        samples_per_second=samples_per_second(recipe, traced, gpus, gpu),
        notes=tuple(_notes(recipe, shapes, gpus)),
    )


def find_budget(recipe: Recipe, budget: int | str | None, gpus: int) -> int | None:
    """Settle the budget: what was asked for, what the recipe says, or what the fullest GPU here has free, less 10 %."""
    given = recipe.memory.budget if budget is None else budget
    if isinstance(given, str):
        return parse_size(given)
    return default_budget(read_gpus().gpus[:gpus]) if given is None else given


def is_sharded(recipe: Recipe, gpus: int) -> bool:
    """Whether weights, gradients and states are divided over the GPUs."""
    return gpus > 1 and bool(recipe.training.get("fsdp"))


def flops_a_sample(recipe: Recipe, traced: Trace) -> dict[str, float]:
    """Count forward and backward of one sample, by component, wherever in a step they run."""
    batch_size, flops = traced.ledger.batch_size, Counter(traced.work.flops_of())
    for name, total in traced.work.flops_of(("encoding",)).items():
        flops[name] += total / micro_batches_at_once(recipe, batch_size)
    return {name: total / batch_size for name, total in flops.items()}


def samples_per_second(recipe: Recipe, traced: Trace, gpus: int, gpu: GPU) -> float:
    """Predict the throughput of all GPUs together: kernels, then what moves between GPUs and to the host."""
    accumulation = recipe.training["gradient_accumulation_steps"]
    ledger, share = traced.ledger, (gpus - 1) / gpus
    micro_step = traced.work.seconds(gpu, ("forward", "backward"))
    micro_step += traced.work.seconds(gpu, ("encoding",)) / micro_batches_at_once(recipe, ledger.batch_size)
    micro_step += 2 * ledger.host_traffic(("forward", "backward")) / gpu.host_bandwidth
    step = traced.work.seconds(gpu, ("step",)) + 2 * ledger.host_traffic(("loading",)) / gpu.host_bandwidth
    if is_sharded(recipe, gpus):
        micro_step += (2 * traced.weight_bytes + traced.trained_bytes) * share / gpu.peer_bandwidth
    else:
        step += 2 * traced.trained_bytes * share / gpu.peer_bandwidth
    return traced.ledger.batch_size * accumulation * gpus / (accumulation * micro_step + step)


def _lines(recipe: Recipe, traced: Trace, ledger: Ledger, gpus: int, gpu: GPU) -> list[Line]:
    streams = 2 if recipe.memory.encode_overlap else 1
    lines = [
        *_pools(recipe, ledger),
        Line("cuBLAS workspaces", streams * gpu.cublas_bytes, "PyTorch's defaults for this GPU: CublasHandlePool.cpp"),
        Line("CUDA context", gpu.context_bytes, gpu.source),
    ]
    if gpus > 1:
        lines.append(Line("NCCL", gpu.nccl_bytes, gpu.source))
    if is_sharded(recipe, gpus):
        source = "largest layer, the next prefetched, its gradient and the copy to reduce: FSDP2, _fsdp_collectives.py"
        lines.append(Line("gathered layers", 4 * traced.largest_unit + _summand(recipe, traced, gpus), source))
        source = "accelerate's FSDP2 trains 16-bit weights in float32: utils/fsdp_utils.py, fsdp2_prepare_model"
        lines.append(Line("float32 masters", _masters(recipe, traced) // gpus, source))
    if recipe.model.quantization == "int8":
        activations = sum(kinds.get("activations", 0) for kinds in ledger.breakdown(ledger.peak()[1]).values())
        lines.append(Line("int8 outliers", int(INT8_OUTLIERS * activations), "stated margin: they depend on numbers"))
    return lines


def _pools(recipe: Recipe, ledger: Ledger) -> list[Line]:
    """Give what the allocator reserves for each stream beyond what is held there when the most is held in all."""
    _, event = ledger.peak()
    source = "the caching allocator's rules, replayed on the trace"
    if not recipe.memory.encode_overlap:
        return [Line("fragmentation", _idle(ledger, event), source)]
    encoding = ledger.made_in("encoding")
    training = dataclasses.replace(ledger, size=ledger.size - encoding.size)
    beside = f"{source}, for a stream of its own: what one stream frees goes to no other"
    return [
        Line("fragmentation", _idle(training, event), source),
        Line("VGGT's stream", _idle(encoding, event), beside),
    ]


def _idle(ledger: Ledger, event: int) -> int:
    return reserved_peak(ledger) - int(ledger.totals()[event])


def _summand(recipe: Recipe, traced: Trace, gpus: int) -> int:
    """Give what a layer's reduced shard takes, in 16 and in 32 bits, until it is added to those that accumulate."""
    return 3 * traced.largest_unit // gpus if recipe.training["gradient_accumulation_steps"] > 1 else 0


def _masters(recipe: Recipe, traced: Trace) -> int:
    """Give what 16-bit weights that train take more in float32: they, their gradients and, unless in 8 bits, moments."""
    if not (recipe.training.get("bf16") or recipe.training.get("fp16")):
        return 0
    missing = 4 * traced.parameters["trained"] - traced.trained_bytes
    return missing * (2 if "8bit" in str(recipe.training.get("optim", "")) else 4)


def _notes(recipe: Recipe, shapes: Shapes, gpus: int) -> list[str]:
    notes = []
    if shapes.assumed:
        assumed = ", ".join(f"{name} {getattr(shapes, name)}" for name in shapes.assumed)
        notes.append(f"Assumed, for want of the dataset or tokenizer here: {assumed}.")
    if recipe.memory.cache:
        names = " and ".join(recipe.memory.cache)
        notes.append(
            f"Counts on cached outputs of {names}, which `hf-vla cache` builds; until then training runs what isn't there: "
            "plan that with --set 'memory.cache=[]'."
        )
    if recipe.memory.encode_ahead:
        notes.append(
            f"VGGT runs before each optimizer step, {recipe.memory.encode_ahead} pairs at once; its features are held for "
            "all of it, and pixels wait on the host."
        )
    if recipe.memory.encode_overlap:
        notes.append(
            "VGGT runs beside the step before, on a stream of its own: memory is counted so, speed as if it ran in turn, as "
            "nobody has measured what that gains."
        )
    if recipe.memory.optimizer_in_backward:
        notes.append("Optimizer in backward: no clipping of gradients, no accumulation; a step can't be run again.")
    if "8bit" in str(recipe.training.get("optim", "")):
        notes.append("8-bit optimizer states: block-wise rounding; close to AdamW in published runs, not equal to it.")
        if recipe.memory.embedding_state_bits == 32 and not recipe.model.freeze_lang_encoder:
            notes.append(
                "Moments of embeddings are in 32 bits, as Trainer keeps them: see memory.embedding_state_bits."
            )
    trains_backbone = not (recipe.model.freeze_vggt and recipe.model.freeze_lang_encoder)
    if trains_backbone and recipe.model.dtype == "bfloat16" and not is_sharded(recipe, gpus):
        notes.append("Backbone weights train in bfloat16, without float32 masters: the smallest updates are lost.")
    if is_sharded(recipe, gpus):
        notes.append("Sharding is modelled from the unsharded trace, not traced: states divide evenly over the GPUs.")
    return notes


def gpu_to_plan_for(name: str | None = None) -> GPU:
    """Give the facts of the GPU that was named, else of the one that is here, else of the guide's."""
    found = read_gpus().gpus
    if name or not found:
        return find_gpu(name or DEFAULT)
    return facts_of(found[0].name)
