"""torchcodec in PyAV's place: the same frame for every time, and the same errors; what it can't do is said at once."""

import os
import pickle
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hf_vla.caching.keys import view_key
from hf_vla.data.feature_cache import differences
from hf_vla.data.lerobot_format import open_dataset
from hf_vla.data.loader import RankBatches, build_loader
from hf_vla.data.mixture import build_datasets, order_of
from hf_vla.data.video import PyAVReader
from hf_vla.data.video_torchcodec import TorchcodecReader, load_decoder
from hf_vla.fingerprint import FileDigests
from hf_vla.recipe import make_recipe
from tests.test_lerobot_merge import write
from tests.test_lerobot_writer import make_episode
from tests.test_video import CODECS, RATE, SIZE, encode
from tests.tiny_run import released_weights, tiny_recipe

SHARED = Path(os.environ.get("HF_VLA_SHARED", Path(__file__).parents[2] / "shared"))
LEVELS = 1
"""Of 255, by which a colour may differ: FFmpeg's versions are free to round otherwise. With FFmpeg 5 none does."""
EPISODES = [(make_episode(length, seed, side=SIZE), "look") for seed, length in enumerate((5, 3, 4, 2))]


@pytest.fixture
def torchcodec():
    try:
        return load_decoder()
    except ImportError as error:
        pytest.skip(str(error))


def at_each(reader, times) -> list:
    """Give the picture at each time, and the error where there is none."""
    found = []
    for seconds in times:
        try:
            found.append(reader.at(seconds).astype(int))
        except EOFError as error:
            found.append(str(error))
    return found


def assert_alike(path: Path, times) -> list:
    theirs, ours = (at_each(reader(path, 1 / RATE), times) for reader in (TorchcodecReader, PyAVReader))
    for a, b in zip(theirs, ours, strict=True):
        assert type(a) is type(b)
        assert a == b if isinstance(b, str) else np.abs(a - b).max() <= LEVELS
    return ours


@pytest.mark.parametrize("codec", CODECS)
def test_every_frame_is_pyav_s_in_any_order(torchcodec, tmp_path, codec):
    path = encode(tmp_path / "video.mp4", codec)
    places = [*range(40), *np.random.default_rng(0).permutation(40)]
    pictures = assert_alike(path, [place / RATE for place in places])
    assert len({picture.tobytes() for picture in pictures}) == 40, "neighbours can be told apart"


@pytest.mark.parametrize("codec", ["h264", "mpeg4"])
def test_frames_at_odd_times_are_chosen_alike(torchcodec, tmp_path, codec):
    late, dense = [*range(10), *range(14, 20)], [*range(20, 24), 24.5, 25, 25.5, 27]
    path = encode(tmp_path / "video.mp4", codec, [*late, *dense])
    times = np.random.default_rng(0).uniform(-0.1, 28 / RATE, 300)
    found = assert_alike(path, times)
    gaps = [answer for answer in found if isinstance(answer, str)]
    assert 20 < len(gaps) < 280 and set(gaps) == {"the video has none within half a frame of it"}


def test_a_real_robot_s_video_gives_the_same_pictures(torchcodec):
    root = SHARED / "data/g1_inspire_v21_dev"
    if not root.is_dir():
        pytest.skip("the real samples aren't here")
    for path in sorted(root.rglob("*.mp4")):
        assert all(isinstance(p, np.ndarray) for p in assert_alike(path, [k / RATE for k in (220, 0, 100, 101, 7)]))


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "videos", EPISODES, "video", side=SIZE)


def samples_of(root: Path, **keys):
    return build_datasets(make_recipe({"data": {"dataset": str(root), "eval_fraction": 0, **keys}}).data, 2, 0)[0]


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "streamed"])
def test_a_recipe_chooses_it_and_workers_read_with_it(torchcodec, videos, streaming):
    plain = samples_of(videos)
    dataset = samples_of(videos, streaming=streaming, video_backend="torchcodec")
    dataset[3]
    dataset = pickle.loads(pickle.dumps(dataset))
    batches = RankBatches(order_of(dataset, 0), 4, workers=2)
    loader = build_loader(dataset, batches, lambda samples: {"samples": samples}, 2)
    seen = [sample for batch in loader for sample in batch["samples"]]
    assert len(seen) == len(plain)
    expected = {
        (s.episode_index, s.frame_index): s.images[0].astype(int) for s in map(plain.__getitem__, range(len(plain)))
    }
    for sample in seen:
        assert np.abs(sample.images[0] - expected[sample.episode_index, sample.frame_index]).max() <= LEVELS


@pytest.mark.parametrize("backend", ["pyav", "torchcodec"])
@pytest.mark.parametrize("kept", [200, 0.5, 0.9])
def test_a_cut_file_is_named_whoever_reads_it(request, videos, tmp_path, backend, kept):
    if backend == "torchcodec":
        request.getfixturevalue("torchcodec")
    dataset = samples_of(videos, video_backend=backend)
    [file] = {span.file for episode in dataset.episodes for span in episode.videos.values()}
    whole = (videos / file).read_bytes()
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_bytes(whole[: kept if kept > 1 else int(kept * len(whole))])
    dataset._frames["front"]._root = tmp_path
    with pytest.raises(ValueError, match=r"file-000\.mp4: no picture for episode 3, frame 1, at 1\.300 s: "):
        dataset[len(dataset) - 1]


def test_what_is_not_installed_is_said_at_once(videos, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    with pytest.raises(
        ImportError, match=r"isn't installed: pip install 'hf-vla\[torchcodec\]', or leave it at 'pyav'"
    ):
        samples_of(videos, video_backend="torchcodec")


@pytest.fixture
def without_ffmpeg(tmp_path, monkeypatch):
    """Put a torchcodec in front that finds no FFmpeg, as it says so."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchcodec"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "torchcodec").mkdir()
    said = "Could not load libtorchcodec. Likely causes:\\n 1. FFmpeg is not properly installed"
    (tmp_path / "torchcodec/__init__.py").write_text(f'raise RuntimeError("{said}")\n')
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "streamed"])
def test_what_cannot_be_loaded_ends_the_run_also_where_faults_are_skipped(videos, without_ffmpeg, streaming):
    with pytest.raises(
        ImportError, match=r"can't be loaded \(Could not load libtorchcodec\. Likely causes:\)\. It needs FFmpeg"
    ):
        samples = samples_of(videos, streaming=streaming, video_backend="torchcodec", on_error="skip")
        list(build_loader(samples, RankBatches(order_of(samples, 0), 4), list, on_error="skip"))


def test_a_cache_of_video_knows_what_decoded_it_and_one_of_pictures_does_not_care(videos, tmp_path):
    digests, weights = FileDigests(tmp_path / "digests.json"), released_weights(tmp_path)
    embedded = write(tmp_path / "embedded", EPISODES, side=SIZE)
    for root, expected in ((videos, ['video_backend is "pyav" there and "torchcodec" here']), (embedded, [])):
        recipe = tiny_recipe(model=weights, data={"dataset": str(root), "views": ["front"]})
        other = replace(recipe, data=replace(recipe.data, video_backend="torchcodec"))
        dataset, _ = build_datasets(recipe.data, 4, 0)
        assert dataset.info.video_backend == open_dataset(root).video_backend == "pyav"
        keys = [view_key(given, dataset, None, digests) for given in (recipe, other)]
        assert differences(*keys) == expected
