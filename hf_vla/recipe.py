"""The only reader of recipes: one JSON or YAML file that fully describes a run, as typed dataclasses.

Every key has a default, so that a six-line template is a recipe; an unknown key, a wrong type, or two answers to one question is an
error that names the key and the nearest one that exists.
"""

import dataclasses
import difflib
import json
import re
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from transformers import TrainingArguments

_strict = pydantic_dataclass(config=ConfigDict(extra="forbid", strict=True))


class RecipeError(ValueError):
    """A recipe that can't be read or run as it stands; the message says which key and what to do."""


@_strict
class About:
    """What a reader wants to know before running the recipe; nothing here changes the run."""

    purpose: str = ""
    command: str = ""
    hardware: str = ""
    predicted_peak_bytes: int | None = None
    measured_peak_bytes: int | None = None
    samples_per_second: float | None = None
    metric: dict[str, Any] | None = None
    date: str | None = None
    source: str | None = None
    not_supported: list[str] = field(default_factory=list)


@_strict
class Fusion:
    """Keys of `model.fusion`; meanings in `FusionConfig`."""

    type: Literal["cross_attention", "prefix", "gated"] = "cross_attention"
    hidden_size: int = 1024
    num_layers: int = 4
    num_heads: int = 16
    dropout: float = 0.0
    align_weight: float = 0.0
    align_layer: int | None = None


@_strict
class Head:
    """Keys of `model.head`; meanings in `HeadConfig`."""

    type: Literal["l1", "flow", "discrete"] = "l1"
    hidden_size: int = 1024
    num_layers: int = 2
    num_inference_steps: int = 10
    beta: list[float] = field(default_factory=lambda: [1.5, 1.0])
    num_bins: int = 256


@_strict
class Model:
    """The policy's parts: where their weights come from, what stays frozen, and their shapes."""

    vggt: str | dict[str, Any] = "facebook/VGGT-1B"
    """Hub id, folder or file of weights; or a dict of `VGGTConfig` keys for random weights."""
    lang_encoder: str | dict[str, Any] = "meta-llama/Llama-2-7b-hf"
    """Hub id or folder of weights; or a dict of the decoder's config keys for random weights."""
    tokenizer: str | None = None
    """Hub id or folder; None takes the language encoder's own, or a byte-level one where that has none."""
    freeze_vggt: bool = True
    freeze_lang_encoder: bool = True
    """Whether the backbone's own weights stay as they are; LoRA on a backbone wants them frozen."""
    quantization: Literal["none", "nf4", "int8"] = "none"
    """Of the language encoder's linear layers, through bitsandbytes."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of backbone weights. Fusion, head and adapters are float32; mixed precision is `training.bf16`."""
    fusion: Fusion = field(default_factory=Fusion)
    head: Head = field(default_factory=Head)
    prompt: str = "In: What action should the robot take to {task}?\nOut:"
    """Template around the instruction; holds `{task}` once."""
    vggt_layer: int = -1
    pool_grid: int = 8
    chunk_size: int = 16
    outputs: Literal["actions", "geometry"] = "actions"
    """`geometry` also builds VGGT's camera and depth heads, for the report."""


@_strict
class Lora:
    """Low-rank adapters, through PEFT; keys are named as `LoraConfig` names them."""

    apply_to: list[Literal["lang_encoder", "vggt"]] = field(default_factory=list)
    """Backbones that get adapters; none by default."""
    r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.05
    target_modules: str | list[str] = "all-linear"
    use_rslora: bool = False
    use_dora: bool = False


@_strict
class View:
    """One image of the pair."""

    camera: str
    offset: int | Literal["goal"] = 0
    """Frames from now (0 or less), or `goal`: the episode's last frame."""


@_strict
class Data:
    """Which demonstrations, and how samples are cut from them."""

    dataset: str | None = None
    """Folder or Hub id of a LeRobot dataset."""
    revision: str | None = None
    views: list[str | View] | None = None
    """Cameras in order (view 0 is the reference frame); None takes the dataset's first two."""
    batch_size: int = 8
    """Samples of one GPU in one forward; the only place for it."""
    image_size: int = 518
    """Side in pixels that pictures are resized to; a multiple of 14."""
    resize: Literal["crop", "pad", "stretch"] = "stretch"
    """How a picture that isn't square is made so."""
    center_images: bool = False
    """Subtract the mean training picture of each view; for fixed cameras and a VGGT trained from scratch."""
    pictures: Literal["seen", "mean"] = "seen"
    """`mean` replaces every picture by the mean one: the blind control."""
    normalization: Literal["mean_std", "min_max", "q01_q99"] = "q01_q99"
    eval_fraction: float = 0.1
    """Share of episodes held out, chosen by `training.seed`; at least one where it is above 0."""
    num_workers: int = 2


