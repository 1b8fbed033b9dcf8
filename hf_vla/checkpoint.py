"""One checkpoint directory: what training changed, and all that is needed to build the rest again.

Weights that came from somewhere and stayed as they were are not written: the recipe names them. So a LoRA checkpoint is
PEFT's adapter files, `trained.safetensors` (fusion, head, and whatever else trained), `config.json`, the processor with its
statistics, and `recipe.json`; a model that trained in full is an ordinary `model.safetensors`, which `AutoModel` opens.
Either holds the model's code too, so that `AutoModel` can at least say what is the matter with the first.
"""

from pathlib import Path

import torch.distributed.checkpoint.state_dict as sharded
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.dynamic_module_utils import custom_object_save

from hf_vla import register_auto_classes
from hf_vla.assemble import build_model
from hf_vla.lora import ADAPTER, trained_names
from hf_vla.model.configuration_vla import VLAConfig
from hf_vla.model.modeling_vla import TRAINED, VLAForActionPrediction
from hf_vla.model.processing_vla import VLAProcessor
from hf_vla.recipe import Recipe, load_recipe
from hf_vla.weights.files import find_folder

RECIPE = "recipe.json"
WHOLE = "model.safetensors"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."  # PEFT writes keys as PeftModel has them, and reads nothing else


def save_checkpoint(
    model: VLAForActionPrediction,
    processor: VLAProcessor,
    recipe: Recipe,
    directory: str | Path,
    state: dict[str, Tensor] | None = None,
) -> None:
    """Write a checkpoint that `load_checkpoint` opens alone.

    Args:
        model: what was trained.
        processor, recipe: what goes with it.
        directory: to write into.
        state: its whole state, where it has only a shard of it itself.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state, kept = model.state_dict() if state is None else state, _kept_names(model, recipe)
    if kept == set(state) and None not in (model.model.vggt, model.model.lang_encoder):
        model.save_pretrained(directory, state_dict=state)
    else:
        custom_object_save(model, directory, config=model.config)
        model.config.save_pretrained(directory)
        save_file({name: state[name].contiguous() for name in kept}, directory / TRAINED, metadata={"format": "pt"})
    if recipe.lora.apply_to:
        _save_adapter(model, directory, state)
    processor.save_pretrained(directory)
    recipe.save(directory / RECIPE)


def load_checkpoint(source: str | Path) -> tuple[VLAForActionPrediction, VLAProcessor, Recipe]:
    """Open a checkpoint: build the recipe's model and lay what was trained over it.

    Args:
        source: a directory, or the Hub id of a repository that holds what such a directory holds.

    Raises:
        FileNotFoundError: if the source isn't there or is no checkpoint, saying what is missing.
        ValueError: if a file of weights is damaged, or holds other weights than the recipe's model.
    """
    directory = find_folder(str(source))
    check_files(directory, source)
    register_auto_classes()  # or transformers asks on the terminal whether to run the code that lies beside the weights
    recipe = load_recipe(directory / RECIPE)
    processor = VLAProcessor.from_pretrained(directory)
    try:
        return _load_model(recipe, directory), processor, recipe
    except SafetensorError as error:
        raise ValueError(f"{directory}: its weights are damaged ({error}). Copy or fetch it again.") from None


def check_files(directory: Path, source: str | Path) -> None:
    """Refuse a folder that lacks a file without which no checkpoint opens.

    Args:
        directory: the folder.
        source: what a person calls it.

    Raises:
        FileNotFoundError: naming the file.
    """
    weights = WHOLE if (directory / WHOLE).is_file() else TRAINED
    is_run = (directory / "model" / RECIPE).is_file()
    hint = f"Give {source}/model." if is_run else "A run writes its model anew by --resume."
    for name in (RECIPE, "config.json", "processor_config.json", weights):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{source} is no checkpoint of hf_vla: it has no {name}. {hint}")


def _load_model(recipe: Recipe, directory: Path) -> VLAForActionPrediction:
    if (directory / WHOLE).is_file():
        return VLAForActionPrediction.from_pretrained(directory)
    model = build_model(recipe, VLAConfig.from_pretrained(directory))
    load_trained(model, recipe, directory)
    return model


def load_trained(model: VLAForActionPrediction, recipe: Recipe, directory: str | Path) -> None:
    """Lay a checkpoint's weights over a model that was built from the same recipe.

    Raises:
        ValueError: if the checkpoint lacks a weight that it should hold, or holds one that the model has not.
    """
    directory = Path(directory)
    whole = directory / WHOLE
    saved = load_file(whole if whole.is_file() else directory / TRAINED)
    _check_same(_kept_names(model, recipe), set(saved), directory)
    _lay_over(model, saved)
    if recipe.lora.apply_to:
        _load_adapter(model, directory)


def _lay_over(model: VLAForActionPrediction, saved: dict[str, Tensor]) -> None:
    """Put saved tensors in their places; the rest is as the recipe's sources have it."""
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        options = sharded.StateDictOptions(full_state_dict=True, strict=False)
        sharded.set_model_state_dict(model, saved, options=options)
    else:
        model.load_state_dict(saved, strict=False)


def _kept_names(model: VLAForActionPrediction, recipe: Recipe) -> set[str]:
    """State that only this checkpoint can give back: what trained, and all of a backbone that did or that began random.

    All of it, since a backbone has weights that never move, and with those missing a whole model wouldn't be one.
    """
    own = [f"model.{part}." for part in ("vggt", "lang_encoder") if _is_own(recipe, part)]
    kept = ("model.fusion.", "head.", *own)
    trained = trained_names(model)
    return {n for n in model.state_dict() if (n in trained or n.startswith(kept)) and not _is_adapter(n)}


def _is_own(recipe: Recipe, part: str) -> bool:
    """Whether a backbone's weights are nowhere else; quantised random ones are where their seed is, in full precision."""
    if part == "lang_encoder" and recipe.model.quantization != "none":
        return False
    return isinstance(getattr(recipe.model, part), dict) or not getattr(recipe.model, f"freeze_{part}")


def _is_adapter(name: str) -> bool:
    return "lora_" in name


def _save_adapter(model: VLAForActionPrediction, directory: Path, state: dict[str, Tensor]) -> None:
    state = get_peft_model_state_dict(model, state, adapter_name=ADAPTER)
    state = {PEFT_PREFIX + name: tensor.contiguous() for name, tensor in state.items()}
    save_file(state, directory / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    model.peft_config[ADAPTER].save_pretrained(directory)


def _load_adapter(model: VLAForActionPrediction, directory: Path) -> None:
    saved = load_file(directory / ADAPTER_WEIGHTS)
    saved = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in saved.items()}
    _check_same(set(get_peft_model_state_dict(model, adapter_name=ADAPTER)), set(saved), directory)
    set_peft_model_state_dict(model, saved, ADAPTER)


def _check_same(expected: set[str], found: set[str], directory: Path) -> None:
    missing, unexpected = sorted(expected - found), sorted(found - expected)
    if missing or unexpected:
        raise ValueError(
            f"{directory} doesn't fit its recipe: {len(missing)} weights are missing {missing[:3]}, "
            f"{len(unexpected)} are unexpected {unexpected[:3]}. Was {RECIPE} or config.json edited?"
        )
