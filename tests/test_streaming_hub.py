"""Streaming from a Hub on this machine: meta/ ahead, the rest as it is read, and one error for what isn't there."""

import shutil
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import HfFileSystem, constants
from lerobot_folders import LENGTHS, write_v2, write_v3

from hf_vla.data.lerobot_format import open_dataset
from hf_vla.data.loader import RankBatches, build_loader
from hf_vla.data.mixture import order_of
from hf_vla.data.streaming import StreamedDataset, open_stream
from hf_vla.data.windows import WindowDataset
from tests.hub_server import serve
from tests.test_streaming import PAIR, SHARED, assert_same, view

REPO = "ada/doors"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with serve(tmp_path / "hub") as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
        HfFileSystem.clear_instance_cache()
        yield server
        HfFileSystem.clear_instance_cache()


@pytest.fixture
def doors(hub) -> Path:
    return write_v3(hub.folder / REPO)


@pytest.mark.parametrize("write", [write_v2, write_v3], ids=["v2.1", "v3.0"])
def test_a_hub_dataset_streams_the_samples_of_a_local_one(hub, write):
    whole = WindowDataset(open_dataset(write(hub.folder / REPO)), PAIR, 4)
    streamed = StreamedDataset(open_stream(REPO), PAIR, 4, kept_episodes=2)
    for i in range(len(whole)):
        assert_same(streamed[i]._replace(source=""), whole[i]._replace(source=""))
    assert streamed[0].source == REPO
    snapshot = next(Path(constants.HF_HUB_CACHE).rglob("snapshots/*"))
    assert [path.name for path in snapshot.iterdir()] == ["meta"]  # nothing else is on disk


def test_workers_fetch_for_themselves(doors):
    streamed = StreamedDataset(open_stream(REPO), PAIR, 4, kept_episodes=2)
    assert streamed[0].episode_index == 0  # opened before the fork
    batches = RankBatches(order_of(streamed, 0), 4, workers=1)
    loader = build_loader(streamed, batches, lambda samples: {"at": [s.frame_index for s in samples]}, 1)
    assert sum(len(batch["at"]) for batch in loader) == sum(LENGTHS)


def gate(hub):
    hub.gated.add(REPO)


def hide(hub):
    hub.private.add("eve/doors")
    (hub.folder / "eve").mkdir()


def close(hub):
    constants.ENDPOINT = huggingface_hub.hf_api.api.endpoint = "http://127.0.0.1:9"


@pytest.mark.parametrize(
    ("change", "repo", "revision", "words"),
    [
        (gate, REPO, None, "it is gated"),
        (hide, "eve/doors", None, "no such dataset"),
        (lambda hub: None, "ada/windows", None, "no such dataset"),
        (close, REPO, None, "can't be reached"),
    ],
    ids=["gated", "private", "absent", "no_network"],
)
def test_what_cant_be_streamed_is_one_clear_error(hub, doors, monkeypatch, change, repo, revision, words):
    monkeypatch.setattr(constants, "ENDPOINT", constants.ENDPOINT)  # put back what `close` changes
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", huggingface_hub.hf_api.api.endpoint)
    change(hub)
    with pytest.raises(FileNotFoundError, match=words):
        open_stream(repo, revision)


def test_real_video_is_decoded_where_it_lies(hub):
    root = SHARED / "data/g1_inspire_v21_dev"
    if not root.is_dir():
        pytest.skip("the real samples aren't here")
    shutil.copytree(root, hub.folder / REPO, copy_function=shutil.copyfile)
    views = [view("cam_high"), view("cam_high", -8)]
    whole = WindowDataset(open_dataset(root), views, 8)
    streamed = StreamedDataset(open_stream(REPO), views, 8)
    for i in (5, len(whole) - 1):
        assert_same(streamed[i]._replace(source=""), whole[i]._replace(source=""))
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.mp4"))
