"""What our own loader does, in a process of its own: the counterpart of in_lerobot.py. It ends with a line of JSON.

python -m benchmarks.our_loader DATASET '{"chunk": 16, "past": 0, "batch_size": 16, "workers": 2, "threads": 1, …}'
"""

import json
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from hf_vla.data.lerobot_format import open_dataset
from hf_vla.data.loader import RankBatches, build_loader
from hf_vla.data.mixture import order_of
from hf_vla.data.streaming import StreamedDataset, open_stream
from hf_vla.data.windows import WindowDataset
from hf_vla.recipe import View
from hf_vla.sample import Sample

PREFETCH = 2
"""Batches that each worker reads ahead, as many as torch's DataLoader by itself."""


class Batch(NamedTuple):
    """Samples as they were read: no processor, as LeRobot's batches have none."""

    images: torch.Tensor
    """(B, V, H, W, 3) uint8."""
    state: torch.Tensor
    actions: torch.Tensor
    action_is_pad: torch.Tensor


def stack(samples: list[Sample]) -> dict[str, Batch]:
    """Stack a batch, in place of the collator."""
    columns = [np.stack([sample.images for sample in samples])]
    columns += [np.stack([getattr(sample, name) for sample in samples]) for name in Batch._fields[1:]]
    return {"batch": Batch(*map(torch.from_numpy, columns))}


def open_data(dataset: str, given: dict) -> WindowDataset | StreamedDataset:
    """Open a dataset map-style or streamed, its views as LeRobot is given them."""
    info = open_stream(dataset) if given["streaming"] else open_dataset(dataset)
    offsets = [-given["past"], 0] if given["past"] else [0]
    views = [View(camera, offset) for camera in info.cameras for offset in offsets]
    kind = StreamedDataset if given["streaming"] else WindowDataset
    return kind(info, views, given["chunk"])


def batches(data: WindowDataset | StreamedDataset, given: dict) -> Iterator[Batch]:
    """Go through the loader that training builds, epoch after epoch."""
    order = RankBatches(order_of(data, seed=0), given["batch_size"], workers=given["workers"])
    ahead = {"prefetch_factor": PREFETCH} if given["workers"] else {}
    loader = build_loader(data, order, stack, given["workers"], **ahead)
    epoch = 0
    while True:
        loader.set_epoch(epoch)
        yield from (batch["batch"] for batch in loader)
        epoch += 1


def speed(dataset: str, settings: str) -> dict[str, float]:
    """Count samples per second, once the loader is warm."""
    given = json.loads(settings)
    torch.set_num_threads(given["threads"])
    warm_up = time.perf_counter() + given["warm_up"]
    samples, start = 0, None
    for batch in batches(open_data(dataset, given), given):
        now = time.perf_counter()
        if start is not None:
            samples += len(batch.state)
            if now - start >= given["seconds"]:
                return {"samples_per_second": samples / (now - start)}
        elif now >= warm_up:
            start = now
    raise AssertionError("the loader ended")


if __name__ == "__main__":
    print(json.dumps(speed(*sys.argv[1:])))
