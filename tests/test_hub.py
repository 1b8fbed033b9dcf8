"""Publishing: what the real client sends to a Hub on this machine, what the card claims, and that it opens from there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants

from hf_vla import run as run_directory
from hf_vla.checkpoint import load_checkpoint
from hf_vla.hub import push
from hf_vla.hub.card import model_card
from hf_vla.policy import Policy
from hf_vla.recipe import RecipeError, make_recipe
from hf_vla.train import train
from tests.hub_server import serve
from tests.test_training import FROZEN, observation
from tests.tiny_run import tiny_recipe

ROOT = Path(__file__).parent.parent
LORA = {"model": FROZEN, "lora": {"apply_to": ["lang_encoder"], "r": 4}}
REPO = "ada/faucets"
CLOSED = "http://127.0.0.1:9"  # the port of `discard`, where nobody listens


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory) -> Path:
    return train(tiny_recipe(**LORA), tmp_path_factory.mktemp("lora") / "faucets")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub that this process's client talks to as ada; other processes are pointed to it by `environment`."""
    with serve(tmp_path / "hub") as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
        monkeypatch.setenv("HF_TOKEN", "hf_ada")
        yield server


def environment(endpoint: str, home: Path) -> dict[str, str]:
    hub = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_TOKEN": "hf_ada", "HF_HUB_DISABLE_XET": "1"}
    return {**os.environ, **hub}


