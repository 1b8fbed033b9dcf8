"""Pictures come out as VGGT's own loader makes them; see references/vggt_preprocess for the numbers."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL import __version__ as pillow_version

from hf_vla.model.image_processing_vla import resize_view, stack_views

REFERENCES = Path(__file__).parents[1] / "references" / "vggt_preprocess"
EXPECTED = json.loads((REFERENCES / "expected.json").read_text())
CASES = [case for case in EXPECTED["cases"] if case["fn"] == "load_and_preprocess_images"]


def picture(height, width, channels=3):
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['kwargs']['mode']}-{'-'.join(c['images'])}")
def test_matches_reference(case):
    images = [Image.open(REFERENCES / f"{name}.png") for name in case["images"]]
    views = stack_views([resize_view(image, 518, case["kwargs"]["mode"]) for image in images])

    views = views.transpose(0, 3, 1, 2)
    assert list(views.shape) == case["shape"]
    for *index, value in case["samples"]:
        assert views[tuple(index)] / 255 == pytest.approx(value, abs=2 / 255)
    assert views.mean(axis=(1, 2, 3)) / 255 == pytest.approx(case["per_image_mean"], abs=1e-3)
    if pillow_version == EXPECTED["pillow"]:
        digest = hashlib.sha256(np.ascontiguousarray(views).tobytes()).hexdigest()
        assert digest == case["sha256_of_round255_uint8"]


def test_array_and_pil_image_give_the_same():
    image = picture(40, 30)
    for mode in ("crop", "pad", "stretch"):
        np.testing.assert_array_equal(resize_view(image, 28, mode), resize_view(Image.fromarray(image), 28, mode))


@pytest.mark.parametrize(("mode", "shape"), [("stretch", (56, 56, 3)), ("pad", (56, 56, 3)), ("crop", (28, 56, 3))])
def test_shape_of_a_wide_picture(mode, shape):
    view = resize_view(picture(100, 200), 56, mode)
    assert view.shape == shape
    assert view.dtype == np.uint8


def test_very_wide_picture_keeps_one_row_of_patches():
    assert resize_view(picture(2, 400), 56, "crop").shape == (14, 56, 3)
    assert resize_view(picture(2, 400), 56, "pad").shape == (56, 56, 3)


def test_right_size_stays_as_it_is():
    image = picture(56, 56)
    for mode in ("crop", "pad", "stretch"):
        np.testing.assert_array_equal(resize_view(image, 56, mode), image)


def test_transparency_becomes_white():
    clear = np.zeros((20, 20, 4), dtype=np.uint8)
    assert (resize_view(clear, 14, "stretch") == 255).all()


def test_size_between_patches_names_the_nearest_two():
    with pytest.raises(ValueError, match=r"384 isn't\. Nearest: 378 and 392"):
        resize_view(picture(10, 10), 384, "stretch")


def test_wrong_input_is_one_clear_error():
    with pytest.raises(ValueError, match="Unknown resize mode 'zoom'; allowed: stretch, crop, pad"):
        resize_view(picture(10, 10), 14, "zoom")
    with pytest.raises(ValueError, match=r"got \(10, 10, 3\) in float64"):
        resize_view(picture(10, 10) / 255, 14, "stretch")
    with pytest.raises(ValueError, match=r"got \(3, 10, 10\) in uint8"):
        resize_view(np.zeros((3, 10, 10), np.uint8), 14, "stretch")
