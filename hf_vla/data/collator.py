"""Samples to one batch, by one call of the processor."""

from collections.abc import Callable

import numpy as np

from hf_vla.sample import Batch, Sample


class VLACollator:
    """Make a Batch of a list of Samples, for a DataLoader's `collate_fn`.

    Args:
        processor: the policy's own `VLAProcessor`; the one that acting calls, so training sees what the policy will see.
    """

    def __init__(self, processor: Callable[..., Batch]):
        self.processor = processor

    def __call__(self, samples: list[Sample]) -> Batch:
        """Normalise, tokenise and stack the samples."""
        return self.processor(
            images=[sample.images for sample in samples],
            task=[sample.task for sample in samples],
            state=np.stack([sample.state for sample in samples]),
            actions=np.stack([sample.actions for sample in samples]),
            action_is_pad=np.stack([sample.action_is_pad for sample in samples]),
        )
