import pickle
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest

from hf_vla.data.lerobot_format import open_dataset
from hf_vla.data.lerobot_writer import LeRobotWriter, image_feature, vector_feature
from hf_vla.data.video import PyAVReader
from hf_vla.data.windows import WindowDataset

SIZE, FPS, LENGTHS = 64, 10, (9, 14, 6)
RATE = 30
CODECS = {
    "h264": ("libx264", "yuv420p", {"crf": "18"}),
    "av1": ("libsvtav1", "yuv420p", {"crf": "30", "preset": "10"}),
    "mpeg4": ("mpeg4", "yuv420p", {"b": "2000000", "bf": "2"}),
    "h264_444": ("libx264", "yuv444p", {"crf": "18", "bf": "2"}),
}
"""Encoder, pixel format and options; `bf` are frames that are stored behind the one that is shown after them."""


def grey(episode, frame):
    """A level of its own for every frame, 7 apart, so that a lossy codec can't mistake one for another."""
    return (sum(LENGTHS[:episode]) + frame) * 7 + 20


@pytest.fixture(scope="module", params=["h264", "av1"])
def info(request, tmp_path_factory):
    """Three episodes, of which the video holds every frame one after the other in one file."""
    root = tmp_path_factory.mktemp("data") / request.param
    features = {
        "observation.images.top": image_feature(SIZE, SIZE, "video"),
        "observation.state": vector_feature(["a"]),
        "action": vector_feature(["a"]),
    }
    with LeRobotWriter(root, FPS, features, video_codec=request.param) as writer:
        for episode, length in enumerate(LENGTHS):
            numbers = np.arange(length, dtype=np.float32)[:, None]
            pictures = [np.full((SIZE, SIZE, 3), grey(episode, f), np.uint8) for f in range(length)]
            writer.add_episode(
                {"observation.images.top": pictures, "observation.state": numbers, "action": numbers}, task="look"
            )
        writer.finish()
    return open_dataset(root)


def open_windows(info, episodes=None):
    return WindowDataset(info, [SimpleNamespace(camera="top", offset=0)], 2, episodes)


def episode_and_frame(image):
    level = float(image.mean())
    return min(((e, f) for e, n in enumerate(LENGTHS) for f in range(n)), key=lambda ef: abs(grey(*ef) - level))


def test_a_shared_file_gives_each_episode_its_own_frames_in_any_order(info):
    assert len({span.file for episode in info.episodes for span in episode.videos.values()}) == 1
    dataset = open_windows(info)
    for i in [*range(len(dataset)), *np.random.default_rng(0).permutation(len(dataset))]:
        sample = dataset[int(i)]
        assert sample.images[0].shape == (SIZE, SIZE, 3)
        assert episode_and_frame(sample.images[0]) == (sample.episode_index, sample.frame_index)


class Counted:
    """A container that counts the frames it decodes."""

    def __init__(self, container):
        self._container, self.decoded = container, 0

    def seek(self, *place, **options):
        self._container.seek(*place, **options)

    def decode(self, stream):
        for frame in self._container.decode(stream):
            self.decoded += 1
            yield frame


def test_a_frame_is_decoded_from_its_keyframe_on_and_no_further(info):
    dataset = open_windows(info)
    dataset[0]
    reader = next(iter(dataset._frames["top"]._readers.values()))
    reader._container = Counted(reader._container)
    far_apart = [20, 0, 13, 28, 7, 21, 1]
    for i in far_apart:
        before = reader._container.decoded
        dataset[i]
        assert reader._container.decoded - before == 1 + i % 2, "a keyframe every 2 frames"


def test_frames_that_follow_are_decoded_once(info):
    dataset = open_windows(info)
    dataset[0]
    reader = next(iter(dataset._frames["top"]._readers.values()))
    reader._container = Counted(reader._container)
    for i in [10, 11, 12, 13, 13]:
        dataset[i]
    assert reader._container.decoded == 4


def test_an_open_file_is_not_pickled(info):
    dataset = open_windows(info)
    dataset[5]
    copy = pickle.loads(pickle.dumps(dataset))
    np.testing.assert_array_equal(copy[20].images[0], dataset[20].images[0])


def test_a_video_that_ends_too_early_names_file_episode_and_time(info, monkeypatch):
    dataset = open_windows(info, episodes=[2])
    frames = dataset._frames["top"]
    monkeypatch.setattr(frames, "_timestamps", frames._timestamps + 1.0)
    with pytest.raises(ValueError, match=r"file-000\.mp4: no picture for episode 2, frame 4, at 3\.700 s"):
        dataset[4]


def test_a_cut_video_names_its_file(info, tmp_path, monkeypatch):
    span = next(iter(info.episodes[0].videos.values()))
    broken = tmp_path / span.file
    broken.parent.mkdir(parents=True)
    broken.write_bytes((info.root / span.file).read_bytes()[:200])
    dataset = open_windows(info)
    monkeypatch.setattr(dataset._frames["top"], "_root", tmp_path)
    with pytest.raises(ValueError, match=r"file-000\.mp4: no picture for episode 0"):
        dataset[0]


def encode(path: Path, codec: str, places=range(40)) -> Path:
    """Write a video of noise that drifts, whose frames are shown at these places, in 30ths of a second."""
    encoder, pixel_format, options = CODECS[codec]
    noise = np.random.default_rng(0).integers(0, 256, (SIZE // 8, SIZE // 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(encoder, rate=RATE, options=options)
        stream.width, stream.height, stream.pix_fmt = SIZE, SIZE, pixel_format
        stream.codec_context.time_base = Fraction(1, 2 * RATE)
        stream.codec_context.gop_size = 12
        for k, place in enumerate(places):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(np.roll(noise, 3 * k, 1)), format="rgb24")
            frame.pts, frame.time_base = round(2 * place), Fraction(1, 2 * RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("codec", CODECS)
def test_frames_are_found_however_they_are_encoded(tmp_path, codec):
    path = encode(tmp_path / "video.mp4", codec)
    with av.open(str(path)) as container:
        shown = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    reader = PyAVReader(path, 1 / RATE)
    for k in [*range(40), *np.random.default_rng(0).permutation(40)]:
        assert np.array_equal(reader.at(k / RATE), shown[k])
    for seconds in (-1.0, -0.6 / RATE, 39.6 / RATE, 3.0):
        with pytest.raises(EOFError, match="none within half a frame"):
            reader.at(seconds)
