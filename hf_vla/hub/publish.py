"""Publish a run: its checkpoint, its recipe, what was measured, and a card that says all three to whoever finds it."""

import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

from hf_vla import run
from hf_vla.checkpoint import WHOLE, check_files
from hf_vla.hub.card import backbones, model_card
from hf_vla.merge import merge
from hf_vla.recipe import Recipe, load_recipe

CARD = "README.md"
REPORT = "report.html"
ADAPTER_CONFIG = "adapter_config.json"
CONTRADICTING = (".safetensors", ADAPTER_CONFIG)
"""Ends of names of files that must not outlive the checkpoint that they came with."""

PUBLISHED = (".safetensors", ".json", ".py", ".png", ".model", ".txt", ".jinja")
"""Ends of names of the files that make up a checkpoint: weights, configs, code, mean pictures, tokenizer. No pickles."""

logger = logging.getLogger(__name__)


def push(run_dir: Path, repo_id: str | None = None, private: bool | None = None, merged: bool = False) -> str:
    """Push a finished run to the Hub in one commit, and return the repository's address.

    Args:
        run_dir: the run; its `model/` goes, with `run.json`, `report.html` and a model card.
        repo_id: user/name, made where it isn't there yet; None takes the recipe's.
        private: whether only you and those whom you let in may see it; None takes the recipe's.
        merged: push the whole model, adapters merged, in place of what training changed.

    Raises:
        FileNotFoundError: if the directory holds no finished run.
        PermissionError: if the Hub doesn't know you, or doesn't let you write there.
        ConnectionError: if the Hub can't be reached, or refuses for a reason of its own; the run is as it was.
        ValueError: for a name that isn't user/name, and for a repository that is public where a private one is wanted.
    """
    run.check_finished(run_dir)
    hub = load_recipe(run_dir / run.RECIPE).hub
    repo_id = repo_id or hub.repo_id
    private = hub.private if private is None else private
    if repo_id is None:
        raise ValueError("No repository is named: give user/name, or set hub.repo_id in the recipe.")
    if repo_id.count("/") != 1:
        raise ValueError(f"{repo_id!r} is no name of a repository: give it as user/name.")
    if not merged:
        return _send(run_dir, run_dir / run.MODEL, repo_id, private)
    with tempfile.TemporaryDirectory(prefix="merged-", dir=run_dir) as folder:
        merge(run_dir / run.MODEL, Path(folder))
        return _send(run_dir, Path(folder), repo_id, private)


def push_if_asked(run_dir: Path, recipe: Recipe) -> None:
    """Push a run that has just ended, if its recipe says so; a Hub that doesn't answer can't make it a failed one."""
    if not recipe.training.get("push_to_hub"):
        return
    try:
        address = push(run_dir)
    except (OSError, ValueError) as error:
        text = f"Not pushed: {error} The run itself is complete; push it later by `hf-vla push {run_dir}`."
        logger.warning(text)
        run.add_event(run_dir, run.read_info(run_dir)["steps"], "not_pushed", text)
    else:
        logger.info("Pushed to %s", address)


def _send(run_dir: Path, model_dir: Path, repo_id: str, private: bool) -> str:
    check_files(model_dir, model_dir)
    card = model_card(run_dir, model_dir, repo_id)
    if not (model_dir / WHOLE).is_file():
        _warn_of_local_weights(load_recipe(model_dir / run.RECIPE))
    paths = [path for path in sorted(model_dir.iterdir()) if path.name.endswith(PUBLISHED)]
    paths += [path for path in (run_dir / run.INFO, run_dir / REPORT) if path.is_file()]
    additions = [_addition(path, repo_id) for path in paths]
    additions.append(CommitOperationAdd(CARD, card.encode()))
    api = HfApi()
    with _said_plainly(repo_id):
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise ValueError(
                f"{repo_id} is there already and is public: push with --public, or make it private first."
            )
        deletions = _contradicting(api.list_repo_files(repo_id), {addition.path_in_repo for addition in additions})
        api.create_commit(repo_id, [*additions, *deletions], commit_message=f"Push {run_dir.resolve().name}")
    return str(address)


def _addition(path: Path, repo_id: str) -> CommitOperationAdd:
    """Send a file as it is, but let adapters be based on their own repository.

    AutoModel looks there for the model's code, which says what to open them with; of no base it says only that '' isn't one.
    """
    if path.name != ADAPTER_CONFIG:
        return CommitOperationAdd(path.name, path)
    config = json.loads(path.read_text()) | {"base_model_name_or_path": repo_id}
    return CommitOperationAdd(path.name, (json.dumps(config, indent=2) + "\n").encode())


def _warn_of_local_weights(recipe: Recipe) -> None:
    for part in backbones(recipe):
        if part.is_local:
            logger.warning(
                "model.%s is read from %s, which only this machine has: others can't open what is pushed now. Push "
                "the whole model with --merged, or train from a Hub id.",
                part.key,
                getattr(recipe.model, part.key),
            )


def _contradicting(there: list[str], new: set[str]) -> list[CommitOperationDelete]:
    """Delete weights of an earlier push of another kind: a whole model beside adapters would be opened in their place."""
    return [CommitOperationDelete(name) for name in there if name.endswith(CONTRADICTING) and name not in new]


@contextmanager
def _said_plainly(repo_id: str) -> Iterator[None]:
    """Turn each way in which the Hub refuses into one that says what to do."""
    try:
        yield
    except HfHubHTTPError as error:
        raise _refusal(repo_id, error) from error
    except (OfflineModeIsEnabled, HTTPError) as error:
        raise ConnectionError(f"The Hub can't be reached ({_first_line(error)}).") from error
    except RuntimeError as error:  # how huggingface_hub reports weights that broke off on their way
        raise ConnectionError(f"The upload to {repo_id} broke off ({_first_line(error)}).") from error


def _refusal(repo_id: str, error: HfHubHTTPError) -> OSError:
    status = error.response.status_code
    if status == 401:
        return PermissionError("The Hub doesn't know you: log in by `hf auth login`, or set HF_TOKEN.")
    if status == 403:
        return PermissionError(
            f"Your token may not write to {repo_id}: take one with the permission to write there, or another name."
        )
    return ConnectionError(f"The Hub refused with status {status}: {error.server_message or _first_line(error)}")


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
