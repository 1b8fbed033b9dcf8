import os
from importlib import metadata
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from lerobot_faults import break_parquet
from lerobot_folders import write_v3
from tiny_run import TINY_LLAMA, tiny_recipe
from transformers import AutoModel, LlamaConfig

from hf_vla.memory import preflight_sources
from hf_vla.memory.check import Check
from hf_vla.memory.preflight_sources import check_source, check_versions, check_weights, open_data
from hf_vla.weights import byte_tokenizer

# Weights ---------------------------------------------------------------------------------------------------------------


def save_decoder(folder: Path) -> Path:
    AutoModel.from_config(LlamaConfig(**TINY_LLAMA)).save_pretrained(folder, max_shard_size="40KB")
    byte_tokenizer().save_pretrained(folder)
    return folder


def weights_of(**model) -> dict[str, Check]:
    return {check.title: check for check in check_weights(tiny_recipe(model=model))}


def test_a_folder_with_decoder_and_tokenizer_is_enough(tmp_path):
    folder = save_decoder(tmp_path / "Llama-2-tiny")
    checks = weights_of(lang_encoder=str(folder))
    assert [check.status for check in checks.values()] == ["ok"] * 3
    assert "Llama 2 Community License" in checks["Weights of the language encoder"].detail


def test_a_folder_that_lacks_a_shard_fails_and_names_it(tmp_path):
    folder = save_decoder(tmp_path / "decoder")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    check = weights_of(lang_encoder=str(folder))["Weights of the language encoder"]
    assert check.status == "fail" and shard.name in check.detail and "lacks 1 of" in check.detail


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 4976698672\n"


@pytest.mark.parametrize("kept", [lambda whole: whole[:-1], lambda whole: POINTER], ids=["cut short", "not pulled"])
def test_a_shard_that_is_cut_short_or_was_never_pulled_fails_and_is_named(tmp_path, kept):
    folder = save_decoder(tmp_path / "decoder")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.write_bytes(kept(shard.read_bytes()))
    check = weights_of(lang_encoder=str(folder))["Weights of the language encoder"]
    assert check.status == "fail" and shard.name in check.detail and "git lfs pull" in check.detail


def test_a_folder_without_weights_or_tokenizer_fails(tmp_path):
    folder = save_decoder(tmp_path / "decoder")
    for path in folder.glob("model*"):
        path.unlink()
    for path in [*folder.glob("tokenizer*"), *folder.glob("vocab*")]:
        path.unlink()
    checks = weights_of(lang_encoder=str(folder))
    assert "has no weights" in checks["Weights of the language encoder"].detail
    assert "has no tokenizer" in checks["Tokenizer"].detail


def test_a_damaged_tokenizer_fails(tmp_path):
    folder = save_decoder(tmp_path / "decoder")
    os.truncate(folder / "tokenizer.json", 200)
    check = weights_of(lang_encoder=str(folder))["Tokenizer"]
    assert check.status == "fail" and f"{folder}: its tokenizer can't be read" in check.detail


def test_a_damaged_vggt_file_and_a_wrong_path_fail(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"cut short")
    check = weights_of(vggt=str(file))["Weights of VGGT"]
    assert check.status == "fail" and "damaged" in check.detail
    check = weights_of(vggt=str(tmp_path / "nowhere.pt"))["Weights of VGGT"]
    assert check.status == "fail" and "no such file or folder" in check.detail


def test_a_cached_backbone_needs_no_weights():
    recipe = tiny_recipe(model={"vggt": "a/b", "freeze_vggt": True}, memory={"cache": ["vggt"]})
    check = check_weights(recipe, ["vggt"])[0]
    assert check.status == "ok" and "cache" in check.detail


def raising(error: Exception | None):
    def auth_check(repo):
        if error is not None:
            raise error

    return auth_check


