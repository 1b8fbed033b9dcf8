import numpy as np
import pytest
from lerobot_folders import LENGTHS, SIZE, colour, write_v3

from hf_vla.data.lerobot_format import Episode
from hf_vla.data.mixture import build_datasets, mean_pictures, split_episodes
from hf_vla.recipe import Data, View


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return str(write_v3(tmp_path_factory.mktemp("data") / "doors"))


def episodes(*tasks):
    return tuple(Episode(i, 5, (task,), "", 5 * i, {}) for i, task in enumerate(tasks))


def test_train_and_eval_share_no_episode_and_lose_none(root):
    train, held_out = build_datasets(Data(dataset=root, eval_fraction=0.5), chunk_size=3, seed=0)
    a, b = ({dataset.locate(i)[0].index for i in range(len(dataset))} for dataset in (train, held_out))
    assert a | b == {0, 1, 2, 3}
    assert not a & b
    assert len(train) + len(held_out) == sum(LENGTHS)
    assert [view.camera for view in train.views] == [view.camera for view in held_out.views] == ["front", "wrist"]
    assert train[0].actions.shape == (3, 3)


def test_every_task_is_held_out_and_trained_on():
    tasks = ["open"] * 40 + ["close"] * 2 + ["once"]
    train, held_out = split_episodes(episodes(*tasks), 0.1, seed=3)
    assert len(held_out) == 5
    assert sum(i < 40 for i in held_out) == 4
    assert sum(40 <= i < 42 for i in held_out) == 1
    assert 42 in train


def test_the_seed_alone_decides():
    many = episodes(*["open"] * 30)
    assert split_episodes(many, 0.2, 1) == split_episodes(many, 0.2, 1)
    assert split_episodes(many, 0.2, 1) != split_episodes(many, 0.2, 2)


def test_tasks_of_one_episode_each_are_split_together_and_a_lone_episode_is_trained_on():
    train, held_out = split_episodes(episodes("a", "b", "c"), 0.1, 0)
    assert (len(train), len(held_out)) == (2, 1)
    assert split_episodes(episodes("a"), 0.1, 0) == ([0], [])
    assert split_episodes(episodes("a", "a"), 0.9, 0)[0]


def test_nothing_is_held_out_at_fraction_zero(root):
    train, held_out = build_datasets(Data(dataset=root, eval_fraction=0.0), 3, 0)
    assert held_out is None
    assert len(train) == sum(LENGTHS)


def test_views_of_the_recipe_are_taken_in_its_order(root):
    data = Data(dataset=root, eval_fraction=0.0, views=[View("wrist", -1), View("front")])
    train, _ = build_datasets(data, 3, 0)
    assert [image[0, 0].tolist() for image in train[2].images] == [list(colour(0, 1, 1)), list(colour(0, 2, 0))]


def test_bad_data_sections_say_what_to_do(root):
    with pytest.raises(ValueError, match=r"data\.dataset isn't set.*record_metaworld"):
        build_datasets(Data(), 3, 0)
    with pytest.raises(ValueError, match=r"no camera 'top'; it has front, wrist"):
        build_datasets(Data(dataset=root, views=[View("top")]), 3, 0)
    with pytest.raises(FileNotFoundError, match="no folder"):
        build_datasets(Data(dataset=root + "/nowhere"), 3, 0)


def test_mean_pictures_average_each_view_alone(root):
    train, _ = build_datasets(Data(dataset=root, eval_fraction=0.0), 3, 0)
    means = mean_pictures(train)
    assert means.shape == (2, SIZE, SIZE, 3)
    assert means.dtype == np.uint8
    wanted = np.mean([colour(e, f, 0) for e, length in enumerate(LENGTHS) for f in range(length)], axis=0)
    np.testing.assert_array_equal(means[0, 0, 0], np.rint(wanted))
    assert means[1, 3, 3, 2] == 100
    assert mean_pictures(train, lambda images: np.stack(images)[:, :2, :2], max_samples=4).shape == (2, 2, 2, 3)