@_strict
class Memory:
    """The promise: what the run may use, and what it does when that is not enough."""

    budget: str | None = None
    """Bytes that the run may use on one GPU, as "28GiB"; None takes what is free, less 10 %."""


@_strict
class Evaluation:
    """How the trained policy is judged."""

    simulator: Literal["none", "metaworld"] = "none"
    tasks: list[str] = field(default_factory=list)
    episodes: int = 20
    """Rollouts of each task, each from a start position that training has not seen."""
    seed: int = 10_000
    """First start position; recording uses seeds below it."""
    n_action_steps: int = 8
    """Actions of a chunk that are carried out before the next look."""
    swapped: dict[str, str] = field(default_factory=dict)
    """Task to the task whose instruction it is given instead, to see whether the policy listens."""


@_strict
class Hub:
    """Where the run is pushed, if `training.push_to_hub` says so."""

    repo_id: str | None = None
    private: bool = True


TRAINING_DEFAULTS: dict[str, Any] = {
    "learning_rate": 2e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "max_steps": 10_000,
    "gradient_accumulation_steps": 1,
    "bf16": True,
    "save_steps": 1_000,
    "save_total_limit": 2,
    "logging_steps": 10,
    "seed": 0,
    "report_to": ["tensorboard"],
}
"""Where our defaults differ from `TrainingArguments`; every other field keeps the library's own."""


@dataclasses.dataclass
class Recipe:
    """One run, fully described. `training` holds fields of `transformers.TrainingArguments`."""

    about: About = field(default_factory=About)
    model: Model = field(default_factory=Model)
    lora: Lora = field(default_factory=Lora)
    data: Data = field(default_factory=Data)
    memory: Memory = field(default_factory=Memory)
    training: dict[str, Any] = field(default_factory=dict)
    evaluation: Evaluation = field(default_factory=Evaluation)
    hub: Hub = field(default_factory=Hub)

    def to_dict(self) -> dict[str, Any]:
        """Return the resolved recipe, every default written out, as JSON can hold it."""
        return dataclasses.asdict(self)

    def save(self, path: str | Path) -> None:
        """Write the resolved recipe; `load_recipe` of that file gives an equal one."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n")


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe file and apply `section.key=value` overrides, the value read as JSON or else as text.

    Raises:
        RecipeError: for a file that is missing or isn't JSON or YAML, an unknown section or key, a wrong type, or a contradiction.
    """
    path = Path(path)
    if not path.is_file():
        raise RecipeError(f"{path}: no such recipe file. {_nearest_text(path.name, _sibling_names(path))}".rstrip())
    try:
        raw = _parse(path)
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"{path}: neither JSON nor YAML can be read from it: {error}") from None
    if not isinstance(raw, dict):
        raise RecipeError(f"{path}: a recipe is one object with sections {', '.join(_SECTIONS)}; this is a {type(raw).__name__}.")
    for override in overrides or []:
        _apply_override(raw, override)
    return make_recipe(raw, where=str(path))


def make_recipe(raw: dict[str, Any], where: str = "recipe") -> Recipe:
    """Turn the sections of a recipe file into a checked Recipe.

    Raises:
        RecipeError: as `load_recipe`.
    """
    for name, value in raw.items():
        if name not in _SECTIONS:
            raise RecipeError(f"{where}: unknown section {name!r}. {_nearest_text(name, _SECTIONS)}")
        if not isinstance(value, dict):
            raise RecipeError(f"{where}: section {name!r} must be an object of keys, not {value!r}.")
    sections = {name: _read_section(name, raw.get(name, {}), where) for name in _SECTIONS}
    recipe = Recipe(**sections)
    _check_consistency(recipe, where)
    return recipe


def _read_section(name: str, values: dict[str, Any], where: str) -> Any:
    if name == "training":
        return _read_training(values, where)
    try:
        return TypeAdapter(_SECTIONS[name]).validate_python(values)
    except ValidationError as error:
        raise RecipeError(_explain(error, name, _SECTIONS[name], where)) from None