def hub_error(kind):
    return kind.__new__(kind)  # its constructor wants a response of the HTTP library


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (None, "ok", "on the Hub and open to you"),
        (hub_error(GatedRepoError), "fail", "https://huggingface.co/facebook/VGGT-1B-Commercial"),
        (hub_error(RepositoryNotFoundError), "fail", "Check the name"),
        (ConnectionError("no network"), "fail", "hf download facebook/VGGT-1B-Commercial"),
    ],
)
def test_what_is_not_here_is_looked_for_on_the_hub(monkeypatch, tmp_path, error, status, says):
    monkeypatch.setattr(preflight_sources, "snapshot_download", lambda *args, **kwargs: tmp_path)  # cached in part
    monkeypatch.setattr(preflight_sources, "auth_check", raising(error))
    check = weights_of(vggt="facebook/VGGT-1B-Commercial")["Weights of VGGT"]
    assert check.status == status and says in check.detail + check.advice
    assert error is not None or "commercial use is allowed" in check.detail


def test_the_non_commercial_licence_is_named(monkeypatch):
    monkeypatch.setattr(preflight_sources, "auth_check", raising(None))
    assert "non-commercial" in check_source("Weights of VGGT", "facebook/VGGT-1B", str).detail


# Dataset and packages ------------------------------------------------------------------------------------------------


def test_the_datasets_cameras_and_sizes_are_told():
    check, dataset = open_data(tiny_recipe())
    first = dataset[0].images[0]
    assert check.status == "ok"
    assert f"corner2 {first.shape[1]}x{first.shape[0]}" in check.detail and "resized to 28x28" in check.detail


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"dataset": None}, "data.dataset isn't set"),
        ({"dataset": "no/such/folder"}, "no folder"),
        ({"views": [{"camera": "corner3"}]}, "corner"),
    ],
)
def test_data_that_cannot_be_used_fails(data, says):
    check, dataset = open_data(tiny_recipe(data=data))
    assert check.status == "fail" and dataset is None and says in check.detail


def test_a_picture_that_cannot_be_decoded_fails(monkeypatch):
    def cut_short(self, i):
        raise ValueError(f"sample {i}: a video is cut short")

    monkeypatch.setattr(preflight_sources.WindowDataset, "__getitem__", cut_short)
    check, _ = open_data(tiny_recipe())
    assert check.detail == "sample 0: a video is cut short" and "data.on_error=skip" in check.advice


def test_what_a_recipe_lets_skip_is_a_warning(tmp_path):
    root = write_v3(tmp_path / "doors", lengths=(5, 7, 3, 6, 8, 4))
    data = {"dataset": str(root), "on_error": "skip", "eval_fraction": 0.0}
    last = max((root / "data").rglob("*.parquet"))
    table = pq.read_table(last)
    torn = pa.array([{"bytes": b"no picture", "path": None}] * len(table), table.schema.field(0).type)
    pq.write_table(table.set_column(0, table.schema.field(0), torn), last)
    check, _ = open_data(tiny_recipe(data=data))
    assert check.status == "warn" and "front of episode 5, frame 3, can't be decoded" in check.advice
    break_parquet(root)
    assert "33 samples" not in open_data(tiny_recipe(data=data))[0].detail


def test_packages_are_compared_with_what_is_required_and_tested(monkeypatch, tmp_path):
    pins = tmp_path / "constraints.txt"
    pins.write_text("# tested\ntorch==1.0\nh5py==0.1\n")
    monkeypatch.setattr(preflight_sources, "CONSTRAINTS", pins)
    check = check_versions(tiny_recipe())
    assert check.status == "warn" and f"torch {metadata.version('torch')} (tested: ==1.0)" in check.detail
    assert "h5py" not in check.detail  # this recipe doesn't want it

    required = ["torch>=99", 'nope; extra == "sim"', 'nil; extra == "torchcodec"']
    monkeypatch.setattr(preflight_sources.importlib.metadata, "requires", lambda name: required)
    check = check_versions(tiny_recipe())
    assert check.status == "fail" and "torch>=99 is wanted" in check.detail and "nope" not in check.detail
    check = check_versions(tiny_recipe(evaluation={"simulator": "metaworld"}))
    assert "nope is wanted, none is here" in check.detail and ".[sim]" in check.advice
    check = check_versions(tiny_recipe(data={"video_backend": "torchcodec"}))
    assert "nil is wanted, none is here" in check.detail and ".[torchcodec]" in check.advice
