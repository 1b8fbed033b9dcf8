"""Where a dataset lies: a local folder, or a repo of the Hugging Face Hub that is fetched into the Hub's cache."""

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


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
    if not _HUB_ID.fullmatch(str(source)):
        raise FileNotFoundError(
            f"data.dataset: there is no folder {str(source)!r}, and it isn't a Hub id (user/name). Give a LeRobot "
            "dataset's folder, or record one with data_scripts/record_metaworld.py."
        )
    return _fetch(str(source), revision)


def _fetch(repo_id: str, revision: str | None) -> Path:
    try:
        return Path(snapshot_download(repo_id, repo_type="dataset", revision=revision))
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