def _read_training(values: dict[str, Any], where: str) -> dict[str, Any]:
    hints = {f.name: f.type for f in dataclasses.fields(TrainingArguments) if f.init}
    for key, value in values.items():
        if key == "per_device_train_batch_size":
            raise RecipeError(f"{where}: training.{key} is set by data.batch_size, the one place for it; remove it here.")
        if key not in hints:
            raise RecipeError(f"{where}: unknown key training.{key}. {_nearest_text(key, hints)}")
        if not _fits(value, hints[key]):
            raise RecipeError(f"{where}: training.{key} must be {_readable(hints[key])}, not {value!r}.")
    return {**TRAINING_DEFAULTS, **values}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value can stand for a TrainingArguments field; enums there are written as strings."""
    try:
        TypeAdapter(hint, config=ConfigDict(strict=True, arbitrary_types_allowed=True)).validate_json(json.dumps(value))
    except ValidationError:
        return False
    return True


def _check_consistency(recipe: Recipe, where: str) -> None:
    """Refuse two answers to one question."""
    model, data, training = recipe.model, recipe.data, recipe.training
    if data.image_size % 14 or data.image_size < 14:
        low = max(14, data.image_size // 14 * 14)
        raise RecipeError(f"{where}: data.image_size must be a multiple of 14, VGGT's patch; {data.image_size} isn't. Nearest: {low} and {low + 14}.")
    if model.prompt.count("{task}") != 1:
        raise RecipeError(f"{where}: model.prompt must hold {{task}} exactly once; it is {model.prompt!r}.")
    for part in recipe.lora.apply_to:
        if not getattr(model, f"freeze_{part}"):
            raise RecipeError(f"{where}: lora.apply_to has {part!r}, but model.freeze_{part} is false: train adapters or the weights themselves, not both.")
    if model.quantization != "none" and not model.freeze_lang_encoder:
        raise RecipeError(
            f"{where}: model.quantization is {model.quantization!r}, and quantised weights can't be trained: set model.freeze_lang_encoder to true "
            "(with lora.apply_to for QLoRA), or model.quantization to none."
        )
    if training.get("bf16") and training.get("fp16"):
        raise RecipeError(f"{where}: training.bf16 and training.fp16 are both true; keep one (bf16 is the default, so fp16 needs bf16 false).")
    if model.fusion.align_weight and model.fusion.type != "prefix":
        raise RecipeError(f"{where}: model.fusion.align_weight aligns LLaMA's states at view positions, which only fusion.type prefix has.")


def _apply_override(raw: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    keys = name.split(".")
    if not equals or len(keys) < 2:
        raise RecipeError(f"--set {override}: expected section.key=value, as in --set data.batch_size=4.")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    node = raw
    for key in keys[:-1]:
        node = node.setdefault(key, {})
        if not isinstance(node, dict):
            raise RecipeError(f"--set {override}: {key!r} holds {node!r}, which has no keys.")
    node[keys[-1]] = value


class _Loader(yaml.SafeLoader):
    """YAML 1.2's floats: PyYAML reads 1e-4, as every learning rate is written, as text."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))


def _parse(path: Path) -> Any:
    text = path.read_text()
    return json.loads(text) if path.suffix == ".json" else yaml.load(text, _Loader) or {}


def _explain(error: ValidationError, section: str, cls: type, where: str) -> str:
    """Say a pydantic error in our words: file, section, key, given value, what is allowed."""
    first = error.errors()[0]
    location = [str(part) for part in first["loc"]]
    key = ".".join([section, *location])
    if first["type"] == "unexpected_keyword_argument":
        names = _fields_at(cls, location[:-1])
        return f"{where}: unknown key {key}. {_nearest_text(location[-1], names)}"
    if first["type"] == "missing":
        return f"{where}: {key} is missing."
    return f"{where}: {key} is {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}."


def _fields_at(cls: type, path: list[str]) -> list[str]:
    for name in path:
        inner = {f.name: f.type for f in dataclasses.fields(cls)}.get(name)
        cls = inner if dataclasses.is_dataclass(inner) else View
    return [f.name for f in dataclasses.fields(cls)]


def _nearest_text(name: str, candidates) -> str:
    near = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.5)
    return f"Did you mean {near[0]!r}?" if near else f"Allowed: {', '.join(sorted(candidates))}."


def _sibling_names(path: Path) -> list[str]:
    return [p.name for p in path.parent.glob("*.json")] if path.parent.is_dir() else []


def _readable(hint: Any) -> str:
    return getattr(hint, "__name__", str(hint)).replace("typing.", "")


_SECTIONS: dict[str, Any] = {f.name: f.type for f in dataclasses.fields(Recipe)}
