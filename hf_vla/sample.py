"""The contract between data, model and policy: key names, and what one sample and one batch hold.

Letters: B batch, V views (view 0 is VGGT's reference frame), H W pixels, P patches of a view, g grid side after
pooling, L text tokens, D LLaMA width, C VGGT width, T chunk length, A action dims, S state dims.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypedDict

import numpy as np

if TYPE_CHECKING:  # importing torch takes seconds, and whoever only converts recordings needs none of it
    import torch

# LeRobot's names. A camera's full key is IMAGES + "." + its name.
IMAGES = "observation.images"
STATE = "observation.state"
ACTION = "action"
TASK = "task"


GOAL = "goal"
"""The moment of a view that shows an episode's last frame."""


class ParsedView(NamedTuple):
    """One image of the pair: a camera, and a moment of it."""

    camera: str
    offset: int | str = 0
    """Frames from now, 0 or less; or `goal`."""


def view_name(camera: str, offset: int | str = 0) -> str:
    """Name a view by its camera and, where it isn't the present frame, the moment: `top`, `top@-5`, `top@goal`."""
    return camera if offset == 0 else f"{camera}@{offset}"


def parse_view(name: str) -> ParsedView:
    """Read what `view_name` wrote."""
    camera, _, moment = name.partition("@")
    return ParsedView(camera, moment if moment == GOAL else int(moment or 0))


class Sample(NamedTuple):
    """One observation and the chunk of actions that followed it, in the dataset's own physical units."""

    images: list[np.ndarray]
    """V views in the recipe's order, each (H, W, 3) uint8 RGB."""
    state: np.ndarray
    """(S,) float32."""
    actions: np.ndarray
    """(T, A) float32; past the end of the episode its last action is repeated."""
    action_is_pad: np.ndarray
    """(T,) bool; True where `actions` only repeats the last one."""
    task: str
    """The instruction, in natural language."""
    episode_index: int
    frame_index: int
    source: str
    """Name of the dataset that the sample comes from."""
    view_features: torch.Tensor | None = None
    """(V, g², 2C), from a cache; `images` is empty then."""
    text_features: torch.Tensor | None = None
    """(L, D), from a cache: the states of this instruction's own tokens, without padding."""


class Draw(NamedTuple):
    """Which sample, and in which epoch: what decides every random number of it, for datasets that want to know."""

    index: int
    epoch: int


class Batch(TypedDict, total=False):
    """What the model's forward takes. Either pixels or view features; either ids or text features."""

    pixel_values: torch.Tensor
    """(B, V, 3, H, W) uint8, as pictures are decoded; float32 about [0, 1] where the mean picture is subtracted."""
    view_features: torch.Tensor
    """(B, V, g², 2C): pooled VGGT tokens, as the cache stores them."""
    input_ids: torch.Tensor
    """(B, L) int64."""
    attention_mask: torch.Tensor
    """(B, L) int64; 1 where `input_ids` or `text_features` is text, 0 where it is padding."""
    text_features: torch.Tensor
    """(B, L, D): LLaMA's last hidden states, as the cache stores them."""
    state: torch.Tensor
    """(B, S) float32, normalised."""
    actions: torch.Tensor
    """(B, T, A) float32, normalised."""
    action_is_pad: torch.Tensor
    """(B, T) bool."""
