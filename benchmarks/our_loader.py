"""What our own loader does, in a process of its own, as in_lerobot.py does what LeRobot's does.

python -m benchmarks.our_loader DATASET '{"chunk": 16, …}'   reads some of it
python -m benchmarks.our_loader                            each line asked: [DATASET, {"chunk": 16, "past": 0, …}]
"""

import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch.utils.data import default_collate

from benchmarks.throughput import measure, serve
from hf_vla.data.lerobot_format import open_dataset
from hf_vla.data.loader import RankBatches, build_loader
from hf_vla.data.mixture import order_of
from hf_vla.data.streaming import StreamedDataset, open_stream
from hf_vla.data.windows import WindowDataset
from hf_vla.recipe import View
from hf_vla.sample import Sample

COLUMNS = ("state", "actions", "action_is_pad", "task")
PREFETCH = 2
"""Batches that each worker reads ahead, as many as torch's DataLoader by itself."""


def stack(samples: list[Sample]) -> dict[str, torch.Tensor]:
    """Stack a batch as torch does by itself, in place of the collator: pictures (B, V, H, W, 3) uint8."""
    rows = [
        {name: getattr(sample, name) for name in COLUMNS} | {"images": np.stack(sample.images)} for sample in samples
    ]
    return default_collate(rows)


def open_data(dataset: str, given: dict) -> WindowDataset | StreamedDataset:
    """Open a dataset map-style or streamed, its views as LeRobot is given them."""
    info = open_stream(dataset) if given["streaming"] else open_dataset(dataset)
    info = replace(info, video_backend=given.get("video_backend", info.video_backend))
    offsets = [-given["past"], 0] if given["past"] else [0]
    views = [View(camera, offset) for camera in info.cameras for offset in offsets]
    kind = StreamedDataset if given["streaming"] else WindowDataset
    return kind(info, views, given["chunk"])


def batches(data: WindowDataset | StreamedDataset, given: dict) -> Iterator[dict[str, torch.Tensor]]:
    """Go through the loader that training builds, epoch after epoch."""
    order = RankBatches(order_of(data, seed=0), given["batch_size"], workers=given["workers"])
    ahead = {"prefetch_factor": PREFETCH} if given["workers"] else {}
    loader = build_loader(data, order, stack, given["workers"], **ahead)
    for epoch in itertools.count():
        loader.set_epoch(epoch)
        yield from loader


def speed(dataset: str, given: dict) -> dict[str, float]:
    """Measure the speed of our loader, in the order of training."""
    torch.set_num_threads(given["threads"])
    sizes = (len(batch["state"]) for batch in batches(open_data(dataset, given), given))
    return measure(sizes, given["warm_up"], given["seconds"])


def read_some(dataset: str, settings: str) -> None:
    """Read so many samples of a dataset."""
    given = json.loads(settings)
    torch.set_num_threads(given["threads"])
    seen = 0
    for batch in batches(open_data(dataset, given), given):
        seen += len(batch["state"])
        if seen >= given["samples"]:
            break


if __name__ == "__main__":
    read_some(*sys.argv[1:]) if sys.argv[1:] else serve(speed)
