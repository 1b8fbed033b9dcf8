"""Data that can't be learned from: an error that names file and episode, or left out and counted; never a silent drop."""

import re
from pathlib import Path

import numpy as np
import pytest
from lerobot_faults import break_actions, break_parquet, break_tasks, middle, remove_parquet, slow_down
from lerobot_folders import write_v2, write_v3

from hf_vla.data.loader import SKIPPED, RankBatches, build_loader
from hf_vla.data.mixture import build_datasets, order_of
from hf_vla.data.streaming import StreamedDataset, open_stream
from hf_vla.evaluation import evaluate_offline
from hf_vla.policy import Policy
from hf_vla.recipe import make_recipe
from hf_vla.rollout.baselines import BASELINES
from hf_vla.run import read_info
from hf_vla.train import train
from tests.tiny_run import tiny_recipe

LENGTHS = (5, 7, 3, 6, 8, 4)
LOST = {write_v2: (3,), write_v3: (2, 3)}
"""Episodes of the file in the middle."""
WRITERS = pytest.mark.parametrize("write", LOST, ids=["v2.1", "v3.0"])
FAULTS = {
    break_parquet: "can't be read",
    remove_parquet: "missing",
    break_actions: "action of episode {} has values that aren't finite",
    break_tasks: "episode {}, frame 0 has task_index 7",
    slow_down: "episode {} has 5 frames a second",
}


def data_of(*roots: Path, **keys) -> dict:
    source = {"mixture": [{"dataset": str(root)} for root in roots]} if len(roots) > 1 else {"dataset": str(roots[0])}
    return {**source, "batch_size": 4, "eval_fraction": 0.0, **keys}


def read(data: dict) -> tuple[list[tuple[str, int, int]], list[str], tuple[str, ...]]:
    """Read an epoch: where each sample that counts is from, what was skipped, and which episodes weren't opened at all."""
    samples, _ = build_datasets(make_recipe({"data": data}).data, 4, 0)

    def collate(batch):
        return {"at": [(s.source, s.episode_index, s.frame_index) for s in batch if not s.action_is_pad.all()]}

    loader = build_loader(
        samples, RankBatches(order_of(samples, 0), 4), collate, on_error=data.get("on_error", "raise")
    )
    batches = list(loader)
    skipped = [text for batch in batches for text in batch[SKIPPED]]
    return [place for batch in batches for place in batch["at"]], skipped, samples.info.left_out


def frames_of(name: str, episodes) -> list[tuple[str, int, int]]:
    return [(name, episode, frame) for episode in episodes for frame in range(LENGTHS[episode])]


@WRITERS
@pytest.mark.parametrize("streaming", [False, True], ids=["map", "streamed"])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_is_an_error_that_names_its_place_or_costs_just_its_episodes(tmp_path, fault, streaming, write):
    root = write(tmp_path / "doors", lengths=LENGTHS)
    file, lost = middle(root), LOST[write]
    fault(root)
    said = f"{re.escape(str(file))}.*{FAULTS[fault].format('[23]')}"
    with pytest.raises(ValueError, match=said) as error:
        read(data_of(root, streaming=streaming))
    assert re.search(f"episode {lost[0]}|episode {lost[-1]}", str(error.value))
    seen, skipped, left_out = read(data_of(root, streaming=streaming, on_error="skip"))
    assert sorted(seen) == frames_of("doors", [e for e in range(len(LENGTHS)) if e not in lost])
    if streaming and fault is not remove_parquet:
        assert len(skipped) == len(frames_of("doors", lost))
        assert left_out == ()
    else:
        assert skipped == []
        assert len(left_out) == len(lost)
    assert all(str(file) in text for text in (*skipped, *left_out))


def test_the_end_of_a_dataset_may_be_missing_and_that_is_said(tmp_path, caplog):
    root = write_v3(tmp_path / "doors", lengths=LENGTHS)
    sorted((root / "data").rglob("*.parquet"))[-1].unlink()
    seen, _, left_out = read(data_of(root))
    assert sorted(seen) == frames_of("doors", range(4))
    assert left_out == ()
    assert "4 of the 6 episodes in meta/ are on disk" in caplog.text


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "streamed"])
def test_the_first_file_may_be_the_broken_one(tmp_path, streaming):
    root = write_v3(tmp_path / "doors", lengths=LENGTHS)
    first = min((root / "data").rglob("*.parquet"))
    first.write_bytes(first.read_bytes()[:-100])
    seen, skipped, left_out = read(data_of(root, streaming=streaming, on_error="skip"))
    assert sorted(seen) == frames_of("doors", range(2, 6))
    assert (len(skipped), len(left_out)) == ((12, 0) if streaming else (0, 2))


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "streamed"])
def test_a_dataset_with_nothing_to_learn_from_is_an_error_also_where_faults_are_skipped(tmp_path, streaming):
    root = write_v3(tmp_path / "doors", lengths=(5, 7))
    break_parquet(root)
    with pytest.raises(ValueError, match=r"none of its 2 episodes can be read"):
        read(data_of(root, streaming=streaming, on_error="skip"))
    root = write_v3(tmp_path / "nan", lengths=(5, 7))
    break_actions(root)
    with pytest.raises(ValueError, match=r"broken as a whole" if streaming else r"wrong with each of its 2 episodes"):
        read(data_of(root, streaming=streaming, on_error="skip"))


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "streamed"])
def test_a_mixture_loses_the_episodes_of_each_of_its_datasets(tmp_path, streaming):
    doors, drawers, lids = (write_v3(tmp_path / name, lengths=LENGTHS) for name in ("doors", "drawers", "lids"))
    remove_parquet(doors)
    break_actions(drawers)
    data = data_of(doors, drawers, lids, streaming=streaming, on_error="skip")
    seen, skipped, left_out = read(data)
    sound = [e for e in range(len(LENGTHS)) if e not in LOST[write_v3]]
    whole = frames_of("lids", range(len(LENGTHS)))
    assert sorted(seen) == sorted([*frames_of("doors", sound), *frames_of("drawers", sound), *whole])
    assert (len(skipped), len(left_out)) == ((9, 2) if streaming else (0, 4))


