"""The frozen VGGT ahead of an optimizer step: the pairs of all its micro-batches, as many at once as a recipe says.

A micro-batch is as large as LLaMA's activations allow, down to a single sample. VGGT, of which nothing is kept for a
backward, would rather have many pairs at once, or in a tight budget few. Pixels wait on the host until then, and only
features, a twelfth of their bytes at full size, are held for the step: a step that is run again doesn't run VGGT again.

Letters: n pairs at once, V views, H W pixels, g grid side after pooling, C VGGT width (features have 2C).
"""

import math
from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor

from hf_vla.caching.build import encode_views
from hf_vla.memory.microbatch import Tell
from hf_vla.memory.out_of_memory import Attempt, free_cache
from hf_vla.memory.pieces import Batch
from hf_vla.model.modeling_vla import VLAModel
from hf_vla.recipe import Recipe


class EncodeAhead:
    """Puts view features in the place of the pixels of an optimizer step's micro-batches.

    Out of memory, it goes on with half as many pairs at once, to the end of the run. If not even one fits, pixels stay, and
    each micro-step encodes its own, as it would have: what doesn't fit there is `microbatch.py`'s to recover.

    Args:
        recipe: the run; says how many pairs at once, and in which precision.
        model: its model, VGGT frozen.
        tell: told of everything that changes.
    """

    def __init__(self, recipe: Recipe, model: VLAModel, tell: Tell = lambda kind, text: None):
        self.asked = self.pairs = min(recipe.memory.encode_ahead, pairs_of_a_step(recipe))
        self._encode, self._vggt, self._tell = partial(encode_views, recipe, model), model.vggt, tell

    def run(self, batches: Iterable[Batch]) -> None:
        """Replace `pixel_values` (B, V, 3, H, W) of each batch by `view_features` (B, V, g², 2C), in place."""
        while self.pairs and not self.attempt(batches):
            self._shrink(min(self.pairs, len(_pixels_of(batches))))

    def attempt(self, batches: Iterable[Batch]) -> bool:
        """Do so for all batches that have pixels, or, if memory runs out, for none and say False."""
        waiting = [batch for batch in batches if "pixel_values" in batch]
        with Attempt() as attempt:
            features = self._encode_all(waiting)
        if attempt.failed:
            return False
        for batch, view_features in zip(waiting, features, strict=True):
            del batch["pixel_values"]
            batch["view_features"] = view_features
        return True

    def restrict(self, pairs: int) -> None:
        """Take what an earlier part of the run found to fit."""
        self.pairs = min(self.pairs, pairs)

    def _encode_all(self, batches: list[Batch]) -> list[Tensor]:
        """Encode the pairs of batches, `pairs` of them at once."""
        pixels, features = _pixels_of(batches), []
        for start in range(0, len(pixels), self.pairs):
            features += self._encode(self._on_device(pixels[start : start + self.pairs]))
        return [torch.stack([features.pop(0) for _ in batch["pixel_values"]]) for batch in batches]

    def _on_device(self, pixels: list[Tensor]) -> Tensor:
        """Bring pairs to VGGT's device, one beside the other: each is copied once, pinned ones without waiting."""
        there = torch.empty(len(pixels), *pixels[0].shape, dtype=pixels[0].dtype, device=self._vggt.device)
        for place, pair in zip(there, pixels, strict=True):
            place.copy_(pair, non_blocking=True)
        return there

    def _shrink(self, tried: int) -> None:
        free_cache()
        self.pairs = tried // 2
        now = f"encoding {self.pairs} at once" if self.pairs else "each micro-step encodes its own"
        self._tell("out_of_memory", f"VGGT can't encode {tried} pairs at once ahead of a step: from now on {now}.")


def _pixels_of(batches: Iterable[Batch]) -> list[Tensor]:
    """List the pairs (V, 3, H, W) that are still to be encoded."""
    return [pair for batch in batches for pair in batch.get("pixel_values", ())]


def pairs_of_a_step(recipe: Recipe) -> int:
    """Count the pairs of an optimizer step on one GPU."""
    return recipe.data.batch_size * recipe.training["gradient_accumulation_steps"]


def micro_batches_at_once(recipe: Recipe, batch_size: int) -> int:
    """Count the micro-batches that lie in one pass through VGGT, wholly or in part; a trace needs no more of them."""
    wanted = math.ceil(recipe.memory.encode_ahead / batch_size)
    return max(1, min(wanted, recipe.training["gradient_accumulation_steps"]))
