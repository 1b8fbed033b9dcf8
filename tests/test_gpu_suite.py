import json
import subprocess
import sys

import pytest

from benchmarks.gpu_suite import PARTS

pytestmark = pytest.mark.slow


def test_every_part_runs_at_a_thousandth_of_its_size_and_writes_its_file(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu_suite", "--small", "--results", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    written = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert set(written) == set(PARTS), done.stdout
    assert all(result["command"].startswith("python -m benchmarks.gpu_suite --part") for result in written.values())
    assert all(result["ran_uncut"] for result in written.values() if "ran_uncut" in result)


def test_it_measures_nothing_at_full_size_without_a_gpu():
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu_suite"], capture_output=True, text=True)
    assert "There is no GPU here" in done.stderr


def test_a_step_is_divided_into_parts_that_add_up_to_it(tmp_path):
    command = [sys.executable, "-m", "benchmarks.step_profile", "--scale", "small", "--results", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    result = json.loads((tmp_path / "step_profile.json").read_text())["lora.json"]
    assert {"data", "VGGT", "LLaMA forward", "backward", "optimizer", "other"} <= set(result["parts"])
    assert 0.5 < sum(result["parts"].values()) / result["seconds_a_step"] < 2