def test_what_a_run_left_out_stands_in_its_file(tmp_path, caplog):
    root = write_v3(tmp_path / "doors", lengths=LENGTHS)
    file = middle(root)
    break_parquet(root)
    with pytest.raises(ValueError, match=r"It holds episode 2\..*2 of 6 episodes would be left out"):
        train(tiny_recipe(data=data_of(root)), tmp_path / "raised")
    run = train(tiny_recipe(data=data_of(root, on_error="skip", eval_fraction=0.3)), tmp_path / "skipped")
    left_out = read_info(run)["left_out"]
    assert left_out["episodes"] == 2
    assert [text.startswith(f"{file}: can't be read") for text in left_out["first"]] == [True, True]
    assert "2 episodes are left out" in caplog.text


@WRITERS
@pytest.mark.parametrize("fault", [break_parquet, break_actions, break_tasks], ids=lambda fault: fault.__name__)
def test_all_numbers_of_a_streamed_set_are_those_of_one_read_whole(tmp_path, fault, write, caplog):
    roots = [write(tmp_path / name, lengths=LENGTHS) for name in ("doors", "lids")]
    fault(roots[0])
    with pytest.raises(ValueError, match=re.escape(str(middle(roots[0])))):
        build_datasets(make_recipe({"data": data_of(*roots, streaming=True)}).data, 4, 0)[0].numbers()
    whole, streamed = (
        build_datasets(make_recipe({"data": data_of(*roots, streaming=streaming, on_error="skip")}).data, 4, 0)[0]
        for streaming in (False, True)
    )
    numbers = streamed.numbers()
    assert len(numbers) == len(whole) < len(streamed)
    assert np.array_equal(numbers.states, whole.states) and np.array_equal(numbers.actions, whole.actions)
    assert (numbers.tasks, numbers.sources) == (whole.tasks, whole.sources)
    for a, b in zip(numbers.windows(range(len(whole))), whole.windows(range(len(whole))), strict=True):
        assert np.array_equal(a, b)
    assert len(numbers.info.left_out) == len(LOST[write])
    assert f"doors: {len(LOST[write])} episodes' numbers are left out, the first: {middle(roots[0])}" in caplog.text


def test_episodes_none_of_which_can_be_read_have_no_numbers(tmp_path):
    root = write_v3(tmp_path / "doors", lengths=LENGTHS)
    break_parquet(root)
    samples = StreamedDataset(open_stream(root, on_error="skip"), [], 4, episodes=LOST[write_v3])
    with pytest.raises(ValueError, match=r"doors: none of 2 episodes can be read, the first: .*file-001\.parquet"):
        samples.numbers()


@pytest.mark.parametrize("fault", [break_parquet, break_actions], ids=lambda fault: fault.__name__)
def test_bins_and_baselines_of_a_streamed_set_know_nothing_of_its_broken_episodes(tmp_path, fault):
    root = write_v3(tmp_path / "doors", lengths=LENGTHS)
    fault(root)
    data = data_of(root, streaming=True, on_error="skip", eval_fraction=0.3)
    recipe = tiny_recipe(model={"head": {"type": "discrete", "num_bins": 8}}, data=data)
    run = train(recipe, tmp_path / "run")
    trained, held_out = build_datasets(recipe.data, recipe.model.chunk_size, recipe.training["seed"])
    lost = {episode.index for episode in trained.episodes} & set(LOST[write_v3])
    assert lost, "the split leaves a broken episode to train on"
    policy = Policy.from_pretrained(run / "model")
    sound = policy.processor(actions=trained.numbers().actions)["actions"]
    assert set(policy.model.head.levels.flatten().tolist()) <= set(sound.flatten().tolist())
    report = evaluate_offline(run)
    assert report["train_left_out"] == len(lost)
    unread = [episode for episode in held_out.episodes if episode.index in LOST[write_v3]]
    assert report["left_out"] == sum(episode.length for episode in unread)
    assert np.isfinite([report[name]["mean_mae"] for name in ("policy", *BASELINES)]).all()
