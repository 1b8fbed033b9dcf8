"""The only reader of recipes: JSON or YAML to checked sections, with one clear error a mistake."""

import dataclasses
import difflib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError
from transformers import TrainingArguments

from hf_vla.recipe.consistency import check_consistency
from hf_vla.recipe.sections import TRAINING_DEFAULTS, Mixed, Recipe, RecipeError, View

_ELSEWHERE = {
    "per_device_train_batch_size": "data.batch_size",
    "hub_model_id": "hub.repo_id",
    "hub_private_repo": "hub.private",
    "hub_token": "`hf auth login`, or HF_TOKEN (a recipe is saved with the run, and published),",
}
"""Fields of TrainingArguments that a recipe answers in another place."""


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe file and apply `section.key=value` overrides, the value read as JSON or else as text.

    Raises:
        RecipeError: for a file that is missing or isn't JSON or YAML, an unknown section or key, a wrong type, or a
            contradiction.
    """
    path = Path(path)
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.*")], n=1, cutoff=0.5)
        raise RecipeError(f"{path}: no such recipe file." + (f" Did you mean {near[0]!r}?" if near else ""))
    try:
        raw = _parse(path)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"{path}: neither JSON nor YAML can be read from it: {error}") from None
    if not isinstance(raw, dict):
        raise RecipeError(f"{path}: a recipe is one object with the sections {', '.join(_SECTIONS)}, not {raw!r}.")
    try:
        for override in overrides or []:
            _apply_override(raw, override)
        return make_recipe(raw)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None


def make_recipe(raw: dict[str, Any]) -> Recipe:
    """Turn the sections of a recipe into a checked Recipe.

    Raises:
        RecipeError: for an unknown section or key, a wrong type, or a contradiction.
    """
    for name, values in raw.items():
        if name not in _SECTIONS:
            raise RecipeError(f"unknown section {name!r}. {_suggest(name, _SECTIONS)}")
        if not isinstance(values, dict):
            raise RecipeError(f"section {name!r} must be an object of keys, not {values!r}.")
    recipe = Recipe(**{name: _read_section(name, raw.get(name, {})) for name in _SECTIONS})
    check_consistency(recipe)
    return recipe


def _read_section(name: str, values: dict[str, Any]) -> Any:
    if name == "training":
        return _read_training(values)
    if name == "data":
        values = _spell_out_views(values)
        if isinstance(values.get("mixture"), list):
            values["mixture"] = [_spell_out_views(m) if isinstance(m, dict) else m for m in values["mixture"]]
    try:
        # pydantic's JSON mode: types are strict, but an object may stand for a section within the section.
        return TypeAdapter(_SECTIONS[name]).validate_json(json.dumps(values))
    except ValidationError as error:
        raise RecipeError(_explain(error.errors()[0], name)) from None


def _spell_out_views(values: dict[str, Any]) -> dict[str, Any]:
    """Let a camera's name stand for a view."""
    if not isinstance(values.get("views"), list):
        return dict(values)
    return {**values, "views": [{"camera": v} if isinstance(v, str) else v for v in values["views"]]}


def _read_training(values: dict[str, Any]) -> dict[str, Any]:
    hints = {f.name: f.type for f in dataclasses.fields(TrainingArguments) if f.init}
    hints["fsdp"] = bool | str | None  # declared a string for the command line alone; transformers asks for true
    for key, value in values.items():
        if key in _ELSEWHERE:
            raise RecipeError(f"training.{key}: {_ELSEWHERE[key]} is the one place for it.")
        if key not in hints:
            raise RecipeError(f"unknown key training.{key}. {_suggest(key, hints)}")
        if not _fits(value, hints[key]):
            wanted = getattr(hints[key], "__name__", str(hints[key]))
            raise RecipeError(f"training.{key} is {value!r}; it must be of type {wanted}.")
    return {**TRAINING_DEFAULTS, **values}


def _fits(value: Any, hint: Any) -> bool:
    try:
        TypeAdapter(hint, config=ConfigDict(strict=True)).validate_json(json.dumps(value))
    except ValidationError:
        return False
    return True


def _apply_override(raw: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    *path, key = name.split(".")
    if not equals or not path:
        raise RecipeError(f"--set {override}: expected section.key=value, as in --set data.batch_size=4.")
    node = raw
    for part in path:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise RecipeError(f"--set {override}: {part!r} holds {node!r}, which has no keys.")
    try:
        node[key] = json.loads(text)
    except json.JSONDecodeError:
        node[key] = text


class _Loader(yaml.SafeLoader):
    """YAML 1.2's floats: PyYAML (YAML 1.1) reads 1e-4, as every learning rate is written, as text. And no key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """Make a mapping of keys that are each given once."""
        _check_repeats(key.value for key, _ in node.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _parse(path: Path) -> Any:
    text = path.read_text()
    if path.suffix == ".json":
        return json.loads(text, object_pairs_hook=_read_pairs)
    return yaml.load(text, _Loader) or {}


def _read_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _check_repeats(key for key, _ in pairs)
    return dict(pairs)


def _check_repeats(keys: Iterable[str]) -> None:
    """Refuse a key that is there twice, of which both parsers would take the last and say nothing."""
    seen: set[str] = set()
    for key in keys:
        if key in seen:
            raise RecipeError(f"{key!r} is there twice: put the two into one, or take one out.")
        seen.add(key)


def _explain(error: dict[str, Any], section: str) -> str:
    """Say one of pydantic's errors in our words: the key, what it was given, what is allowed."""
    location = [str(part) for part in error["loc"]]
    key = ".".join([section, *location])
    if error["type"] == "unexpected_keyword_argument":
        return f"unknown key {key}. {_suggest(location[-1], _keys_at(section, location[:-1]))}"
    if error["type"] == "missing_argument":
        return f"{key} is missing."
    return f"{key} is {error['input']!r}: {error['msg'][0].lower()}{error['msg'][1:]}."


def _keys_at(section: str, path: list[str]) -> list[str]:
    cls = _SECTIONS[section]
    for name in path:
        fields = {f.name: f.type for f in dataclasses.fields(cls)}
        cls = _ITEMS.get(name) or fields.get(name, cls)
    return [f.name for f in dataclasses.fields(cls)]


def _suggest(name: str, candidates: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.5)
    return f"Did you mean {near[0]!r}?" if near else f"Allowed: {', '.join(sorted(candidates))}."


_ITEMS = {"views": View, "mixture": Mixed}
"""Keys that hold lists, and of what."""
_SECTIONS: dict[str, Any] = {f.name: f.type for f in dataclasses.fields(Recipe)}
