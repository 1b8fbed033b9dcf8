"""The only reader of recipes: one JSON or YAML file that fully describes a run, as typed dataclasses.

Every key has a default, so that a six-line template is a recipe; an unknown key, a wrong type, or two answers to one
question is an error that names the key and the nearest one that exists.
"""

import dataclasses
import difflib
import json
import re
from collections.abc import Iterable
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
    views: list[View] | None = None
    """In order (view 0 is the reference frame), each a camera's name or a View; None takes the dataset's first two."""
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
    gpus: int | None = None
    """Processes, one a GPU, that the recipe is for; training refuses any other number. None takes what is launched."""


@_strict
class Evaluation:
    """How the trained policy is judged."""

    simulator: Literal["none", "metaworld"] = "none"
    tasks: list[str] = field(default_factory=list)
    episodes: int = 20
    """Rollouts of each task, each from a start position that training has not seen."""
    seed: int = 10_000
    """First start position; recording uses seeds below it."""
    image_size: int = 224
    field_of_view: dict[str, float] = field(default_factory=dict)
    action_repeat: int = 4
    """Of the simulator: how the demonstrations were recorded."""
    max_steps: int = 100
    """Actions after which a rollout counts as failed."""
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
        RecipeError: for a file that is missing or isn't JSON or YAML, an unknown section or key, a wrong type, or a
            contradiction.
    """
    path = Path(path)
    if not path.is_file():
        siblings = [p.name for p in path.parent.glob("*.json")]
        raise RecipeError(f"{path}: no such recipe file. {_suggest(path.name, siblings)}")
    try:
        raw = _parse(path)
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
    _check_geometry(recipe)
    _check_one_answer(recipe)
    return recipe


def _read_section(name: str, values: dict[str, Any]) -> Any:
    if name == "training":
        return _read_training(values)
    if name == "data" and isinstance(values.get("views"), list):
        values = {**values, "views": [{"camera": v} if isinstance(v, str) else v for v in values["views"]]}
    try:
        # pydantic's JSON mode: types are strict, but an object may stand for a section within the section.
        return TypeAdapter(_SECTIONS[name]).validate_json(json.dumps(values))
    except ValidationError as error:
        raise RecipeError(_explain(error.errors()[0], name)) from None


def _read_training(values: dict[str, Any]) -> dict[str, Any]:
    hints = {f.name: f.type for f in dataclasses.fields(TrainingArguments) if f.init}
    for key, value in values.items():
        if key == "per_device_train_batch_size":
            raise RecipeError("training.per_device_train_batch_size: data.batch_size is the one place for it.")
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


def _check_geometry(recipe: Recipe) -> None:
    """Refuse shapes that no model can have."""
    size, prompt = recipe.data.image_size, recipe.model.prompt
    if size % 14 or size < 14:
        low = max(14, size // 14 * 14)
        raise RecipeError(
            f"data.image_size is {size}, not a multiple of 14 (VGGT's patch). Nearest: {low} and {low + 14}."
        )
    if prompt.count("{task}") != 1:
        raise RecipeError(f"model.prompt must hold {{task}} exactly once; it is {prompt!r}.")


def _check_one_answer(recipe: Recipe) -> None:
    """Refuse two answers to one question."""
    model, training = recipe.model, recipe.training
    for part in recipe.lora.apply_to:
        if not getattr(model, f"freeze_{part}"):
            raise RecipeError(
                f"lora.apply_to names {part!r}, but model.freeze_{part} is false: train the one or the other."
            )
    if model.quantization != "none" and not model.freeze_lang_encoder:
        raise RecipeError(
            f"model.quantization is {model.quantization!r}, and quantised weights can't be trained: set "
            "model.freeze_lang_encoder to true (with lora.apply_to for QLoRA), or model.quantization to none."
        )
    if training.get("bf16") and training.get("fp16"):
        raise RecipeError("training.bf16 and training.fp16 are both true; bf16 is the default: set it false.")
    if model.fusion.align_weight and model.fusion.type != "prefix":
        raise RecipeError(
            "model.fusion.align_weight needs fusion.type prefix: there LLaMA has states at view positions."
        )


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
    """YAML 1.2's floats: PyYAML (YAML 1.1) reads 1e-4, as every learning rate is written, as text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _parse(path: Path) -> Any:
    text = path.read_text()
    return json.loads(text) if path.suffix == ".json" else yaml.load(text, _Loader) or {}


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
        cls = View if name == "views" else fields.get(name, cls)
    return [f.name for f in dataclasses.fields(cls)]


def _suggest(name: str, candidates: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.5)
    return f"Did you mean {near[0]!r}?" if near else f"Allowed: {', '.join(sorted(candidates))}."


_SECTIONS: dict[str, Any] = {f.name: f.type for f in dataclasses.fields(Recipe)}
