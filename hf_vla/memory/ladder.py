"""The search: every rung that keeps results as they were asked for, and the fastest recipes among those that fit.

Rungs: micro-batch against accumulation, activation checkpointing and its offload, optimizer states in 32 bits, 8 bits or
paged, the optimizer inside backward, cached features of frozen backbones, sharding over the GPUs. What must be traced anew
is traced, once; the rest (micro-batch, states, sharding) is read off the ledgers. Last, the fastest is tried with its frozen
VGGT ahead of each step.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from hf_vla.caching.build import AT_ONCE
from hf_vla.console import set_up_logging
from hf_vla.memory.budget import MemoryBudgetError
from hf_vla.memory.encode_ahead import pairs_of_a_step
from hf_vla.memory.gpus import GPU
from hf_vla.memory.ledger import TELLING
from hf_vla.memory.planner import Plan, gpu_to_plan_for, make_plan, plan_recipe, samples_per_second
from hf_vla.memory.shapes import Shapes, read_shapes
from hf_vla.memory.sizes import GIB, format_size
from hf_vla.memory.trace import Trace, state_bytes, trace
from hf_vla.memory.wishes import ALLOW, Wish, allowed_changes, recipe_of
from hf_vla.recipe import Recipe, RecipeError, make_recipe
from hf_vla.recipe.consistency import check_consistency
from hf_vla.workers import WORKERS

AS_IS, EIGHT_BIT, PAGED = "adamw_torch_fused", "adamw_bnb_8bit", "paged_adamw_8bit"
OPTIMIZERS = {AS_IS: "AdamW", EIGHT_BIT: "8-bit AdamW", PAGED: "paged 8-bit AdamW"}
CHECKPOINTING = {
    "": {},
    "checkpointing": {"activation_checkpointing": True},
    "offloaded checkpointing": {
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"offload": True},
    },
}
SHARDING = {
    "fsdp": True,
    "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer", "Block"]},
}
WORTH_ROUNDING = GIB
"""Bytes of optimizer states from which on 8 bits are tried: below that they would change numbers for little."""
WORTH_ENCODING_AHEAD = 1.01
"""Times the speed without, from which on VGGT ahead of a step is proposed: below that it is nothing one could measure."""
SHORTLIST = 8
"""Ways whose plans are made in full, fragmentation replayed; the fastest of them is then traced for itself."""


@dataclass(frozen=True)
class Candidate:
    """A recipe that the search found."""

    recipe: Recipe
    plan: Plan
    rungs: tuple[str, ...]
    """What it does to fit."""
    changes: tuple[str, ...]
    """What differs from what was asked for, in the results; none unless allowed."""


@dataclass(frozen=True, eq=False)
class _Asked:
    """What was asked for, or an allowed change of it."""

    wish: Wish
    changes: tuple[str, ...]
    recipe: Recipe


@dataclass(frozen=True)
class _Way:
    """A recipe and its trace, before its plan is made."""

    recipe: Recipe
    traced: Trace
    gpus: int
    rungs: tuple[str, ...]
    changes: tuple[str, ...]

    def tensor_peak(self) -> int:
        """Give the bytes that tensors hold, before anything else is counted."""
        sharded = self.gpus if "sharded" in self.rungs else 1
        return self.traced.ledger.sharded(sharded).peak()[0]

    def speed(self, gpu: GPU) -> float:
        """Predict samples a second."""
        return samples_per_second(self.recipe, self.traced, self.gpus, gpu)


def search(
    wish: Wish,
    budget: int,
    base: Recipe | None = None,
    gpu: str | None = None,
    shapes: Shapes | None = None,
    workers: int = 2,
) -> list[Candidate]:
    """Find the recipes that fit, fastest first; the first is traced for itself, the others' plans are read off ledgers.

    Args:
        wish: what to train, on how many GPUs, at which effective batch, and what may be changed.
        budget: bytes that the run may use on each GPU.
        base: recipe that the rest is taken from.
        gpu: the kind of GPU, by name.
        shapes: what the data brings; None reads the dataset if it is here.
        workers: processes that trace.

    Raises:
        MemoryBudgetError: if nothing fits; says the smallest budget that does, and holds the recipe for it.
        ValueError: if the effective batch can't be divided over the GPUs.
    """
    base = base or make_recipe({})
    shapes, facts = shapes or read_shapes(base), gpu_to_plan_for(gpu)
    _check_effective_batch(wish)
    ways = _ways(wish, base, shapes, workers)
    room = budget - facts.context_bytes - facts.cublas_bytes
    fitting = sorted(
        (way for way in ways if way.tensor_peak() <= room), key=lambda way: (-way.speed(facts), len(way.rungs))
    )
    shortlist = [_plan(way, budget, facts, shapes) for way in _one_of_each(fitting)[:SHORTLIST]]
    found = _exact([c for c in shortlist if c.plan.fits], budget, facts, shapes)
    if not found:
        raise _nothing_fits(min(ways, key=_Way.tensor_peak), budget, facts, shapes, wish)
    return [_with_vggt_ahead(found[0], budget, facts, shapes), *found[1:]]


def _ways(wish: Wish, base: Recipe, shapes: Shapes, workers: int) -> list[_Way]:
    """Go through every rung of a wish and of its allowed changes."""
    asked = [_Asked(*option, recipe_of(option[0], base)) for option in allowed_changes(wish)]
    structures = [(each, *structure) for each in asked for structure in _structures(each.recipe, each.wish)]
    with _mapper(workers) as mapped:
        traces = list(mapped(partial(_trace_step, shapes), [recipe for _, recipe, _ in structures]))
        traced = [(*structure, trace) for structure, trace in zip(structures, traces, strict=True)]
        large = list(dict.fromkeys(each for each, _, _, trace in traced if _is_worth_rounding(trace)))
        rounded = dict(zip(large, mapped(partial(_rounded_states, shapes), large), strict=True))
    return [
        way
        for each, recipe, rungs, trace in traced
        for way in _variants(recipe, trace, rounded.get(each, 0), each.wish, rungs, each.changes)
    ]


def _trace_step(shapes: Shapes, recipe: Recipe) -> Trace:
    return trace(recipe, shapes, TELLING, "step")


def _rounded_states(shapes: Shapes, asked: _Asked) -> int:
    return state_bytes(_with(asked.recipe, training={"optim": EIGHT_BIT}), shapes)


def _is_worth_rounding(traced: Trace) -> bool:
    return traced.ledger.held("optimizer") > WORTH_ROUNDING


def _structures(asked: Recipe, wish: Wish) -> Iterator[tuple[Recipe, tuple[str, ...]]]:
    """List what runs through different operations, and so has to be traced."""
    trains_backbone = wish.language != "frozen" or wish.vggt != "frozen"
    for cached in _cacheable(asked, wish):
        for checkpointing, keys in CHECKPOINTING.items() if trains_backbone else [("", {})]:
            rungs = tuple(filter(None, (checkpointing, cached and f"cached {' and '.join(cached)}")))
            off = {"activation_checkpointing": False, "activation_checkpointing_kwargs": None}
            training = {**off, **keys, "gradient_accumulation_steps": 2}
            memory = {"cache": cached, "encode_ahead": 0, "encode_overlap": False}
            yield _with(asked, training=training, memory=memory), rungs
            if "full" in (wish.language, wish.vggt) and checkpointing:
                in_backward = {**training, "gradient_accumulation_steps": 1, "max_grad_norm": 0.0}
                memory = {**memory, "optimizer_in_backward": True}
                yield _with(asked, training=in_backward, memory=memory), (*rungs, "optimizer in backward")


def _cacheable(asked: Recipe, wish: Wish) -> list[list[str]]:
    """List what may come from the cache: nothing, or every frozen backbone whose output depends on its input alone."""
    if not wish.cached:
        return [[]]
    frozen = [part for part, way in (("vggt", wish.vggt), ("lang_encoder", wish.language)) if way == "frozen"]
    if asked.model.fusion.type == "prefix":  # LLaMA reads the view tokens, through a projection that trains
        frozen = [part for part in frozen if part == "vggt"]
    return [[], frozen] if frozen else [[]]


def _variants(
    recipe: Recipe, traced: Trace, rounded: int, wish: Wish, rungs: tuple[str, ...], changes: tuple[str, ...]
) -> Iterator[_Way]:
    """Read off a trace what needs no other: micro-batch, kind of states (`rounded`: their bytes in 8 bits), sharding."""
    per_gpu = wish.effective_batch // wish.gpus
    in_backward = recipe.memory.optimizer_in_backward
    full = traced.ledger.held("optimizer")
    for optimizer, words in OPTIMIZERS.items() if _is_worth_rounding(traced) else [(AS_IS, "")]:
        share = 1 if optimizer == AS_IS else rounded / full
        states = replace(traced, ledger=traced.ledger.with_states(share, paged=optimizer == PAGED))
        for sharding in (False, True) if wish.gpus > 1 and not in_backward else (False,):
            for size in (per_gpu,) if in_backward else _divisors(per_gpu):
                training = {"optim": optimizer, "gradient_accumulation_steps": per_gpu // size}
                training |= SHARDING if sharding else {}
                named = (*rungs, *([words] if optimizer != AS_IS else []), *(["sharded"] if sharding else []))
                made = _with(recipe, training=training, data={"batch_size": size})
                yield _Way(made, states.at_batch(size), wish.gpus, named, changes)


def _one_of_each(ways: Sequence[_Way]) -> list[_Way]:
    """Keep the first micro-batch of each way."""
    first = {}
    for way in ways:
        first.setdefault((way.rungs, way.changes), way)
    return list(first.values())


def _plan(way: _Way, budget: int, gpu: GPU, shapes: Shapes) -> Candidate:
    plan = make_plan(way.recipe, way.traced, budget, way.gpus, gpu, shapes)
    return Candidate(way.recipe, plan, way.rungs, way.changes)


def _exact(candidates: list[Candidate], budget: int, gpu: GPU, shapes: Shapes) -> list[Candidate]:
    """Trace the fastest for itself, and drop it if it doesn't fit after all."""
    for place, candidate in enumerate(candidates):
        plan = plan_recipe(candidate.recipe, budget, gpu=gpu.name, shapes=shapes)
        if plan.fits:
            return [replace(candidate, plan=plan), *candidates[place + 1 :]]
    return []


