import json

import numpy as np
import pytest
import torch
from tiny_policy import stats_of

from hf_vla.model.normalization import FLOOR, MODES, Stats, normalize, unnormalize


def make(values: np.ndarray) -> Stats:
    return Stats.from_dict(stats_of(values))


@pytest.fixture
def values() -> np.ndarray:
    return np.random.default_rng(0).normal([0, 5, -300], [1, 0.1, 40], (2000, 3))


@pytest.mark.parametrize("mode", MODES)
def test_unnormalize_gives_back_what_was_normalized(values, mode):
    stats, x = make(values), torch.tensor(values, dtype=torch.float32)
    assert torch.allclose(unnormalize(normalize(x, stats, mode), stats, mode), x, rtol=1e-5, atol=1e-5)


def test_modes_map_what_they_say(values):
    stats = make(values)
    x = torch.tensor(values, dtype=torch.float32)
    standard = normalize(x, stats, "mean_std")
    assert torch.allclose(standard.mean(0), torch.zeros(3), atol=1e-4)
    assert torch.allclose(standard.std(0), torch.ones(3), atol=1e-2)
    ranged = normalize(x, stats, "min_max")
    assert torch.allclose(ranged.amin(0), -torch.ones(3), atol=1e-4)
    assert torch.allclose(ranged.amax(0), torch.ones(3), atol=1e-4)
    inner = normalize(torch.stack([stats.q01, stats.q99]), stats, "q01_q99")
    assert torch.allclose(inner, torch.tensor([-1.0, 1.0])[:, None].expand(2, 3), atol=1e-4)


def test_nothing_is_clipped(values):
    stats = make(values)
    assert (normalize(stats.max + (stats.max - stats.min), stats, "q01_q99") > 2).all()


@pytest.mark.parametrize("mode", MODES)
def test_a_dead_dimension_stays_quiet_and_comes_back(mode):
    noise = np.random.default_rng(0).normal(0, 1e-7, (1000, 1))
    stats = make(5 + noise)
    quiet = normalize(torch.tensor(5 + noise, dtype=torch.float32), stats, mode)
    assert quiet.abs().max() < 1e-3, "noise blown up to a signal"
    moved = normalize(torch.tensor([5.1]), stats, mode)
    assert 0.5 < moved < 10, "a real move neither explodes nor vanishes"
    assert torch.allclose(unnormalize(moved, stats, mode), torch.tensor([5.1]))


@pytest.mark.parametrize("mode", MODES)
def test_a_dimension_that_is_always_zero_keeps_its_units(mode):
    stats = make(np.zeros((100, 1)))
    assert normalize(torch.tensor([0.25]), stats, mode) == 0.25


def test_the_floor_is_relative_so_small_units_are_signals_too():
    small = np.random.default_rng(0).normal(0, 1e-6, (1000, 1))
    assert torch.allclose(
        normalize(torch.tensor([2e-6]), make(small), "mean_std"),
        normalize(torch.tensor([2.0]), make(small * 1e6), "mean_std"),
        rtol=1e-4,
    )
    assert make(np.full((10, 1), 7.0)).scale("mean_std") == pytest.approx(7 * FLOOR)


@pytest.mark.parametrize("mode", ["q01_q99", "mean_std"])
def test_a_gripper_that_seldom_closes_does_not_explode(mode):
    values = np.zeros((10_000, 1))
    values[:50] = 1  # q01 = q99 = 0
    assert normalize(torch.tensor([1.0]), make(values), mode) < 20


def test_stats_survive_json(values):
    stats = make(values)
    again = Stats.from_dict(json.loads(json.dumps(stats.to_dict())))
    assert all(torch.equal(getattr(stats, name), getattr(again, name)) for name in stats.to_dict())


def test_missing_quantiles_say_what_to_do(values):
    old = {k: v for k, v in stats_of(values).items() if not k.startswith("q")}
    stats = Stats.from_dict(old)
    normalize(torch.zeros(3), stats, "min_max")
    with pytest.raises(ValueError, match=r"no q01 and q99.*mean_std or min_max"):
        normalize(torch.zeros(3), stats, "q01_q99")


def test_broken_stats_are_refused(values):
    good = stats_of(values)
    with pytest.raises(ValueError, match=r"action lack std"):
        Stats.from_dict({k: v for k, v in good.items() if k != "std"}, "action")
    with pytest.raises(ValueError, match=r"max of action must be 3 finite numbers"):
        Stats.from_dict({**good, "max": [1.0, float("nan"), 2.0]}, "action")
    with pytest.raises(ValueError, match="Unknown normalization 'zscore'"):
        Stats.from_dict(good).scale("zscore")
