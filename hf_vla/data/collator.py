"""Samples to one batch, by one call of the processor."""

from collections.abc import Callable

import numpy as np
import torch

from hf_vla.data.feature_cache import pad_texts
from hf_vla.sample import Batch, Sample


class VLACollator:
    """Make a Batch of a list of Samples, for a DataLoader's `collate_fn`.

    Args:
        processor: the policy's own `VLAProcessor`; the one that acting calls, so training sees what the policy will see.
    """

    def __init__(self, processor: Callable[..., Batch]):
        self.processor = processor

    def __call__(self, samples: list[Sample]) -> Batch:
        """Normalise, tokenise and stack the samples; where a cache has their features, those are stacked instead."""
        has_views, has_texts = (samples[0].view_features is not None, samples[0].text_features is not None)
        batch = self.processor(
            images=None if has_views else [sample.images for sample in samples],
            task=None if has_texts else [sample.task for sample in samples],
            state=np.stack([sample.state for sample in samples]),
            actions=np.stack([sample.actions for sample in samples]),
            action_is_pad=np.stack([sample.action_is_pad for sample in samples]),
            dataset=[sample.source for sample in samples] if self.processor.datasets else None,
        )
        if has_views:
            batch["view_features"] = torch.stack([sample.view_features for sample in samples])
        if has_texts:
            batch["text_features"], batch["attention_mask"] = pad_texts([sample.text_features for sample in samples])
        return batch