def _with_vggt_ahead(best: Candidate, budget: int, gpu: GPU, shapes: Shapes) -> Candidate:
    """Let VGGT run ahead of the fastest one's steps where that is allowed, fits and is predicted to be faster still."""
    pairs = min(pairs_of_a_step(best.recipe), AT_ONCE)
    recipe = _with(best.recipe, memory={"encode_ahead": pairs})
    if pairs <= best.plan.batch_size or not _is_consistent(recipe):
        return best
    plan = plan_recipe(recipe, budget, gpu=gpu.name, shapes=shapes)
    if not plan.fits or plan.samples_per_second < WORTH_ENCODING_AHEAD * best.plan.samples_per_second:
        return best
    return replace(best, recipe=recipe, plan=plan, rungs=(*best.rungs, f"VGGT ahead, {pairs} pairs at once"))


def _is_consistent(recipe: Recipe) -> bool:
    try:
        check_consistency(recipe)
    except RecipeError:
        return False
    return True


def _with(recipe: Recipe, training: dict[str, Any] | None = None, **sections: dict[str, Any]) -> Recipe:
    changed = {name: replace(getattr(recipe, name), **values) for name, values in sections.items()}
    return replace(recipe, training={**recipe.training, **(training or {})}, **changed)


def _divisors(number: int) -> list[int]:
    return [size for size in range(number, 0, -1) if number % size == 0]


