"""Varied pictures: alike in both views, a function of seed, epoch and index, and honest about geometry."""

import dataclasses

import numpy as np
import pytest
from torch.utils.data import Dataset

from hf_vla.data.augmentation import AugmentedDataset, draw_variation, vary
from hf_vla.prepare import build_trainer
from hf_vla.recipe import Augmentation, RecipeError
from hf_vla.sample import Draw, Sample
from tests.tiny_run import tiny_recipe

ALL = Augmentation(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.05, blur=0.02, crop=0.1)


class Noise(Dataset):
    """Samples whose two views show the same picture."""

    def __len__(self):
        return 5

    def __getitem__(self, i):
        picture = np.random.default_rng(i).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        picture.flags.writeable = False  # as a cache of pictures gives them
        zeros = np.zeros(2, np.float32)
        return Sample([picture, picture], zeros, zeros[None], np.zeros(1, bool), "do", 0, i, "noise")


def test_a_sample_is_a_function_of_seed_epoch_and_index():
    dataset, again, other = (
        AugmentedDataset(Noise(), ALL, 1),
        AugmentedDataset(Noise(), ALL, 1),
        AugmentedDataset(Noise(), ALL, 2),
    )
    assert dataset.wants_epoch and len(dataset) == 5
    first = dataset[Draw(3, 7)].images[0]
    _ = dataset[Draw(0, 0)]
    assert np.array_equal(dataset[Draw(3, 7)].images[0], first) and np.array_equal(again[Draw(3, 7)].images[0], first)
    assert not np.array_equal(dataset[Draw(3, 8)].images[0], first)
    assert not np.array_equal(other[Draw(3, 7)].images[0], first)
    assert np.array_equal(dataset[3].images[0], dataset[Draw(3, 0)].images[0])


def test_views_are_varied_alike_and_nothing_else_is():
    plain, varied = Noise()[2], AugmentedDataset(Noise(), ALL, 0)[Draw(2, 1)]
    assert np.array_equal(varied.images[0], varied.images[1])
    assert varied.images[0].shape == plain.images[0].shape and varied.images[0].dtype == np.uint8
    assert not np.array_equal(varied.images[0], plain.images[0])
    assert varied._replace(images=None).frame_index == plain.frame_index and np.array_equal(varied.state, plain.state)


@pytest.mark.parametrize("part", [field.name for field in dataclasses.fields(Augmentation)])
def test_each_part_alone_changes_the_picture_and_none_leaves_it(part):
    picture = Noise()[0].images[0]
    generators = [np.random.default_rng(0) for _ in range(2)]
    assert np.array_equal(vary(picture, draw_variation(Augmentation(), generators[0])), picture)
    assert not np.array_equal(vary(picture, draw_variation(Augmentation(**{part: 0.1}), generators[1])), picture)


def test_variations_keep_their_bounds_and_use_them():
    draws = [draw_variation(ALL, np.random.default_rng(i)) for i in range(2000)]
    factors = np.array([[d.brightness, d.contrast, d.saturation] for d in draws])
    assert 0.7 <= factors.min() < 0.71 and 1.29 < factors.max() <= 1.3
    assert max(abs(d.hue) for d in draws) <= 0.05 and 0.0199 < max(d.blur for d in draws) <= 0.02
    boxes = np.array([d.box for d in draws])
    assert boxes.min() >= 0 and boxes.max() <= 1 + 1e-9
    kept = boxes[:, 2:] - boxes[:, :2]
    assert np.allclose(kept[:, 0], kept[:, 1]), "width and height shrink alike, so shapes stay true"
    assert 0.9 <= kept.min() < 0.905
    assert abs(np.corrcoef(boxes[:, 0], factors[:, 0])[0, 1]) < 0.1, "parts are drawn apart"


def test_a_crop_shows_what_lies_in_its_box():
    picture = np.repeat(np.repeat(np.arange(100, dtype=np.uint8)[:, None, None], 100, 1), 3, 2).copy()
    variation = draw_variation(Augmentation(), np.random.default_rng(0))._replace(box=(0.0, 0.1, 0.8, 0.9))
    assert abs(int(vary(picture, variation)[50, 50, 0]) - 50) <= 1  # the middle of 10 to 90
    assert abs(int(vary(picture, variation)[0, 0, 0]) - 10) <= 1


@pytest.mark.parametrize(
    ("augmentation", "words"),
    [
        ({"crop": 0.6}, r"data\.augmentation\.crop is 0\.6.*0 to 0\.5"),
        ({"brightness": -0.1}, r"data\.augmentation\.brightness is -0\.1.*0 to 1"),
        ({"flip": True}, r"unknown key data\.augmentation\.flip"),
        ({"hue": "much"}, r"data\.augmentation\.hue is 'much'"),
    ],
)
def test_bad_keys_are_named(augmentation, words):
    with pytest.raises(RecipeError, match=words):
        tiny_recipe(data={"augmentation": augmentation})


def test_cached_features_refuse_augmentation_without_augmented_copies():
    frozen = {"freeze_vggt": True}
    section = {"augmentation": {"brightness": 0.2}}
    with pytest.raises(RecipeError, match=r"data\.augmentation.*memory\.cache_copies"):
        tiny_recipe(model=frozen, data=section, memory={"cache": ["vggt"]})
    tiny_recipe(model=frozen, data=section, memory={"cache": ["vggt"], "cache_copies": 4})
    tiny_recipe(model={"freeze_lang_encoder": True}, data=section, memory={"cache": ["lang_encoder"]})


def test_training_shows_varied_pictures_and_judging_plain_ones(tmp_path):
    recipe = tiny_recipe(data={"augmentation": {"brightness": 0.3, "crop": 0.1}})
    trainer = build_trainer(recipe, tmp_path)
    assert isinstance(trainer.train_dataset, AugmentedDataset)
    assert not isinstance(trainer.eval_dataset, AugmentedDataset)
    trainer.train()
    plain = build_trainer(tiny_recipe(), tmp_path / "plain")
    plain.train()
    losses = [t.state.log_history[-1]["train_loss"] for t in (trainer, plain)]
    assert np.isfinite(losses).all() and losses[0] != losses[1]
