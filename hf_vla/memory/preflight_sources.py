"""The part of the checklist about what comes from elsewhere: weights and their licences, the dataset, packages."""

import importlib.metadata
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import auth_check, snapshot_download
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from packaging.requirements import Requirement

import hf_vla
from hf_vla.caching.use import find_caches, means_of
from hf_vla.data.loader import DrawnSamples
from hf_vla.data.mixture import build_datasets
from hf_vla.data.windows import WindowDataset
from hf_vla.memory.check import Check
from hf_vla.recipe import Recipe
from hf_vla.weights.decoder import lang_encoder_config
from hf_vla.weights.files import is_hub_id, open_tensors
from hf_vla.weights.tokenizer import TOKENIZER_FILES, load_tokenizer
from hf_vla.weights.vggt import vggt_config

LICENCES = {
    "vggt-1b-commercial": "VGGT licence: commercial use is allowed, military use isn't; gated",
    "vggt-1b": "CC BY-NC 4.0: non-commercial use only; VGGT-1B-Commercial has the same shapes and allows more",
    "llama-2": "Llama 2 Community License; gated, accept it once on the Hub",
}
"""By a part of the source's name, the longer first. Source: the repositories' model cards."""
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
"""Of a decoder, each whole or in the shards that NAME.index.json lists."""
DISTRIBUTION = "hf-vla"
CONSTRAINTS = Path(hf_vla.__file__).parent.parent / "constraints.txt"


def check_caches(recipe: Recipe, dataset: WindowDataset | None) -> tuple[list[Check], list[str]]:
    """Look whether the caches that the recipe may use are there.

    Returns:
        A check for each backbone that `memory.cache` names, and the backbones that needn't be loaded.
    """
    title, names = "Cache", recipe.memory.cache
    if not names or dataset is None:
        return [], []
    try:
        found = find_caches(recipe, dataset, means_of(recipe, dataset))
    except (ValueError, OSError) as error:
        return [Check("fail", title, str(error), "Build it again, or take it out of memory.cache.")], []
    checks = [
        Check("ok", title, f"{name} isn't loaded, its outputs are read from {found[name].folder}")
        if name in found
        else Check("warn", title, f"none of {name}, so each step runs it", "`hf-vla cache RECIPE` builds it.")
        for name in names
    ]
    return checks, list(found)


def check_weights(recipe: Recipe, cached: Sequence[str] = ()) -> list[Check]:
    """Look whether weights and tokenizer are here or can be fetched, and name their licences.

    Args:
        recipe: the run.
        cached: backbones that aren't loaded.
    """
    model = recipe.model
    openers = {"vggt": vggt_config, "lang_encoder": _open_decoder}
    titles = {"vggt": "Weights of VGGT", "lang_encoder": "Weights of the language encoder"}
    checks = [
        Check("ok", titles[part], "not loaded: its outputs come from the cache")
        if part in cached
        else check_source(titles[part], getattr(model, part), openers[part])
        for part in openers
    ]
    return [*checks, check_source("Tokenizer", model.tokenizer or model.lang_encoder, _open_tokenizer)]


def check_source(title: str, source: str | dict[str, Any], opener: Callable[[str], Any]) -> Check:
    """Look whether a source of weights is usable, in this order: folder or file, the Hub's cache, the Hub.

    Args:
        title: of the check.
        source: as the recipe has it.
        opener: opens what is at a path as far as needed to know that it is whole; raises ValueError or OSError if not.
    """
    if isinstance(source, dict):
        return Check("ok", title, "made here, from the recipe's own config")
    named = f"{source} ({_licence(source)})"
    path = _find_here(source)
    if path is not None:
        try:
            opener(str(path))
            return Check("ok", title, f"{named}: here")
        except (ValueError, OSError) as error:
            if not is_hub_id(source):
                return Check("fail", title, str(error), "Fetch the missing or damaged files again.")
    if is_hub_id(source):
        return _check_hub(title, source, named)
    return Check(
        "fail", title, f"{source}: no such file or folder here, nor a Hub id (user/name)", "Give one of the three."
    )


def _licence(source: str) -> str:
    return next((text for name, text in LICENCES.items() if name in source.lower()), "its licence isn't known here")


