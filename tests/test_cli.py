"""What a person at the terminal is told: where an answer is, and one reason for each mistake."""

import shutil

import pytest
from typer.testing import CliRunner

from hf_vla import planning
from hf_vla.cli import app
from hf_vla.train import train
from tests.tiny_run import SAMPLE, tiny_recipe


def call(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_evaluating_writes_the_report_anew_and_says_where(tmp_path):
    run = train(tiny_recipe(), tmp_path / "run")
    assert "run.json has no <code>offline</code>" in (run / "report.html").read_text()
    said = call("evaluate", run)
    assert (said.exit_code, said.stdout) == (0, f"{run / 'report.html'}\n")
    assert "Mean absolute error of predicted actions" in (run / "report.html").read_text()


def test_a_dataset_that_has_moved_is_evaluated_where_it_lies_now_and_that_is_told(tmp_path):
    before = shutil.copytree(SAMPLE, tmp_path / "before")
    run = train(tiny_recipe(data={"dataset": str(before)}), tmp_path / "run")
    before.rename(tmp_path / "now")
    assert isinstance(call("evaluate", run).exception, FileNotFoundError)
    place = f"data.dataset={tmp_path / 'now'}"
    assert call("evaluate", run, "--set", place).exit_code == 0
    assert f"Measured on held-out episodes with {place}." in (run / "report.html").read_text()


@pytest.mark.parametrize("command", ["evaluate", "rollout", "merge", "push"])
def test_a_folder_that_is_no_run_is_named(tmp_path, command):
    error = call(command, tmp_path / "none").exception
    assert isinstance(error, FileNotFoundError)
    assert "none has no run.json, so it isn't a run directory" in str(error)


@pytest.mark.parametrize("command", ["evaluate", "rollout", "merge", "push"])
def test_a_damaged_record_of_a_run_is_named(tmp_path, command):
    (tmp_path / "run.json").write_text('{"steps": 1')
    (tmp_path / "model").mkdir()
    (tmp_path / "model/recipe.json").write_text("{}")
    error = call(command, tmp_path).exception
    assert isinstance(error, ValueError) and "run.json: can't be read as JSON" in str(error)


def test_a_search_names_its_own_mistakes_before_those_of_its_output(tmp_path):
    there = tmp_path / "planned.json"
    there.touch()
    search = ("plan", "--budget", "28GiB", "--output", there)
    assert "'lang=lora' isn't a part" in str(call(*search, "--train", "lang=lora").exception)
    assert "is there already" in str(call(*search, "--train", "language=lora").exception)
    nowhere = call("plan", "--budget", "28GiB", "--train", "language=lora", "--output", tmp_path / "no/planned.json")
    assert "there is no folder" in str(nowhere.exception)


def test_changes_are_allowed_as_the_search_proposes_them(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(planning, "search", lambda wish, *rest: asked.append(wish.allow) or [][0])
    search = ("plan", "--budget", "28GiB", "--output", tmp_path / "planned.json", "--train", "language=full")
    for words in (["--allow", "quantize,freeze"], ["--allow", "quantize", "--allow", "freeze"]):
        assert isinstance(call(*search, *words).exception, IndexError)
    assert asked == [("quantize", "freeze")] * 2
