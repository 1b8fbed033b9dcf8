"""Where a dataset lies: a local folder, or a repo of the Hugging Face Hub that is fetched into the Hub's cache."""

import re
from pathlib import Path
from typing import BinaryIO, NamedTuple

from huggingface_hub import HfFileSystem, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class HubPath(NamedTuple):
    """A file or folder of a dataset that stays on the Hub: as much of `pathlib.Path` as reading it takes."""

    location: str
    """As `HfFileSystem` has it: `datasets/user/name@commit/…`."""

    def __truediv__(self, name: str) -> "HubPath":
        return HubPath(f"{self.location}/{name}")

    def __str__(self) -> str:
        return f"hf://{self.location}"

    def open(self, mode: str = "rb") -> BinaryIO:
        """Open the file; what is read of it is fetched, a block at a time."""
        return HfFileSystem().open(self.location, mode)  # one a process and thread, which fsspec sees to


def readable(file: Path | HubPath) -> str | BinaryIO:
    """Give what libraries read from: a local file's name, which they open and close themselves, or the Hub's file, open."""
    return str(file) if isinstance(file, Path) else file.open()


def list_files(root: Path | HubPath) -> set[str]:
    """Name the files of a dataset's `data/` and `videos/`, relative to its root."""
    if isinstance(root, HubPath):
        start = len(root.location) + 1
        return {name[start:] for name in HfFileSystem().find(root.location)}
    return {
        path.relative_to(root).as_posix() for folder in ("data", "videos") for path in (root / folder).rglob("*.*")
    }


def find_root(source: str | Path, revision: str | None = None) -> Path:
    """Return the folder that holds a dataset, fetching it from the Hub where `source` is a repo id.

    Args:
        source: local folder, or Hub id `user/name`; a folder of that name comes first.
        revision: branch, tag or commit of the Hub repo.

    Raises:
        FileNotFoundError: for a folder or repo that isn't there, is gated, or can't be reached.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    _check_hub_id(source)
    return _fetch(str(source), revision)


def find_stream(source: str | Path, revision: str | None = None) -> tuple[Path, Path | HubPath]:
    """Return the folder that holds a dataset's `meta/`, and where its data lies; of a Hub repo only `meta/` is fetched.

    Args:
        source: as `find_root` takes it.
        revision: branch, tag or commit of the Hub repo.

    Raises:
        FileNotFoundError: for a folder or repo that isn't there, is gated, or can't be reached.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder, folder
    _check_hub_id(source)
    meta = _fetch(str(source), revision, ["meta/*"])
    return meta, HubPath(f"datasets/{source}@{meta.name}")  # a snapshot's folder is named by its commit


def _check_hub_id(source: str | Path) -> None:
    if not _HUB_ID.fullmatch(str(source)):
        raise FileNotFoundError(
            f"data.dataset: there is no folder {str(source)!r}, and it isn't a Hub id (user/name). Give a LeRobot "
            "dataset's folder, or record one with data_scripts/record_metaworld.py."
        )


def _fetch(repo_id: str, revision: str | None, patterns: list[str] | None = None) -> Path:
    try:
        return Path(snapshot_download(repo_id, repo_type="dataset", revision=revision, allow_patterns=patterns))
    except GatedRepoError:
        reason = f"it is gated. Ask for access at https://huggingface.co/datasets/{repo_id}, then run `hf auth login`"
    except RepositoryNotFoundError:
        reason = "the Hub has no such dataset. Check the spelling; for a private one, run `hf auth login` first"
    except RevisionNotFoundError:
        reason = f"it has no revision {revision!r}. Leave data.revision out for the newest"
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = (
            f"the Hub can't be reached, and its cache here doesn't hold it ({type(error).__name__}). Fetch it where there "
            f"is a network with `hf download {repo_id} --repo-type dataset --local-dir DIR`, and give DIR as data.dataset"
        )
    raise FileNotFoundError(f"data.dataset: no local folder {repo_id!r}, and from the Hub: {reason}.")