def _find_here(source: str) -> Path | None:
    path = Path(source).expanduser()
    if path.exists() or not is_hub_id(source):
        return path if path.exists() else None
    try:
        return Path(snapshot_download(source, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def _check_hub(title: str, repo: str, named: str) -> Check:
    try:
        auth_check(repo)
    except GatedRepoError:
        advice = f"Accept its licence at https://huggingface.co/{repo}, then log in: hf auth login (or set HF_TOKEN)."
        return Check("fail", title, f"{named}: gated, and not open to you", advice)
    except RepositoryNotFoundError:
        advice = "Check the name; for a private repository, log in first: hf auth login."
        return Check("fail", title, f"{repo}: not here, nor a repository that the Hub shows you", advice)
    except Exception as error:  # without a network, the Hub's client lets through errors of its HTTP library
        detail = f"{named}: not whole in the Hub's cache, and the Hub can't be reached ({type(error).__name__})"
        advice = f"Connect and run `hf download {repo}` once, or give a folder that holds its files."
        return Check("fail", title, detail, advice)
    return Check("ok", title, f"{named}: on the Hub and open to you; it is downloaded at the start")


def _open_decoder(folder: str) -> None:
    lang_encoder_config(folder)
    for name in WEIGHT_FILES:
        index = Path(folder, f"{name}.index.json")
        shards = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {name}
        missing = sorted(shard for shard in shards if not Path(folder, shard).is_file())
        if not missing:
            # Only these: of the others transformers reads more kinds than `open_tensors` does.
            for shard in sorted(shard for shard in shards if shard.endswith(".safetensors")):
                open_tensors(Path(folder, shard))
            return
        if index.is_file():
            raise FileNotFoundError(f"{folder} lacks {len(missing)} of {len(shards)} files of weights: {missing[0]} …")
    raise FileNotFoundError(f"{folder} has no weights: looked for {', '.join(WEIGHT_FILES)}, whole or in shards.")


def _open_tokenizer(folder: str) -> None:
    if not any(Path(folder, name).is_file() for name in TOKENIZER_FILES):
        raise FileNotFoundError(f"{folder} has no tokenizer: looked for {', '.join(TOKENIZER_FILES)}.")
    load_tokenizer(folder)


def open_data(recipe: Recipe) -> tuple[Check, WindowDataset | None]:
    """Open the recipe's dataset as training does, and decode its first and its last sample, or others if it may skip.

    Returns:
        The check, and the training set; None where it can't be used.
    """
    try:
        train, held_out = build_datasets(recipe.data, recipe.model.chunk_size, recipe.training["seed"])
    except (ValueError, OSError, ImportError) as error:
        return Check("fail", "Dataset", str(error)), None
    try:
        samples = DrawnSamples(train, recipe.data.on_error)
        (first, fault), (_, another) = samples[0], samples[len(train) - 1]
    except ImportError as error:
        return Check("fail", "Dataset", str(error)), None
    except (ValueError, OSError) as error:
        advice = "Fetch or record it again, or leave out what can't be read: data.on_error=skip."
        return Check("fail", "Dataset", str(error), advice if recipe.data.on_error == "raise" else ""), None
    info, size = train.info, recipe.data.image_size
    seen = zip(train.views, first.images, strict=True)
    pictures = ", ".join(f"{view.camera} {image.shape[1]}x{image.shape[0]}" for view, image in seen)
    detail = (
        f"{info.name}: {len(train)} samples to train on, {len(held_out or ())} held out, {info.fps:g} a second; "
        f"views {pictures}, resized to {size}x{size}; state of {info.state_dim}, action of {info.action_dim}"
    )
    if faults := [text for text in (fault, another, *info.left_out) if text]:
        return Check("warn", "Dataset", detail, f"Not all of it is used (data.on_error): {faults[0]}"), train
    if recipe.data.eval_fraction > 0 and held_out is None:
        return Check("warn", "Dataset", detail, "Nothing is held out, since there is one episode: record more."), train
    return Check("ok", "Dataset", detail), train


def check_versions(recipe: Recipe) -> Check:
    """Compare installed packages with what this package requires and with those that it was tested with."""
    title = "Packages"
    try:
        requirements = [Requirement(text) for text in importlib.metadata.requires(DISTRIBUTION) or ()]
    except importlib.metadata.PackageNotFoundError:
        return Check("warn", title, f"not compared: {DISTRIBUTION} isn't installed", "pip install -e .")
    extras = needed_extras(recipe)
    needed = [r for r in requirements if r.marker is None or any(r.marker.evaluate({"extra": e}) for e in extras)]
    wrong = [
        f"{r.name}{r.specifier} is wanted, {_installed(r.name) or 'none'} is here" for r in needed if not _is_met(r)
    ]
    if wrong:
        advice = f"pip install --upgrade -e '.[{','.join(extras)}]'" if extras else "pip install --upgrade -e ."
        return Check("fail", title, "; ".join(wrong), advice)
    names = {requirement.name for requirement in needed}
    other = [
        f"{p.name} {_installed(p.name)} (tested: {p.specifier})" for p in _pins() if p.name in names and not _is_met(p)
    ]
    if other:
        advice = "If something fails, install what was tested: `make install`."
        return Check("warn", title, f"other than tested: {', '.join(other)}", advice)
    return Check("ok", title, f"all {len(needed)} as required")


def needed_extras(recipe: Recipe) -> list[str]:
    """Name the optional sets of packages that a recipe wants."""
    optimizer = str(recipe.training.get("optim", ""))
    wanted = {
        "quant": recipe.model.quantization != "none" or "8bit" in optimizer or "bnb" in optimizer,
        "sim": recipe.evaluation.simulator != "none",
        "torchcodec": recipe.data.video_backend == "torchcodec",
    }
    return [name for name, is_wanted in wanted.items() if is_wanted]


def _pins() -> list[Requirement]:
    lines = CONSTRAINTS.read_text().splitlines() if CONSTRAINTS.is_file() else []
    return [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]


def _is_met(requirement: Requirement) -> bool:
    installed = _installed(requirement.name)
    return installed is not None and requirement.specifier.contains(installed, prereleases=True)


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