def front_matter(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def test_adapters_go_with_what_they_need_and_act_alike_when_opened_from_there(hub, lora_run):
    assert push(lora_run, REPO) == f"{hub.url}/{REPO}"
    sent = hub.files(REPO)
    assert {"adapter_model.safetensors", "adapter_config.json", "trained.safetensors", "config.json"} <= set(sent)
    assert {"processor_config.json", "recipe.json", "run.json", "report.html", "README.md"} <= set(sent)
    assert not {"model.safetensors", "optimizer.pt"} & set(sent)
    for name, path in sent.items():
        source = lora_run / ("" if name in ("run.json", "report.html") else "model") / name
        assert name in ("README.md", "adapter_config.json") or path.read_bytes() == source.read_bytes()
    assert hub.private == {REPO}
    assert hub.commits == 1
    here, there = (Policy.from_pretrained(source) for source in (lora_run / "model", REPO))
    assert here.predict_action_chunk(observation()).tobytes() == there.predict_action_chunk(observation()).tobytes()


def test_transformers_says_what_opens_pushed_adapters(hub, tmp_path, lora_run):
    push(lora_run, REPO)
    code = f"from transformers import AutoModel; AutoModel.from_pretrained({REPO!r}, trust_remote_code=True)"
    process = {"cwd": tmp_path, "env": environment(hub.url, tmp_path), "capture_output": True, "text": True}
    said = subprocess.run([sys.executable, "-c", code], **process).stderr
    assert "ada/faucets holds only what training changed" in said and "hf_vla.Policy.from_pretrained" in said


def test_no_pickle_is_ever_sent(hub, tmp_path, lora_run):
    run = copy_of(lora_run, tmp_path)
    (run / "model/optimizer.pt").write_bytes(b"pickle")
    (run / "model/pytorch_model.bin").write_bytes(b"pickle")
    push(run, REPO)
    assert not [name for name in hub.files(REPO) if name.endswith((".pt", ".bin"))]


def test_a_whole_model_takes_the_place_of_adapters_and_back(hub, lora_run):
    push(lora_run, REPO, merged=True)
    assert "model.safetensors" in hub.files(REPO)
    assert "frozen, with LoRA of rank 4" in hub.files(REPO)["README.md"].read_text()
    assert not [path for path in lora_run.iterdir() if path.name.startswith("merged")]
    model, _, recipe = load_checkpoint(REPO)
    assert recipe.lora.apply_to == []
    assert not [name for name, _ in model.named_parameters() if "lora_" in name]
    (hub.folder / REPO / "video.mp4").write_bytes(b"mine")
    push(lora_run, REPO)
    sent = hub.files(REPO)
    assert "model.safetensors" not in sent  # it would be opened in the adapters' place
    assert {"adapter_model.safetensors", "video.mp4"} <= set(sent)


def copy_of(run: Path, folder: Path) -> Path:
    copy = folder / "copy"
    for path in run.rglob("*"):
        if path.is_file() and "checkpoint-" not in str(path):
            (copy / path.relative_to(run)).parent.mkdir(parents=True, exist_ok=True)
            (copy / path.relative_to(run)).write_bytes(path.read_bytes())
    return copy


# The card


def with_results(run: Path, folder: Path, recipe: dict | None = None, **results) -> Path:
    """A copy of a run that measured these results under these recipe keys, section by section."""
    copy = copy_of(run, folder)
    run_directory.update_info(copy, results)
    for path in (copy / "recipe.json", copy / "model/recipe.json"):
        raw = json.loads(path.read_text())
        for section, values in (recipe or {}).items():
            raw[section].update(values)
        path.write_text(json.dumps(raw))
    return copy


def card_of(run: Path) -> str:
    return model_card(run, run / "model", REPO)


def counts(**successes) -> dict:
    return {task: {"successes": n, "episodes": 20} for task, n in successes.items()}


def test_the_card_names_bases_licences_and_data(tmp_path, lora_run):
    model = {"vggt": "facebook/VGGT-1B", "lang_encoder": "meta-llama/Llama-2-7b-hf"}
    run = with_results(lora_run, tmp_path, {"model": model, "data": {"dataset": "HuggingFaceVLA/libero"}})
    card = card_of(run)
    front = front_matter(card)
    assert front["base_model"] == list(model.values())
    assert front["base_model_relation"] == "adapter"
    assert front["datasets"] == ["HuggingFaceVLA/libero"]
    assert front["pipeline_tag"] == "robotics"
    assert front["license"] == "other"
    assert "Non-commercial use only" in card
    assert "Llama 2 Community License" in card
    assert "frozen, with LoRA of rank 4" in card


def test_the_card_keeps_paths_of_this_machine_to_itself(tmp_path, lora_run):
    home = tmp_path / "home/ada"
    model = {"vggt": f"{home}/vggt", "lang_encoder": f"{home}/llama"}
    card = card_of(with_results(lora_run, tmp_path, {"model": model, "data": {"dataset": f"{home}/demos"}}))
    assert str(home) not in card
    assert "`demos`" in card
    assert "base_model" not in front_matter(card)


def test_success_stands_beside_its_controls_or_not_at_all(tmp_path, lora_run):
    alone = card_of(with_results(lora_run, tmp_path / "a", rollouts=counts(reach=17)))
    assert "without controls" in alone
    assert "17 of 20" not in alone
    controlled = {"rollouts": counts(reach=17, push=19), "rollouts_without_pictures": counts(reach=3)}
    card = card_of(with_results(lora_run, tmp_path / "b", **controlled))
    assert "| reach | 17 of 20 (64 to 95 %) | 3 of 20 (5 to 36 %) | not measured |" in card
    assert "19 of 20" not in card


def test_the_card_says_what_was_measured_and_nothing_else(tmp_path, lora_run):
    plain = card_of(lora_run)
    assert plain.count("Not measured") == 2
    assert f"{json.loads((lora_run / 'run.json').read_text())['train']['loss']:.4g}" in plain
    errors = {"policy": {"mae": [0.1, 0.2], "mean_mae": 0.15}, "mean_action": {"mae": [0.3, 0.4], "mean_mae": 0.35}}
    card = card_of(with_results(lora_run, tmp_path, offline={"names": ["x", "y"], **errors}))
    assert "| | policy | mean action |\n|---|---|---|\n| x | 0.100 | 0.300 |\n| y | 0.200 | 0.400 |" in card
    assert "None" not in card.replace("None: its weights", "")


# What can go wrong


def test_a_hub_that_refuses_or_is_away_is_one_clear_error(hub, lora_run, monkeypatch):
    with pytest.raises(PermissionError, match="may not write to grace/faucets"):
        push(lora_run, "grace/faucets")
    with pytest.raises(ValueError, match=r"set hub\.repo_id"):
        push(lora_run)
    with pytest.raises(ValueError, match="'faucets' is no name of a repository"):
        push(lora_run, "faucets")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PermissionError, match="hf auth login"):
        push(lora_run, REPO)
    monkeypatch.setattr(constants, "ENDPOINT", CLOSED)
    with pytest.raises(ConnectionError, match="can't be reached"):
        push(lora_run, REPO)
    assert not (hub.folder / REPO).exists()


def test_somebody_elses_public_repository_stays_as_it_is(hub, lora_run):
    (hub.folder / "grace/faucets").mkdir(parents=True)
    with pytest.raises(PermissionError, match="may not write to grace/faucets"):
        push(lora_run, "grace/faucets", private=False)
    assert not hub.files("grace/faucets")


