"""How a robot's recordings are to be read, as a YAML file: which columns are pictures, state, action and text, and what is
done to them on the way. `conventions/` holds those that are known; another file of that form is as good.

Letters: N steps of an episode, d dimensions of a piece.
"""

import dataclasses
import io
import json
from collections.abc import Callable
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from PIL import Image
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

from hf_vla.convert.episode import Column, RawEpisode
from hf_vla.convert.rotations import FROM_MATRIX, TO_MATRIX, convert_rotation
from hf_vla.sample import ACTION, IMAGES, STATE

KNOWN = Path(__file__).parent / "conventions"

_strict = pydantic_dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))

_OPEN, _CLOSED = 0.95, 0.05
"""Beyond these a gripper's command is decided; between them it is on its way."""


@_strict
class Piece:
    """Some dimensions of the state or the action: columns of one source, changed step by step."""

    source: str
    """Path of a column, as the source names it."""
    names: list[str]
    """Of the dimensions that come out."""
    columns: list[int] | None = None
    """Which of the source's numbers; None takes all."""
    rotation: list[str] | None = None
    """[given, wanted]: how the rotation is written, and how it shall be."""
    then: list[str] = field(default_factory=list)
    """Names out of `CHANGES`, done in this order, after `rotation`."""


@_strict
class Camera:
    """One camera: the column of its pictures, and how they have to be turned."""

    source: str
    rotate: Literal[0, 180] = 0
    """Degrees."""
    channels: Literal["rgb", "bgr"] = "rgb"
    """`bgr` where red and blue are exchanged when the picture is opened as it is."""


@_strict
class Convention:
    """How one kind of recording is read."""

    about: str
    fps: int
    """Steps a second, which neither RLDS nor HDF5 files say."""
    cameras: dict[str, Camera]
    """By the name that the camera will have."""
    state: list[Piece]
    action: list[Piece]
    task: list[str]
    """Where the instruction is looked for, in this order: a column, or a text of the episode."""
    robot_type: str | None = None
    drop_first: int = 0
    """Steps cut off the start: some recordings begin with a command that was never given."""
    drop_last: int = 0
    """Steps cut off the end: the last has no next state for an action to lead to."""


def load_convention(name: str) -> Convention:
    """Read a convention by the name of a known one, or from a YAML file.

    Raises:
        FileNotFoundError: where there is none of that name.
        ValueError: names file and key of what can't be read.
    """
    file = Path(name) if name.endswith((".yaml", ".yml")) else KNOWN / f"{name}.yaml"
    if not file.is_file():
        known = ", ".join(sorted(path.stem for path in KNOWN.glob("*.yaml")))
        raise FileNotFoundError(
            f"convention {name!r}: known are {known}; or give the path of a .yaml file of that form."
        )
    try:
        convention = TypeAdapter(Convention).validate_json(json.dumps(yaml.safe_load(file.read_text())))
    except (yaml.YAMLError, ValidationError) as error:
        raise ValueError(f"{file}: {_explain(error)}") from None
    for piece in [*convention.state, *convention.action]:
        _check(piece, file, convention)
    return convention


def read_columns(episode: RawEpisode, convention: Convention, encode: bool = True) -> dict[str, Column]:
    """Give an episode's pictures, state and action as `LeRobotWriter` takes them, without the steps that are dropped.

    Args:
        episode: as its file has it.
        convention: how it is read.
        encode: whether pictures that had to be changed, or came raw, are given as files; a video takes them raw.

    Raises:
        ValueError: for a column that isn't there or doesn't fit, lengths that differ, and numbers that aren't finite.
    """
    columns: dict[str, Column] = {
        f"{IMAGES}.{name}": _pictures(episode.read(camera.source), camera, encode)
        for name, camera in convention.cameras.items()
    }
    columns[STATE] = _vector(episode, convention.state)
    columns[ACTION] = _vector(episode, convention.action)
    lengths = {key: len(column) for key, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"its columns disagree in length: {lengths}")
    kept = slice(convention.drop_first, len(columns[ACTION]) - convention.drop_last)
    columns = {key: column[kept] for key, column in columns.items()}
    for key in (STATE, ACTION):
        rows = np.flatnonzero(~np.isfinite(columns[key]).all(1))
        if len(rows):
            raise ValueError(
                f"{key} isn't finite at {len(rows)} steps, first at step {rows[0] + convention.drop_first}"
            )
    return columns


def read_task(episode: RawEpisode, convention: Convention, otherwise: str | None = None) -> str:
    """Give an episode's instruction.

    Raises:
        ValueError: where it has none, and there is none to take instead.
    """
    for path in convention.task:
        text = episode.texts.get(path, "")
        if not text and path in episode.paths:
            text = episode.read(path)[0]
            text = text.decode(errors="replace") if isinstance(text, bytes) else str(text)
        if text.strip():
            return text.strip()
    if otherwise:
        return otherwise
    raise ValueError(f"has no instruction under {' or '.join(convention.task) or 'any path'}; give one with --task")


