"""The trace: real training steps of a recipe's own model under fake tensors, on a machine without a GPU.

Model, adapters, quantised layers, autocast, activation checkpointing and optimizer are those that training uses; only the
numbers in the tensors are missing. What differs on a GPU is in `cuda_rules.py`.

Letters: B batch, V views, g grid side after pooling, L text tokens, D LLaMA width, C VGGT width, T chunk length, A action
dims, S state dims.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_vla.assemble import build_config, build_on_meta
from hf_vla.lora import count_parameters
from hf_vla.memory.cuda_rules import cuda_autocast, leaving_gpus_alone, offloading, workspace_bytes
from hf_vla.memory.encode_ahead import EncodeAhead, micro_batches_at_once
from hf_vla.memory.ledger import Ledger
from hf_vla.memory.materialize import fake_tables, fill_with_fake
from hf_vla.memory.rehearsal import Rehearsal
from hf_vla.memory.shapes import Shapes
from hf_vla.memory.tracker import MemoryTracker
from hf_vla.memory.work import Work
from hf_vla.model.configuration_vla import VLAConfig
from hf_vla.model.modeling_vla import VLAForActionPrediction
from hf_vla.recipe import Recipe

Extent = Literal["step", "run", "two steps"]
"""The last micro-step and update beside warmed-up states and gradients; that, an evaluation batch and a checkpoint; or two
whole steps of up to two micro-steps each, an evaluation batch and a checkpoint."""

_Step = list[dict[str, Tensor]]
"""The micro-batches of an optimizer step."""


@dataclass(frozen=True)
class Trace:
    """What a recipe's run holds and does, at one micro-batch or, if it is of `TELLING` samples, at any."""

    ledger: Ledger
    work: Work
    parameters: dict[str, int]
    """Trained and frozen."""
    trained_bytes: int
    """Of the parameters that train."""
    weight_bytes: int
    """Of all parameters."""
    largest_unit: int
    """Bytes of the largest layer, which full sharding gathers whole."""

    def at_batch(self, batch_size: int) -> "Trace":
        """Give the trace of another micro-batch (of 2 and more exactly: torch takes short cuts for axes of length 1)."""
        return replace(self, ledger=self.ledger.at_batch(batch_size), work=self.work.at_batch(batch_size))


def trace(
    recipe: Recipe,
    shapes: Shapes,
    batch_size: int | None = None,
    extent: Extent = "run",
    workspace: Callable[..., int] = workspace_bytes,
) -> Trace:
    """Trace a recipe's training, evaluation and checkpoint writing at one micro-batch.

    Args:
        recipe: the run.
        shapes: what its data brings.
        batch_size: the micro-batch; None takes the recipe's, `TELLING` one that tells all others.
        extent: how much is gone through; the peaks of a phase are the same in each.
        workspace: what an operation's kernel takes beside its results; CUDA's by default.
    """
    config = build_config(recipe, shapes.num_views, shapes.state_dim, shapes.action_dim)
    model = build_on_meta(recipe, config)
    size = batch_size or recipe.data.batch_size
    tracker = MemoryTracker(workspace)
    with without_cycles(), leaving_gpus_alone(), fake_tables(), FakeTensorMode(), cuda_autocast(), offloading(tracker):
        rehearsal = rehearse(recipe, model, shapes, size, tracker, fill_with_fake, extent)
    ledger = tracker.ledger()
    del rehearsal  # only now: the states that it holds are those of the run's end
    return Trace(
        replace(ledger, batch_size=size),
        replace(tracker.work(), batch_size=size),
        count_parameters(model),
        sum(p.nbytes for p in model.parameters() if p.requires_grad),
        sum(p.nbytes for p in model.parameters()),
        largest_unit(model),
    )


def state_bytes(recipe: Recipe, shapes: Shapes) -> int:
    """Count the bytes of the optimizer's states, wherever they live."""
    config = build_config(recipe, shapes.num_views, shapes.state_dim, shapes.action_dim)
    model = build_on_meta(recipe, config)
    tracker = MemoryTracker()
    with leaving_gpus_alone(), fake_tables(), FakeTensorMode():
        leave_out_cached(model, recipe)
        fill_with_fake(model)
        with tracker:
            rehearsal = Rehearsal(recipe, model, tracker)
            rehearsal.warm_up()
    ledger = tracker.ledger()
    del rehearsal  # only now, with the states
    return ledger.held("optimizer") + ledger.held("host")


def rehearse(
    recipe: Recipe,
    model: VLAForActionPrediction,
    shapes: Shapes,
    batch_size: int,
    tracker: MemoryTracker,
    fill: Callable[[nn.Module], None],
    extent: Extent,
) -> Rehearsal:
    """Run training steps, an evaluation batch and a checkpoint under the tracker.

    Args:
        recipe, shapes, batch_size, extent: as `trace` takes them.
        model: the recipe's model on the meta device.
        tracker: sees it all.
        fill: replaces the model's meta tensors by fake or real ones.

    Returns:
        What ran. It holds the optimizer: let it go before the ledger is read, and the states are seen to go.
    """
    leave_out_cached(model, recipe)
    fill(model)
    eval_size = recipe.training.get("per_device_eval_batch_size", batch_size)
    with tracker:
        rehearsal = Rehearsal(recipe, model, tracker)
        fetch = partial(fetch_step, recipe, model, shapes, batch_size, tracker)
        if extent == "two steps":
            held = _train_two_steps(recipe, rehearsal, fetch)
        else:
            held = _train_a_warm_step(recipe, rehearsal, fetch, micro_batches_at_once(recipe, batch_size))
        if extent != "step":
            rehearsal.evaluate(make_batch(model.config, shapes, recipe, eval_size))
            rehearsal.save()
        del held  # only now, as Trainer does
    return rehearsal


