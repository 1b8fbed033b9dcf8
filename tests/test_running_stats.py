"""Statistics in one pass, against numpy's over all rows."""

import numpy as np
import pytest

from hf_vla.data.lerobot_stats import vector_stats
from hf_vla.data.running_stats import RunningStats


def gather(values, piece, **settings):
    stats = RunningStats(values.shape[1], **settings)
    for start in range(0, len(values), piece):
        stats.add(values[start : start + piece])
    return stats


def test_few_rows_are_exact():
    values = np.random.default_rng(0).normal(4096, 0.5, (1000, 3)).astype(np.float32)
    counted = gather(values, 37)
    assert counted.rank_error == 0
    for name, expected in vector_stats(values).items():
        assert np.allclose(counted.stats()[name], expected, rtol=1e-9), name


@pytest.mark.parametrize("order", ["random", "ascending", "descending", "sawtooth"])
def test_quantiles_of_many_rows_keep_within_the_stated_error(order):
    values = np.random.default_rng(1).standard_t(3, (60_000, 2))
    if order in ("ascending", "descending"):
        values = np.sort(values, axis=0)[:: 1 if order == "ascending" else -1]
    if order == "sawtooth":
        values = np.sort(values.reshape(100, 600, 2), axis=1).reshape(-1, 2)
    counted = gather(values, 1001, buffer_rows=512)
    stats, error = counted.stats(), counted.rank_error
    assert 0 < error < 0.01
    for name, share in {"q01": 0.01, "q50": 0.5, "q99": 0.99}.items():
        ranks = (values <= np.array(stats[name])).mean(0)
        assert (np.abs(ranks - share) <= error + 1 / len(values)).all(), name
    assert np.allclose(stats["mean"], values.mean(0)) and np.allclose(stats["std"], values.std(0))
    assert stats["max"] == values.max(0).tolist() and stats["count"] == [60_000]


def test_merged_is_as_counted_together():
    values = np.random.default_rng(2).normal(size=(5000, 2))
    merged = gather(values[:3000], 100, buffer_rows=256)
    merged.merge(gather(values[3000:], 100, buffer_rows=256))
    merged.merge(RunningStats(2))
    whole = vector_stats(values)
    for name in ("mean", "std", "min", "max", "count"):
        assert np.allclose(merged.stats()[name], whole[name]), name
    assert np.abs((values <= np.array(merged.stats()["q99"])).mean(0) - 0.99).max() <= merged.rank_error + 1 / 5000


def test_nothing_counted_is_an_error():
    with pytest.raises(ValueError, match="at least one row"):
        RunningStats(2).stats()
