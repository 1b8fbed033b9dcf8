"""Two processes, launched as a user does, killed at a random moment: the run goes on to the last bit."""

import random

import pytest

from benchmarks.killed import kill_case

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def test_two_processes_killed_go_on_as_if_they_had_not_been(tmp_path):
    found = kill_case("two_processes", 2, random.Random(1), tmp_path / "runs")
    assert len(found["kills"]) == 2
    assert found["differences"] == []
