"""Does a shuffled stream go on where it stopped: that of `datasets`, ours, and ours as an IterableDataset of `datasets`?

    OMP_NUM_THREADS=1 python -m benchmarks.streaming_resume

All go through one dataset of many parquet files, sample by sample in this process: `datasets` by `streaming=True`,
`shuffle` and the state that its documentation has one keep; ours by the loader of training with `data.streaming`, and by
`iterable_dataset` with the state that `datasets` keeps. Each is stopped after k samples, its state goes through JSON, and
what is opened anew goes on from it to the epoch's end. The clock runs from before anything is opened until the first sample
is there.
"""

import argparse
import functools
import json
import shutil
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import load_dataset

from benchmarks.result import RESULTS, write_result
from hf_vla.data.iterable import iterable_dataset
from hf_vla.data.lerobot_merge import merge_datasets
from hf_vla.data.loader import RankBatches, build_loader
from hf_vla.data.mixture import CameraView, order_of
from hf_vla.data.order import Lanes
from hf_vla.data.streaming import StreamedDataset, open_stream
from hf_vla.sample import Sample

SAMPLE = Path(__file__).parent.parent / "tests/data/metaworld_sample"
SEED, REPEATS = 0, 5
BUFFER = 1000
"""Samples that `datasets` shuffles together, as many as by itself."""
SHARES = (0.0, 0.1, 0.5, 0.9)
"""Of the epoch, after which it is stopped; 0 is a beginning."""

Place = tuple[int, int]
"""Episode and frame of a sample."""
Stream = Iterator[tuple[Place, Callable[[], Any]]]
"""Samples, and what gives the state behind each."""


def main() -> None:
    """Write the dataset, stop and go on with both, and write what was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=40, help="how often the dataset holds the committed sample")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the result is written")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = write_dataset(Path(name), options.times)
        streams = {"datasets": stream_of_datasets, "ours": our_stream, "ours_as_iterable": our_iterable}
        ways = {way: try_stops(functools.partial(stream, root)) for way, stream in streams.items()}
        facts = {"files": len(files(root)), **json.loads((root / "meta/info.json").read_text())}
    dataset = {name: facts[name] for name in ("total_episodes", "total_frames", "files")}
    print(json.dumps(ways, indent=2))
    result = {"dataset": dataset, "seed": SEED, "buffer_size": BUFFER, "repeats": REPEATS, "ways": ways}
    print(f"Written: {write_result('streaming_resume', result, options.results)}")


def write_dataset(folder: Path, times: int) -> Path:
    """Put the committed sample behind itself, in files of about a megabyte."""
    part = shutil.copytree(SAMPLE, folder / "part")
    info = json.loads((part / "meta/info.json").read_text())
    (part / "meta/info.json").write_text(json.dumps(info | {"data_files_size_in_mb": 1}))
    return merge_datasets([part] * times, folder / "whole")


def files(root: Path) -> list[str]:
    """Name the parquet files of the rows."""
    return sorted(map(str, (root / "data").rglob("*.parquet")))


def stream_of_datasets(root: Path, state: Any = None) -> Stream:
    """Go through the shuffled stream of `datasets`, from a state of it on."""
    stream = load_dataset("parquet", data_files=files(root), split="train", streaming=True)
    stream = stream.shuffle(seed=SEED, buffer_size=BUFFER)
    if state is not None:
        stream.load_state_dict(state)
    for row in stream:
        yield (row["episode_index"], row["frame_index"]), stream.state_dict


def our_stream(root: Path, state: Any = None) -> Stream:
    """Go through our streamed loader, from a position in it on, as training does."""
    info = open_stream(root)
    data = StreamedDataset(info, [CameraView(camera) for camera in info.cameras], chunk_size=16)
    batches = RankBatches(order_of(data, SEED), batch_size=1)
    position, lanes = state or (0, batches.own_lanes)
    batches.seek(0, position, Lanes(*lanes))
    for done, batch in enumerate(build_loader(data, batches, collate), position + 1):
        yield batch["place"], lambda done=done: (done, lanes)


def our_iterable(root: Path, state: Any = None) -> Stream:
    """Go through our stream as `datasets` has streams, from a state of it on."""
    info = open_stream(root)
    data = StreamedDataset(info, [CameraView(camera) for camera in info.cameras], chunk_size=16)
    stream = iterable_dataset(data, order_of(data, SEED))
    if state is not None:
        stream.load_state_dict(state)
    for row in stream:
        yield (row["episode_index"], row["frame_index"]), stream.state_dict


def collate(samples: list[Sample]) -> dict[str, Place]:
    """Say where the one sample of a batch is from."""
    [sample] = samples
    return {"place": (sample.episode_index, sample.frame_index)}


def try_stops(stream: Callable[..., Stream]) -> list[dict[str, Any]]:
    """Stop an epoch at each place, and compare it with one that nothing stopped."""
    undisturbed = [place for place, _ in stream()]
    assert len(set(undisturbed)) == len(undisturbed)
    return [stop_at(round(share * len(undisturbed)), undisturbed, stream) for share in SHARES]


def stop_at(k: int, undisturbed: list[Place], stream: Callable[..., Stream]) -> dict[str, Any]:
    """Take k samples, go on in what is opened anew, and count what the epoch lacks and has twice."""
    running = stream()
    before = list(islice(running, k))
    state = json.loads(json.dumps(before[-1][1]())) if before else None
    epoch = [place for place, _ in before] + [place for place, _ in stream(state)]
    times_seen = Counter(epoch)
    return {
        "stopped_after": k,
        "lost": sum(place not in times_seen for place in undisturbed),
        "seen_twice": sum(count > 1 for count in times_seen.values()),
        "same_order": epoch == undisturbed,
        "seconds_to_first": median_seconds(stream, state) if len(epoch) > k else None,
    }


def median_seconds(stream: Callable[..., Stream], state: Any) -> float:
    """Time until the first sample, some times over."""
    seconds = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        running = stream(state)
        next(running)
        seconds.append(time.perf_counter() - begin)
        running.close()  # behind the clock: `datasets` takes seconds to end its threads
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
