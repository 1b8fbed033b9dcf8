"""Samples cut from a dataset: an observation's pictures and state, and the chunk of actions that follows it.

Letters: V views, T chunk length, S state dims, A action dims, n samples asked for.
"""

import difflib
from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np
from torch.utils.data import Dataset

from hf_vla.data import columns
from hf_vla.data.episode_faults import find_fault
from hf_vla.data.frames import CachedFrames, EmbeddedFrames, Frames
from hf_vla.data.lerobot_format import DatasetInfo, Episode
from hf_vla.data.order import Part
from hf_vla.sample import ACTION, STATE, Sample


class ViewLike(Protocol):
    """One image of the pair, as `hf_vla.recipe.View` has it."""

    camera: str
    offset: int | Literal["goal"]


class Window(NamedTuple):
    """Samples without their pictures."""

    state: np.ndarray
    """(n, S) float32."""
    actions: np.ndarray
    """(n, T, A) float32; past the end of the episode its last action is repeated."""
    action_is_pad: np.ndarray
    """(n, T) bool."""
    task: np.ndarray
    """(n,) the instructions."""


class WindowDataset(Dataset):
    """One sample for every frame of the chosen episodes; windows cross no episode.

    Numbers are held in memory, pictures are read and decoded when asked for. It can be pickled, and forked into workers.

    Args:
        info: the opened dataset.
        views: images of an observation, in the recipe's order; each has a `camera` and an `offset`: frames from now, 0 or
            less and clamped to the episode's start, or `goal`, the episode's last frame.
        chunk_size: actions of a sample, T.
        episodes: indices of the episodes to use; None takes all.
        cache_bytes: memory for decoded pictures, in each process that reads; 0 decodes each anew.

    Attributes:
        states: (n, S) float32, the state of every sample.
        actions: (n, A) float32, the first action of every sample.
        tasks: the instruction of every sample.

    Raises:
        ValueError: for an unknown camera or episode, an offset into the future, numbers that aren't finite, or an episode of
            another rate.
    """

    def __init__(
        self,
        info: DatasetInfo,
        views: Sequence[ViewLike],
        chunk_size: int,
        episodes: Sequence[int] | None = None,
        cache_bytes: int = 0,
    ):
        self.info = info
        self.views = [check_view(view, info) for view in views]
        self.chunk_size = chunk_size
        self.episodes = choose_episodes(info, episodes)
        self._ends = np.cumsum([episode.length for episode in self.episodes])
        self._starts = self._ends - [episode.length for episode in self.episodes]
        for episode in self.episodes:
            if fault := find_fault(info, episode):
                raise ValueError(fault)
        self.states = self._rows(STATE).astype(np.float32)
        self.actions = self._rows(ACTION).astype(np.float32)
        self.tasks = self._task_texts()
        cameras = {view.camera for view in self.views}
        self._frames = {name: open_frames(info, name, cache_bytes // len(cameras)) for name in cameras}

    @property
    def part(self) -> Part:
        """Say how its order is made: all samples are shuffled alike."""
        return Part(tuple(episode.length for episode in self.episodes))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, i: int) -> Sample:
        return self.without_pictures(i)._replace(images=self.pictures(i))

    def pictures(self, i: int) -> list[np.ndarray]:
        """Read the pictures of sample `i`: V views, each (H, W, 3) uint8 RGB."""
        episode, frame = self.locate(i)
        return [self._frames[view.camera].read(episode, _frame_of(view, frame, episode)) for view in self.views]

    def look(self, i: int) -> bytes:
        """Tell the pictures of sample `i` from those of others, without decoding them: the same digests, the same looks."""
        episode, frame = self.locate(i)
        return b"".join(self._frames[v.camera].look(episode, _frame_of(v, frame, episode)) for v in self.views)

    def without_pictures(self, i: int) -> Sample:
        """Give sample `i` without reading its pictures; its `images` are empty."""
        episode, frame = self.locate(i)
        window = self.windows([i])
        return Sample(
            images=[],
            state=window.state[0],
            actions=window.actions[0],
            action_is_pad=window.action_is_pad[0],
            task=self.tasks[i],
            episode_index=episode.index,
            frame_index=frame,
            source=self.info.name,
        )

    def locate(self, i: int) -> tuple[Episode, int]:
        """Say which episode sample `i` is from, and at which of its frames."""
        if not 0 <= i < len(self):
            raise IndexError(f"Sample {i} of {len(self)}.")
        position = int(np.searchsorted(self._ends, i, side="right"))
        return self.episodes[position], int(i - self._starts[position])

    def numbers(self) -> "WindowDataset":
        """Give the dataset itself, whose numbers are in memory; see `StreamedDataset.numbers`."""
        return self

    def windows(self, indices: Sequence[int]) -> Window:
        """Cut states and action chunks of many samples at once, without their pictures."""
        indices = np.asarray(indices)
        ends = self._ends[np.searchsorted(self._ends, indices, side="right")]
        wanted = indices[:, None] + np.arange(self.chunk_size)
        rows = np.minimum(wanted, ends[:, None] - 1)
        tasks = np.array([self.tasks[i] for i in indices], object)
        return Window(self.states[indices], self.actions[rows], wanted >= ends[:, None], tasks)

    def _rows(self, key: str) -> np.ndarray:
        """Read a column over the chosen episodes, one after the other, as (rows, D)."""
        return np.concatenate([columns.matrix(self.info.table, key, e.first_row, e.length) for e in self.episodes])

    def _task_texts(self) -> list[str]:
        if "task_index" not in self.info.table.column_names:
            return [e.tasks[0] for e in self.episodes for _ in range(e.length)]
        return [self.info.tasks[index] for index in self._rows("task_index")[:, 0].tolist()]


def check_view(view: ViewLike, info: DatasetInfo) -> ViewLike:
    """Refuse a view of a camera that isn't there, or of the future."""
    if view.camera not in info.cameras:
        near = difflib.get_close_matches(view.camera, info.cameras, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"data.views: {info.name} has no camera {view.camera!r}; it has {', '.join(info.cameras) or 'none'}.{hint}"
        )
    if view.offset != "goal" and view.offset > 0:
        raise ValueError(
            f"data.views: offset {view.offset} of camera {view.camera!r} lies in the future, which a policy can't see; "
            "give 0, a negative number of frames, or 'goal'."
        )
    return view


def choose_episodes(info: DatasetInfo, indices: Sequence[int] | None) -> list[Episode]:
    """Take the episodes of these indices, in their order; None takes all.

    Raises:
        ValueError: for one that isn't there, or none at all.
    """
    if indices is None:
        return list(info.episodes)
    by_index = {episode.index: episode for episode in info.episodes}
    absent = [index for index in indices if index not in by_index]
    if absent or not len(indices):
        raise ValueError(
            f"{info.name}: no episode {absent or 'was chosen'}; its {len(by_index)} episodes run from {min(by_index)} "
            f"to {max(by_index)}."
        )
    return [by_index[index] for index in indices]


def open_frames(info: DatasetInfo, camera: str, cache_bytes: int) -> Frames:
    """Open one camera, embedded or video, with memory for so many bytes of decoded pictures."""
    frames = _open_video(info, camera) if camera in info.episodes[0].videos else EmbeddedFrames(info, camera)
    return CachedFrames(frames, cache_bytes) if cache_bytes else frames


def _open_video(info: DatasetInfo, camera: str) -> Frames:
    try:
        from hf_vla.data.video import VideoFrames
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"Camera {camera!r} of {info.name} is stored as video, which PyAV reads: pip install 'hf-vla[video]'."
        ) from error
    return VideoFrames(info, camera)


def _frame_of(view: ViewLike, frame: int, episode: Episode) -> int:
    return episode.length - 1 if view.offset == "goal" else max(0, frame + view.offset)
