"""The frozen VGGT ahead of an optimizer step: the pairs of all its micro-batches, as many at once as a recipe says.

A micro-batch is as large as LLaMA's activations allow, down to a single sample. VGGT, of which nothing is kept for a
backward, would rather have many pairs at once, or in a tight budget few. Pixels wait on the host until then, and only
features, a twelfth of their bytes at full size, are held for the step: a step that is run again doesn't run VGGT again.

Letters: n pairs at once, V views, H W pixels, g grid side after pooling, C VGGT width (features have 2C).
"""

import math
from functools import partial

import torch
from torch import Tensor

from hf_vla.caching.build import encode_views
from hf_vla.memory.microbatch import Tell, free_cache
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

    def run(self, batches: list[Batch]) -> None:
        """Replace `pixel_values` (B, V, 3, H, W) of each batch by `view_features` (B, V, g², 2C), in place."""
        features = self._encode_all([pair for batch in batches for pair in batch["pixel_values"]])
        for batch in batches if features else []:
            count = len(batch.pop("pixel_values"))
            batch["view_features"] = torch.stack(features[:count])
            del features[:count]

    def restrict(self, pairs: int) -> None:
        """Take what an earlier part of the run found to fit."""
        self.pairs = min(self.pairs, pairs)

    def _encode_all(self, pixels: list[Tensor]) -> list[Tensor]:
        """Encode pairs (V, 3, H, W), each to (V, g², 2C); none if not even one fits."""
        features = []
        while self.pairs and len(features) < len(pixels):
            features += self._attempt(pixels[len(features) : len(features) + self.pairs])
        return features if self.pairs else []

    def _attempt(self, pixels: list[Tensor]) -> list[Tensor]:
        """Encode pairs at once; none of them, and fewer from now on, if memory runs out.

        The handler is left before anything is freed: a traceback keeps the failed attempt's tensors alive.
        """
        try:
            return list(self._encode(self._on_device(pixels)))
        except torch.OutOfMemoryError:
            pass
        self._shrink(len(pixels))
        return []

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


def pairs_of_a_step(recipe: Recipe) -> int:
    """Count the pairs of an optimizer step on one GPU."""
    return recipe.data.batch_size * recipe.training["gradient_accumulation_steps"]


def micro_batches_at_once(recipe: Recipe, batch_size: int) -> int:
    """Count the micro-batches that lie in one pass through VGGT, wholly or in part; a trace needs no more of them."""
    wanted = math.ceil(recipe.memory.encode_ahead / batch_size)
    return max(1, min(wanted, recipe.training["gradient_accumulation_steps"]))