def _train_two_steps(recipe: Recipe, rehearsal: Rehearsal, fetch: Callable[..., _Step]) -> list[_Step]:
    """Train two steps of up to two micro-steps each from the first on; returns the batches that are held after them."""
    fetch = partial(fetch, encoded=recipe.training["gradient_accumulation_steps"])
    upcoming = []
    for _ in range(2):
        batches = None  # none of the last step's are left
        batches = upcoming or fetch()
        upcoming = fetch() if recipe.memory.encode_overlap else []
        rehearsal.train_step(batches[:2])
    return [batches, upcoming]


def _train_a_warm_step(recipe: Recipe, rehearsal: Rehearsal, fetch: Callable[..., _Step], encoded: int) -> list[_Step]:
    """Train one micro-step beside warmed-up states and gradients, and update; returns the batches that are held then."""
    rehearsal.warm_up()
    overlaps = recipe.memory.encode_overlap  # then this step's pairs were encoded beside the one before
    batches = fetch(encoded=0 if overlaps else encoded)
    upcoming = fetch(encoded=encoded) if overlaps else []
    if recipe.training["gradient_accumulation_steps"] > 1:
        rehearsal.accumulate()
    rehearsal.train_step(batches[:1])
    return [batches, upcoming]


def fetch_step(
    recipe: Recipe,
    model: VLAForActionPrediction,
    shapes: Shapes,
    batch_size: int,
    tracker: MemoryTracker,
    encoded: int,
) -> list[dict[str, Tensor]]:
    """Make the micro-batches of an optimizer step, which Trainer fetches together and holds until the next step's are there.

    Args:
        recipe, model, shapes, batch_size, tracker: as `rehearse` takes them.
        encoded: where VGGT runs ahead, for how many micro-batches it is seen to run; the others have their features.
    """
    make = partial(make_batch, model.config, shapes, recipe, batch_size)
    count = recipe.training["gradient_accumulation_steps"]
    if not recipe.memory.encode_ahead:
        batches = [make() for _ in range(count)]
    else:
        with tracker.phase("encoding"):
            with tracker.host():
                batches = [make() for _ in range(count)]
            encode_last(recipe, model, shapes, batches, encoded)
    for batch in batches:
        tracker.label(batch.values(), "batch", "activations")
    return batches


def encode_last(
    recipe: Recipe, model: VLAForActionPrediction, shapes: Shapes, batches: list[dict[str, Tensor]], encoded: int
) -> None:
    """Take batches from the host to the device, all but their pixels, and run VGGT ahead for the last of them."""
    for batch in batches:
        batch |= {name: tensor.clone() for name, tensor in batch.items() if name != "pixel_values"}
    made = len(batches) - encoded
    for batch in batches[:made]:
        count = len(batch.pop("pixel_values"))
        batch["view_features"] = make_features(model.config, shapes, count, model.model.vggt.dtype)
    EncodeAhead(recipe, model.model).run(batches[made:])


def make_batch(config: VLAConfig, shapes: Shapes, recipe: Recipe, batch_size: int) -> dict[str, Tensor]:
    """Make a batch as the collator would, of zeros: pixels or cached features, ids or cached states."""
    B, V, L, size = batch_size, shapes.num_views, shapes.text_tokens, recipe.data.image_size
    dtype = torch.float32 if recipe.stored_dtype == "float32" else torch.bfloat16
    batch = {
        "state": torch.zeros(B, shapes.state_dim),
        "actions": torch.zeros(B, config.chunk_size, shapes.action_dim),
        "action_is_pad": torch.zeros(B, config.chunk_size, dtype=torch.bool),
        "attention_mask": torch.ones(B, L, dtype=torch.long),
    }
    if "vggt" in recipe.memory.cache:
        batch["view_features"] = make_features(config, shapes, B, dtype)
    else:
        kind = torch.float32 if recipe.data.center_images else torch.uint8
        batch["pixel_values"] = torch.zeros(B, V, 3, size, size, dtype=kind)
    if "lang_encoder" in recipe.memory.cache:
        batch["text_features"] = torch.zeros(B, L, config.text_config.hidden_size, dtype=dtype)
    else:
        batch["input_ids"] = torch.zeros(B, L, dtype=torch.long)
    return batch


def make_features(config: VLAConfig, shapes: Shapes, batch_size: int, dtype: torch.dtype) -> Tensor:
    """Make VGGT's pooled tokens (B, V, g², 2C), of zeros."""
    return torch.zeros(
        batch_size, shapes.num_views, config.pool_grid**2, 2 * config.vggt_config.embed_dim, dtype=dtype
    )


def leave_out_cached(model: VLAForActionPrediction, recipe: Recipe) -> None:
    """Drop the backbones whose outputs come from the cache."""
    for name in recipe.memory.cache:
        setattr(model.model, name, None)


def largest_unit(model: nn.Module) -> int:
    """Give the bytes of the largest repeated layer, or of what lies outside all of them if that is more."""
    layers = [layer for module in model.modules() if isinstance(module, nn.ModuleList) for layer in module]
    sizes = [sum(p.nbytes for p in layer.parameters()) for layer in layers]
    return max([*sizes, sum(p.nbytes for p in model.parameters()) - sum(sizes)])


@contextmanager
def without_cycles() -> Iterator[None]:
    """Hold the garbage collector still, so that two traces free everything at the same events."""
    gc.collect()
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
