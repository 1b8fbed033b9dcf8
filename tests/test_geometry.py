"""What VGGT's heads see of a run's first held-out pair, and the page that shows it."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.matrix import Case, recipe_of, write_weights
from hf_vla.data.mixture import build_datasets
from hf_vla.evaluation import evaluate_offline
from hf_vla.geometry import color_depth, relative_cameras, write_geometry
from hf_vla.policy import Policy
from hf_vla.report import write_report
from hf_vla.train import train


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """A run on a tiny checkpoint that holds heads as the released one does, evaluated; and what was held out first."""
    folder = tmp_path_factory.mktemp("seen")
    recipe = recipe_of(Case("cross_attention", "l1", "frozen"), write_weights(folder / "weights"), steps=1)
    recipe.model.outputs = "geometry"
    directory = train(recipe, folder / "run")
    evaluate_offline(directory)
    _, held_out = build_datasets(recipe.data, recipe.model.chunk_size, recipe.training["seed"])
    return directory, Policy.from_pretrained(directory / "model"), held_out[0]


def test_depth_and_cameras_of_every_view_are_written(seen):
    folder, policy, sample = seen
    told = json.loads((folder / "geometry.json").read_text())
    assert [view["name"] for view in told["views"]] == policy.processor.views
    assert told["episode_index"] == sample.episode_index
    first, second = told["views"]
    assert first["angle_degrees"] == pytest.approx(0, abs=1e-6)
    assert np.allclose(first["translation"], 0, atol=1e-6)
    assert 0 < first["near"] <= first["far"]
    assert len(second["quaternion"]) == 4
    for view, image in zip(told["views"], sample.images, strict=True):
        assert np.array_equal(np.asarray(Image.open(folder / "geometry" / f"view_{view['file']}")), image)
        assert Image.open(folder / "geometry" / f"depth_{view['file']}").size == (28, 28)


def test_the_page_shows_it(seen):
    page = write_report(seen[0]).read_text()
    assert "What the backbone sees" in page
    assert page.count('alt="Depth of the view') == 2


def test_random_weights_have_no_geometry_to_show(seen, tmp_path):
    _, policy, sample = seen
    with pytest.raises(ValueError, match="its weights are random"):
        write_geometry(tmp_path, {"depth": 1}, policy.model.model.vggt, policy.processor, sample)
    assert not list(tmp_path.iterdir())


def test_a_relative_camera_takes_points_from_the_first_to_the_other():
    """Two cameras that both moved: the world point (0, 0, 5), through each pose and through the relative one."""
    quarter = math.sin(math.pi / 4)
    poses = torch.tensor(
        [
            [1.0, 0, 0, 0, 0, 0, 2.0, 0.5, 1.0],  # moved, not turned; the quaternion isn't normalised
            [0, 2.0, 0, 0, quarter, 0, quarter, 0.5, 1.0],  # turned by 90 degrees about y
        ]
    )
    first, second = relative_cameras(poses)
    assert first["translation"] == pytest.approx([0, 0, 0])
    assert second["angle_degrees"] == pytest.approx(90)
    assert second["field_of_view_degrees"] == pytest.approx([math.degrees(0.5), math.degrees(1.0)])
    # In the first camera the point is at (1, 0, 5); in the second at R(0, 0, 5) + t = (5, 2, 0).
    x, y, z = 1.0, 0.0, 5.0  # a turn by 90 degrees about y takes (x, y, z) to (z, y, -x)
    assert np.allclose(np.add(second["translation"], [z, y, -x]), [5, 2, 0], atol=1e-6)


def test_what_is_near_is_light():
    depth = np.stack([np.full((4, 4), 1.0), np.full((4, 4), 9.0)])
    near, far = color_depth(depth)
    assert near.dtype == np.uint8
    assert near.sum() > far.sum()
    assert color_depth(np.ones((1, 2, 2))).shape == (1, 2, 2, 3)
