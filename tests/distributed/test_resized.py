"""A run goes on in another number of real processes: what its epoch still had to be seen is seen once, and that is said."""

import json
from pathlib import Path

import pytest
from lerobot_folders import write_v3

from hf_vla.run import read_info
from tests.distributed.launch import torchrun
from tests.distributed.train_resized import recipe_of, train_part

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

LENGTHS = (5, 7, 3, 6, 8, 4)
DUE = [(epoch, episode, frame) for epoch in (0, 1) for episode, n in enumerate(LENGTHS) for frame in range(n)]
STYLES = pytest.mark.parametrize("streaming", [False, True], ids=["map", "streamed"])


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return write_v3(tmp_path_factory.mktemp("data") / "doors", lengths=LENGTHS)


@pytest.fixture(scope="module")
def parts(tmp_path_factory, dataset) -> dict:
    """What each part of each run saw: two processes begin a run and one goes on, and the other way round."""
    folder, parts = tmp_path_factory.mktemp("resized"), {}
    for streaming in (False, True):
        directory = folder / f"to-two-{streaming}"
        parts[directory.name] = [train_part(recipe_of(dataset, 1, streaming), directory, begins=True)]
    code, output = torchrun(Path(__file__).with_name("train_resized.py"), folder, dataset)
    assert code == 0, output[-4000:]
    for streaming in (False, True):
        directory = folder / f"to-two-{streaming}"
        parts[directory.name].append(seen_by_two(directory))
        directory = folder / f"from-two-{streaming}"
        alone = train_part(recipe_of(dataset, 1, streaming), directory, begins=False)
        parts[directory.name] = [seen_by_two(directory), alone]
    return {"folder": folder, **parts}


def seen_by_two(directory: Path) -> list[tuple[int, int, int]]:
    by_rank = [json.loads((directory / f"two-{rank}.json").read_text()) for rank in (0, 1)]
    return [tuple(place) for seen in by_rank for place in seen]


@STYLES
@pytest.mark.parametrize("change", ["from-two", "to-two"])
def test_every_sample_of_each_epoch_is_seen_once_over_both_parts(parts, change, streaming):
    before, after = parts[f"{change}-{streaming}"]
    assert len(before) == 12
    assert sorted([*before, *after]) == DUE


@STYLES
@pytest.mark.parametrize("change", ["from-two", "to-two"])
def test_that_the_order_differs_is_said(parts, change, streaming):
    events = read_info(parts["folder"] / f"{change}-{streaming}")["events"]
    (text,) = [event["text"] for event in events if event["kind"] == "resumed_differently"]
    ours, theirs = ("2 processes", "1 processes")[:: 1 if change == "from-two" else -1]
    assert text.index(ours) < text.index(theirs) < text.index("order differs")
