"""Where weights come from: a Hub id, a folder or a file, and the tensors in it, read one at a time.

Every failure is one error that says what was looked for, where, and how to get it.
"""

import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .checks import some

CONFIG = "config.json"

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class TensorFile(NamedTuple):
    """An open file of weights. Nothing is in memory until it is read."""

    path: Path
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], Tensor]
    """Name to tensor, in the file's dtype; it may share the file's memory."""


def is_hub_id(source: str) -> bool:
    """Return whether a source is meant for the Hub: nothing of that name is here, and it reads as user/name."""
    return not Path(source).expanduser().exists() and _HUB_ID.fullmatch(source) is not None


def find_folder(source: str) -> Path:
    """Return a folder, or where the files of a Hub repository are, downloaded if need be.

    Raises:
        FileNotFoundError: if the source is not there, or can't be reached; says how to get it.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if not is_hub_id(source):
        raise FileNotFoundError(f"{source}: no such folder here, nor a Hub id (user/name). Give one of the two.")
    with _said_plainly(source):
        return Path(snapshot_download(source))


def find_file(source: str, names: Sequence[str]) -> Path | None:
    """Return the first of some file names that a folder or a Hub repository has, downloaded if need be; None if none.

    Raises:
        FileNotFoundError: if the source itself is not there, or can't be reached; says how to get it.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return next((folder / name for name in names if (folder / name).is_file()), None)
    if not is_hub_id(source):
        raise FileNotFoundError(
            f"{source}: no such file or folder here, nor a Hub id (user/name). Give one of the three."
        )
    return _download_first(source, names)


def require_file(source: str, names: Sequence[str], what: str) -> Path:
    """Return the first of some file names as `find_file` does.

    Raises:
        FileNotFoundError: also if the source has none of them.
    """
    path = find_file(source, names)
    if path is None:
        raise FileNotFoundError(f"{source} has no {what}: looked for {', '.join(names)}.")
    return path


def read_config(source: str) -> dict[str, Any]:
    """Read the config.json of a folder, of a Hub repository or beside a file; {} where there is none.

    Raises:
        ValueError: if it isn't a JSON object.
    """
    path = Path(source).expanduser()
    found = find_file(str(path.parent) if path.is_file() else source, [CONFIG])
    if found is None:
        return {}
    try:
        config = json.loads(found.read_text())
    except ValueError as error:
        raise ValueError(f"{found} can't be read as JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{found} must hold one JSON object; it holds a {type(config).__name__}.")
    return config


def open_tensors(path: Path) -> TensorFile:
    """Open a .safetensors file, or a torch checkpoint that holds tensors and nothing else.

    Raises:
        ValueError: if the file is damaged, or holds more than tensors by name.
    """
    return _open_safetensors(path) if path.suffix == ".safetensors" else _open_torch(path)


def _download_first(repo: str, names: Sequence[str]) -> Path | None:
    for name in names:
        try:
            with _said_plainly(repo):
                return Path(hf_hub_download(repo, name))
        except EntryNotFoundError:
            continue
    return None


@contextmanager
def _said_plainly(repo: str) -> Iterator[None]:
    """Turn each way in which a download fails into one that says what to do; a file that isn't there stays what it is."""
    try:
        yield
    except LocalEntryNotFoundError as error:
        reason = "isn't a folder here, isn't downloaded yet, and the Hub can't be reached"
        raise _unavailable(repo, reason, _connect(repo)) from error
    except EntryNotFoundError:
        raise
    except GatedRepoError as error:
        raise _unavailable(repo, "is gated", _accept_licence(repo)) from error
    except RepositoryNotFoundError as error:
        hint = "Check the name; for a private repository, log in first: hf auth login."
        raise _unavailable(repo, "isn't a folder here, nor a repository that the Hub shows you", hint) from error
    except HfHubHTTPError as error:
        raise _unavailable(repo, f"could not be downloaded ({error})", "Try again later.") from error


def _unavailable(repo: str, reason: str, hint: str) -> FileNotFoundError:
    return FileNotFoundError(f"{repo} {reason}. {hint}")


def _connect(repo: str) -> str:
    return f"Connect and run `hf download {repo}` once, or give a folder that holds its files."


def _accept_licence(repo: str) -> str:
    return f"Accept its licence at https://huggingface.co/{repo}, then log in: hf auth login (or set HF_TOKEN)."


def _open_safetensors(path: Path) -> TensorFile:
    try:
        file = safe_open(path, "pt")
    except SafetensorError as error:
        raise _damaged(path, error) from None
    shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
    return TensorFile(path, shapes, file.get_tensor)


def _open_torch(path: Path) -> TensorFile:
    if not zipfile.is_zipfile(path):
        raise _damaged(path, "not a whole archive of torch.save, PyTorch 1.6 or later")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise _more_than_tensors(path, "Python objects, which could run code when they are opened") from None
    except RuntimeError as error:
        raise _damaged(path, error) from None
    if not isinstance(content, dict):
        raise _more_than_tensors(path, f"one {type(content).__name__}")
    others = [f"{name} ({type(value).__name__})" for name, value in content.items() if not torch.is_tensor(value)]
    if others:
        raise _more_than_tensors(path, some(others))
    return TensorFile(path, {name: tuple(tensor.shape) for name, tensor in content.items()}, content.__getitem__)


def _damaged(path: Path, reason: object) -> ValueError:
    first_line = str(reason).partition("\n")[0]
    return ValueError(
        f"{path} ({path.stat().st_size:,} bytes) can't be read as weights, it is cut short or damaged: {first_line}. "
        "Delete it and download it again; a clone wants `git lfs pull`."
    )


def _more_than_tensors(path: Path, found: str) -> ValueError:
    return ValueError(
        f"{path} must hold tensors by name and nothing else; it holds {found}. "
        "If you trust it, open it yourself and save its state dict with safetensors.torch.save_file."
    )