def names_of(pieces: list[Piece]) -> list[str]:
    """Name the dimensions of a state or an action."""
    return [name for piece in pieces for name in piece.names]


def _vector(episode: RawEpisode, pieces: list[Piece]) -> np.ndarray:
    return np.concatenate([_piece(episode, piece) for piece in pieces], axis=1)


def _piece(episode: RawEpisode, piece: Piece) -> np.ndarray:
    values = episode.read(piece.source)
    if isinstance(values, list) or values.ndim != 2:
        raise ValueError(f"{piece.source} isn't a vector a step")
    if piece.columns is not None:
        out = [column for column in piece.columns if not -values.shape[1] <= column < values.shape[1]]
        if out:
            raise ValueError(f"{piece.source} has {values.shape[1]} numbers a step, and the convention asks for {out}")
        values = values[:, piece.columns]
    values = values.astype(np.float32)
    if piece.rotation is not None:
        values = convert_rotation(values, *piece.rotation)
    for change in piece.then:
        values = CHANGES[change](values)
    if values.shape[1] != len(piece.names):
        raise ValueError(f"{piece.source} gives {values.shape[1]} numbers, and the convention names {piece.names}")
    return values


# What can be done to a piece, (N, d) to (N, d) ---------------------------------------------------------------------------


def settle(values: np.ndarray) -> np.ndarray:
    """Make a gripper's continuous command 0 or 1: what is between is where it is going, the next decided value.

    Source: the idea of Open X-Embodiment's `binarize_gripper_actions`; a tail that is never decided takes the nearer end.
    """
    decided = np.where(values > _OPEN, 1.0, np.where(values < _CLOSED, 0.0, np.nan)).astype(np.float32)
    coming = (values[-1] > (_OPEN + _CLOSED) / 2).astype(np.float32)
    for step in reversed(range(len(values))):
        coming = decided[step] = np.where(np.isnan(decided[step]), coming, decided[step])
    return decided


def _next_difference(values: np.ndarray) -> np.ndarray:
    last = np.full_like(values[:1], np.nan)  # so that a convention that keeps the last step is found out
    return np.concatenate([values[1:] - values[:-1], last])


CHANGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "clip_0_1": lambda values: np.clip(values, 0, 1),
    "invert_0_1": lambda values: 1 - values,
    "minus_1_1_to_0_1": lambda values: (values + 1) / 2,
    "negate": lambda values: -values,
    "settle": settle,
    "next_difference": _next_difference,
    "next_angle_difference": lambda values: (_next_difference(values) + np.pi) % (2 * np.pi) - np.pi,
}
"""`next_difference` relabels an action as what the state did next; the last step then has none and must be dropped."""


# Pictures ---------------------------------------------------------------------------------------------------------------


def _pictures(column: Column, camera: Camera, encode: bool) -> Column:
    """Turn pictures as the convention says; those that need nothing stay the very bytes they were."""
    if isinstance(column, list) and encode and camera.rotate == 0 and camera.channels == "rgb":
        return column
    pictures = [_turn(_open(picture, camera.source), camera) for picture in column]
    return [_jpeg(picture) for picture in pictures] if encode else pictures


def _open(picture: np.ndarray | bytes, source: str) -> np.ndarray:
    if not isinstance(picture, bytes):
        if picture.dtype != np.uint8 or picture.ndim != 3:
            raise ValueError(f"{source} isn't pictures (H, W, 3) of uint8, but {picture.dtype} {picture.shape}")
        return picture
    try:
        return np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))
    except OSError as error:
        raise ValueError(f"{source} has a picture that can't be decoded ({error})") from None


def _turn(picture: np.ndarray, camera: Camera) -> np.ndarray:
    turned = picture[::-1, ::-1] if camera.rotate == 180 else picture
    return np.ascontiguousarray(turned[..., ::-1] if camera.channels == "bgr" else turned)


def _jpeg(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "jpeg", quality=95, subsampling=0)
    return buffer.getvalue()


def _check(piece: Piece, file: Path, convention: Convention) -> None:
    for change in piece.then:
        if change not in CHANGES:
            raise ValueError(
                f"{file}: {piece.source}: no change is called {change!r}; there are {', '.join(CHANGES)}."
            )
        if change.startswith("next_") and not convention.drop_last:
            raise ValueError(
                f"{file}: {piece.source}: {change} leaves the last step without an action: set drop_last: 1."
            )
    rotation = piece.rotation
    if rotation is not None and (len(rotation) != 2 or rotation[0] not in TO_MATRIX or rotation[1] not in FROM_MATRIX):
        raise ValueError(
            f"{file}: {piece.source}: rotation is [given, wanted], given one of {', '.join(TO_MATRIX)}, wanted one of "
            f"{', '.join(FROM_MATRIX)}; not {rotation}."
        )


def _explain(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return f"can't be read as YAML: {error}"
    first: dict[str, Any] = dict(error.errors()[0])
    place = ".".join(str(part) for part in first["loc"])
    keys = ", ".join(f.name for f in dataclasses.fields(Convention))
    return f"{place or 'the file'}: {first['msg']}. A convention's keys are {keys}."