def _check_effective_batch(wish: Wish) -> None:
    if wish.effective_batch % wish.gpus:
        raise ValueError(
            f"An effective batch of {wish.effective_batch} can't be divided over {wish.gpus} GPUs; "
            f"choose a multiple of {wish.gpus}."
        )


def _nothing_fits(leanest: _Way, budget: int, gpu: GPU, shapes: Shapes, wish: Wish) -> MemoryBudgetError:
    """Say how far the leanest way is from the budget, traced for itself, and hand over its recipe."""
    plan = plan_recipe(leanest.recipe, budget, gpu=gpu.name, shapes=shapes)
    smallest = f"{math.ceil(100 * plan.total / GIB) / 100:.2f} GiB"
    rungs = ", ".join(leanest.rungs) or "no rung at all"
    unused = [name for name in ALLOW if name not in wish.allow and allowed_changes(replace(wish, allow=(name,)))[1:]]
    hint = f" Changes of the results, if allowed, may help: --allow {','.join(unused)}." if unused else ""
    text = (
        f"Nothing fits {format_size(budget)}. The smallest budget that works is {smallest} a GPU: "
        f"micro-batch {plan.batch_size} x accumulation {plan.accumulation} with {rungs}.{hint}"
    )
    return MemoryBudgetError(text, _with(leanest.recipe, memory={"budget": smallest}))


class _mapper:
    """A `map` over processes, or in this one if there is to be no other."""

    def __init__(self, workers: int):
        self._pool = ProcessPoolExecutor(workers, WORKERS, set_up_logging) if workers > 1 else None

    def __enter__(self) -> Callable:
        return self._pool.map if self._pool else map

    def __exit__(self, *error) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)