def test_a_private_run_never_goes_to_a_public_repository(hub, lora_run):
    (hub.folder / REPO).mkdir(parents=True)
    with pytest.raises(ValueError, match="is public: push with --public"):
        push(lora_run, REPO)
    assert not hub.files(REPO)
    push(lora_run, REPO, private=False)
    assert "README.md" in hub.files(REPO)


def test_a_directory_without_a_finished_run_is_refused(hub, tmp_path, lora_run):
    with pytest.raises(FileNotFoundError, match=r"no run.json, so it isn't a run"):
        push(tmp_path, REPO)
    run = copy_of(lora_run, tmp_path)
    (run / "model/recipe.json").unlink()
    with pytest.raises(FileNotFoundError, match="its training hasn't ended"):
        push(run, REPO)
    assert not hub.requests


@pytest.mark.parametrize("name", ["processor_config.json", "trained.safetensors"])
def test_a_model_that_nobody_could_open_is_not_pushed(hub, tmp_path, lora_run, name):
    run = copy_of(lora_run, tmp_path)
    (run / "model" / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"it has no {name}"):
        push(run, REPO)
    assert not hub.requests


def test_what_isnt_there_cant_be_opened(hub, tmp_path, lora_run):
    with pytest.raises(FileNotFoundError, match="nor a repository that the Hub shows you"):
        load_checkpoint("ada/nothing")
    (hub.folder / REPO).mkdir(parents=True)
    (hub.folder / REPO / "README.md").write_text("something else")
    with pytest.raises(FileNotFoundError, match="ada/faucets is no checkpoint of hf_vla"):
        load_checkpoint(REPO)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"training": {"push_to_hub": True}}, "hub.repo_id is None"),
        ({"training": {"push_to_hub": True}, "hub": {"repo_id": "faucets"}}, "give it as user/name"),
        ({"training": {"hub_model_id": REPO}}, "hub.repo_id is the one place"),
        ({"training": {"hub_token": "hf_ada"}}, "hf auth login"),
    ],
)
def test_a_push_that_has_nowhere_to_go_is_refused_before_training(sections, words):
    with pytest.raises(RecipeError, match=words):
        make_recipe(sections)


# A training that pushes


def test_training_pushes_when_it_is_done(hub, tmp_path):
    train(tiny_recipe(training={"push_to_hub": True}, hub={"repo_id": REPO}), tmp_path / "run")
    assert json.loads(hub.files(REPO)["run.json"].read_text())["steps"] == 2
    assert {"model.safetensors", "modeling_vla.py", "README.md"} <= set(hub.files(REPO))


def test_training_ends_well_without_the_hub_and_the_push_can_be_made_later(hub, tmp_path, monkeypatch, caplog):
    recipe = tiny_recipe(training={"push_to_hub": True}, hub={"repo_id": REPO})
    with monkeypatch.context() as offline:
        offline.setattr(constants, "ENDPOINT", CLOSED)
        run = train(recipe, tmp_path / "run")
    assert f"push it later by `hf-vla push {run}`" in caplog.text
    assert run_directory.read_info(run)["events"][-1]["kind"] == "not_pushed"
    push(run)
    assert "model.safetensors" in hub.files(REPO)


@pytest.mark.slow
def test_the_commands_push_and_merge_and_another_process_opens_what_they_sent(hub, tmp_path, lora_run):
    def hf_vla(*words) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "hf_vla.cli", *map(str, words)]
        return subprocess.run(command, cwd=ROOT, env=environment(hub.url, tmp_path), capture_output=True, text=True)

    done = hf_vla("push", lora_run, REPO)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{hub.url}/{REPO}"
    code = (
        "import sys; from hf_vla import Policy; from tests.test_training import observation;"
        f"sys.stdout.buffer.write(Policy.from_pretrained({REPO!r}).predict_action_chunk(observation()).tobytes())"
    )
    process = {"cwd": ROOT, "env": environment(hub.url, tmp_path), "capture_output": True, "check": True}
    there = subprocess.run([sys.executable, "-c", code], **process).stdout
    assert Policy.from_pretrained(lora_run / "model").predict_action_chunk(observation()).tobytes() == there
    assert hf_vla("merge", lora_run, "--output", tmp_path / "merged").returncode == 0
    assert (tmp_path / "merged/model.safetensors").is_file()
    for words in (("push", tmp_path, REPO), ("merge", tmp_path)):
        failed = hf_vla(*words)
        assert failed.returncode == 1
        assert "no run.json, so it isn't a run directory" in failed.stderr
        assert "Traceback" not in failed.stderr
