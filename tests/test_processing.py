import json

import numpy as np
import pytest
import torch
from tiny_policy import SIDE, tiny_processor, tiny_stats

from hf_vla import VLAProcessor
from hf_vla.model.modeling_vggt import normalize_pixels, to_unit


def picture(seed, side=SIDE):
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def pairs(size=3, side=SIDE):
    return [[picture(2 * i, side), picture(2 * i + 1, side)] for i in range(size)]


@pytest.fixture
def means():
    return np.stack([picture(100), picture(101)])


def test_a_batch_has_the_contracts_shapes_and_types():
    batch = tiny_processor()(
        images=pairs(),
        task=["push", "close the drawer", "go"],
        state=np.zeros((3, 3)),
        actions=np.zeros((3, 5, 4)),
        action_is_pad=np.zeros((3, 5), bool),
    )
    length = batch["input_ids"].shape[1]
    expected = {
        "pixel_values": ((3, 2, 3, SIDE, SIDE), torch.uint8),
        "input_ids": ((3, length), torch.int64),
        "attention_mask": ((3, length), torch.int64),
        "state": ((3, 3), torch.float32),
        "actions": ((3, 5, 4), torch.float32),
        "action_is_pad": ((3, 5), torch.bool),
    }
    assert {k: (tuple(v.shape), v.dtype) for k, v in batch.items()} == expected


def test_pixels_are_the_pictures():
    images = pairs()
    pixels = tiny_processor()(images=images)["pixel_values"]
    assert torch.equal(pixels, torch.from_numpy(np.stack(images)).movedim(-1, 2))


def test_pictures_of_another_size_are_resized():
    pixels = tiny_processor()(images=pairs(side=64))["pixel_values"]
    assert pixels.shape == (3, 2, 3, SIDE, SIDE)


def test_padding_stands_behind_and_the_prompt_is_around_the_task():
    processor = tiny_processor(prompt="do {task} now")
    batch = processor(task=["a", "a longer one"])
    assert batch["attention_mask"][0].tolist() == sorted(batch["attention_mask"][0].tolist(), reverse=True)
    lengths = batch["attention_mask"].sum(1)
    texts = [processor.tokenizer.decode(ids[:n]) for ids, n in zip(batch["input_ids"], lengths, strict=True)]
    assert texts == ["do a now", "do a longer one now"]


def test_actions_come_back_in_physical_units():
    processor = tiny_processor()
    actions = torch.randn(2, 5, 4)
    back = processor.unnormalize_actions(processor(actions=actions)["actions"])
    assert torch.allclose(back, actions, atol=1e-5)


def test_the_mean_picture_becomes_vggts_zero(means):
    processor = tiny_processor(view_means=means, center_images=True)
    pixels = processor(images=[list(means)])["pixel_values"]
    assert normalize_pixels(pixels).abs().max() < 1e-5
    other = processor(images=pairs(1))["pixel_values"]
    plain = tiny_processor()(images=[*pairs(1), list(means)])["pixel_values"]
    assert torch.allclose(other - pixels, to_unit(plain[:1]) - to_unit(plain[1:]), atol=1e-6)


def test_the_blind_control_sees_only_the_mean_picture(means):
    processor = tiny_processor(view_means=means, pictures="mean")
    pixels = processor(images=pairs())["pixel_values"]
    assert torch.equal(pixels, tiny_processor()(images=[list(means)] * 3)["pixel_values"])


@pytest.mark.parametrize("centered", [False, True])
def test_save_and_load_give_the_same_batch(tmp_path, means, centered):
    processor = tiny_processor(view_means=means, center_images=centered, normalization="mean_std", prompt="{task}!")
    processor.save_pretrained(tmp_path)
    loaded = VLAProcessor.from_pretrained(tmp_path)
    inputs = {"images": pairs(), "task": ["a", "bb", "c"], "state": np.ones((3, 3)), "actions": np.ones((3, 5, 4))}
    first, second = processor(**inputs), loaded(**inputs)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert loaded.views == ["front", "wrist"]
    assert np.array_equal(loaded.view_means, means)


def test_the_saved_config_is_small_and_readable(tmp_path, means):
    tiny_processor(view_means=means).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert saved["stats"]["action"]["q99"] == pytest.approx(tiny_stats()["action"]["q99"])
    assert "view_means" not in saved
    assert (tmp_path / "view_means.png").is_file()


def test_loading_without_statistics_says_what_to_do(tmp_path):
    tiny_processor().tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no processor with statistics.*save_pretrained"):
        VLAProcessor.from_pretrained(tmp_path)


def test_making_one_without_statistics_says_what_to_do():
    with pytest.raises(ValueError, match=r"statistics of observation.state and action.*stats.json"):
        tiny_processor(stats=None)


def test_mismatches_name_both_sizes(means):
    processor = tiny_processor()
    with pytest.raises(ValueError, match=r"Expected 2 views \(front, wrist\), got 1"):
        processor(images=[[picture(0)]])
    with pytest.raises(ValueError, match=r"observation.state has 7 dimensions.*of 3"):
        processor(state=np.zeros((1, 7)))
    with pytest.raises(ValueError, match=r"action has 2 dimensions.*of 4"):
        processor(actions=np.zeros((1, 5, 2)))
    with pytest.raises(ValueError, match="2 views, but 1 mean pictures"):
        tiny_processor(view_means=means[:1])
    with pytest.raises(ValueError, match="need the mean picture of each view"):
        tiny_processor(center_images=True)
    with pytest.raises(ValueError, match="Unknown pictures 'blind'"):
        tiny_processor(pictures="blind")
    with pytest.raises(ValueError, match="uint8"):
        processor(images=[[np.zeros((SIDE, SIDE, 3))] * 2])


def test_missing_quantiles_are_found_at_once():
    stats = tiny_stats()
    del stats["action"]["q01"]
    with pytest.raises(ValueError, match="no q01 and q99"):
        tiny_processor(stats=stats)
