"""Statistics in one pass, against numpy's over all rows."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from typer.testing import CliRunner

from hf_vla.data.lerobot_format import STAT_NAMES, open_dataset
from hf_vla.data.lerobot_stats import vector_stats
from hf_vla.data.running_stats import RunningStats
from tests import lerobot_folders


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


def script():
    path = Path(__file__).parent.parent / "data_scripts/compute_stats.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*arguments):
    app = typer.Typer()
    app.command()(script().main)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("write", [lerobot_folders.write_v2, lerobot_folders.write_v3])
def test_the_script_writes_what_a_dataset_lacks(tmp_path, write):
    root = write(tmp_path / "toy")
    assert not open_dataset(root).meta_stats
    done = run(root)
    assert done.exit_code == 0, done.output
    info = open_dataset(root)
    expected = vector_stats(np.stack(info.table.data.column("action").to_numpy()))
    for name in STAT_NAMES:
        assert np.allclose(info.meta_stats["action"][name], expected[name]), name
    assert info.meta_stats["action"]["count"] == [sum(lerobot_folders.LENGTHS)]


def test_statistics_of_pictures_are_kept_and_several_sets_go_together(tmp_path):
    first = lerobot_folders.write_v3(tmp_path / "a", stats={"observation.images.front": {"mean": [0.5]}})
    second = lerobot_folders.write_v3(tmp_path / "b", lengths=(3, 4, 2))
    done = run(first, second, "--merged", tmp_path / "all.json")
    assert done.exit_code == 0, done.output
    assert json.loads((first / "meta/stats.json").read_text())["observation.images.front"] == {"mean": [0.5]}
    together = json.loads((tmp_path / "all.json").read_text())["action"]
    rows = [np.stack(open_dataset(root).table.data.column("action").to_numpy()) for root in (first, second)]
    for name, value in vector_stats(np.concatenate(rows)).items():
        assert np.allclose(together[name], value), name


def test_the_script_names_what_it_cannot_read(tmp_path):
    root = lerobot_folders.write_v3(tmp_path / "toy")
    file = root / "data/chunk-000/file-001.parquet"
    table = pq.read_table(file)
    bad = [[np.nan, 0, 0], *table["action"].to_pylist()[1:]]
    place = table.schema.get_field_index("action")
    pq.write_table(
        table.set_column(place, table.schema.field(place), pa.array(bad, table.schema.field(place).type)), file
    )
    done = run(root)
    assert done.exit_code == 1 and "file-001.parquet: action of episode 2" in done.output
    file.write_bytes(file.read_bytes()[:200])
    done = run(root)
    assert done.exit_code == 1 and "file-001.parquet: can't be read as parquet" in done.output
    assert not (root / "meta/stats.json").exists()


def test_the_script_names_a_dataset_without_rows(tmp_path):
    root = lerobot_folders.write_v3(tmp_path / "toy")
    for file in root.glob("data/**/*.parquet"):
        pq.write_table(pq.read_table(file).slice(0, 0), file)
    done = run(root)
    assert done.exit_code == 1 and "holds no rows of observation.state and action" in " ".join(done.output.split())
