"""The one way from raw observations to the model's inputs, and from its outputs back; training and acting share it.

Letters: B batch, V views, H W pixels, L text tokens, T chunk, A action dims, S state dims.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import ProcessorMixin
from transformers.utils import cached_file

from .image_processing_vla import resize_view, stack_views
from .modeling_vggt import to_unit
from .normalization import MODES, Stats, normalize, unnormalize

VIEW_MEANS = "view_means.png"
"""File of the mean pictures, one below the other."""

NEUTRAL = (0.485, 0.456, 0.406)
"""The colour in [0, 1] that VGGT's own standardisation maps to 0."""

HUB_OPTIONS = ("cache_dir", "revision", "token", "local_files_only", "subfolder")
"""What says where a file of the Hub is found, among the arguments of `from_pretrained`."""

STATE, ACTION = "observation.state", "action"


class VLAProcessor(ProcessorMixin):
    """Turn pictures, instruction, state and actions into a batch, and predicted actions into physical ones.

    Args:
        tokenizer: of the language backbone; where it has no padding token it is given its end-of-text one.
        views: name of each view in the model's order; view 0 is VGGT's reference frame.
        stats: per key (`observation.state`, `action`) the dataset's statistics, as its `stats.json` has them; for a policy
            of several datasets, that by each one's name.
        image_size: side in pixels that pictures are resized to.
        resize: `crop`, `pad` or `stretch`: how a picture that isn't square is made so.
        normalization: of state and actions: `mean_std`, `min_max` or `q01_q99`.
        prompt: template around the instruction; holds `{task}` once.
        view_means: (V, H, W, 3) uint8, the mean training picture of each view.
        center_images: subtract the mean picture, so that it becomes the colour that VGGT takes for 0.
        action_form: `recorded`: actions are learned as they are; or `relative`: as changes from the state that was observed,
            for those that command positions in the state's own dimensions. Either way they come back as recorded.
        pictures: `seen`, or `mean` to show the mean picture in place of every picture: the blind control.

    Raises:
        ValueError: for missing statistics or mean pictures, and for unknown options.
    """

    _auto_class = "AutoProcessor"

    def __init__(
        self,
        tokenizer,
        views: Sequence[str] = (),
        stats: dict | None = None,
        image_size: int = 518,
        resize: str = "stretch",
        normalization: str = "q01_q99",
        prompt: str = "In: What action should the robot take to {task}?\nOut:",
        view_means: np.ndarray | None = None,
        center_images: bool = False,
        pictures: str = "seen",
        action_form: str = "recorded",
    ):
        super().__init__(tokenizer)
        self.views = list(views)
        self.image_size = image_size
        self.resize = resize
        self.normalization = _check_choice("normalization", normalization, MODES)
        self.prompt = prompt
        self.center_images = center_images
        self.pictures = _check_choice("pictures", pictures, ("seen", "mean"))
        self.view_means = view_means
        self._stats = _read_stats(stats)
        self.action_form = _check_choice("action_form", action_form, ("recorded", "relative"))
        self._check_action_form()
        own = {name: {key: value.to_dict() for key, value in of.items()} for name, of in self._stats.items()}
        self.stats = own.get(None, own)
        self._means = self._read_means(view_means)
        self._check_means()
        for values in (values for of in self._stats.values() for values in of.values()):
            values.scale(normalization)  # fails now, not in the first batch, where that mode's statistics are missing
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token

    def __call__(
        self,
        images: Sequence[Sequence[np.ndarray]] | None = None,
        task: Sequence[str] | None = None,
        state: np.ndarray | Tensor | None = None,
        actions: np.ndarray | Tensor | None = None,
        action_is_pad: np.ndarray | Tensor | None = None,
        dataset: str | Sequence[str] | None = None,
    ) -> dict[str, Tensor]:
        """Make a batch of what is given; pictures or task are left out where a cache has their features.

        Args:
            images: for each of B observations V pictures (H, W, 3) uint8, in the order of `views`.
            task: B instructions.
            state: (B, S), physical units.
            actions: (B, T, A), physical units; not given when acting.
            action_is_pad: (B, T) bool.
            dataset: of a policy of several, which one state and actions are of: one of `datasets` for all, or B of them.

        Returns:
            `pixel_values` (B, V, 3, H, W) uint8 (float32 about [0, 1] where pictures are centred), `input_ids` and
            `attention_mask` (B, L), `state` (B, S) and `actions` (B, T, A) normalised, `action_is_pad` (B, T).

        Raises:
            ValueError: if the number of views, or the size of state or actions, isn't the one trained with, or it isn't
                said of which dataset they are.
        """
        batch = {}
        if images is not None:
            batch["pixel_values"] = self._pixels(images)
        if task is not None:
            batch.update(self._tokens(task))
        if state is not None:
            batch["state"] = self._convert(normalize, STATE, state, dataset)
        if actions is not None:
            batch["actions"] = self._convert(normalize, ACTION, actions, dataset)
            if self.action_form == "relative":
                batch["actions"] -= self._reference(state, dataset)
        if action_is_pad is not None:
            batch["action_is_pad"] = torch.as_tensor(action_is_pad, dtype=torch.bool)
        return batch

    def unnormalize_actions(
        self,
        actions: Tensor,
        dataset: str | Sequence[str] | None = None,
        state: np.ndarray | Tensor | None = None,
    ) -> Tensor:
        """Map predicted actions to the dataset's physical units.

        Args:
            actions: (B, T, A) of the model.
            dataset: as for the call.
            state: (B, S) that was observed, physical units; only read where `action_form` is `relative`.

        Returns:
            (B, T, A) float32.
        """
        if self.action_form == "relative":
            actions = actions.float() + self._reference(state, dataset).to(actions.device)
        return self._convert(unnormalize, ACTION, actions, dataset)

    @property
    def datasets(self) -> list[str]:
        """Name the datasets that it has statistics of; empty where those are of one, which needs no name."""
        return [name for name in self._stats if name is not None]

    def stats_of(self, dataset: str | None = None) -> dict[str, Stats]:
        """Give the statistics of one dataset, by key.

        Raises:
            ValueError: for a dataset that isn't known; where there are several, also if none is named.
        """
        if dataset is None and len(self._stats) == 1:
            return next(iter(self._stats.values()))
        if dataset not in self.datasets:
            raise ValueError(_unknown_dataset(dataset, self.datasets))
        return self._stats[dataset]

    def _reference(self, state: np.ndarray | Tensor | None, dataset: str | Sequence[str] | None) -> Tensor:
        """Give what relative actions start from, (B, 1, A): the state, normalised as an action is."""
        if state is None:
            raise ValueError(
                "action_form is 'relative', so actions are changes from the observed state: give state (B, S) with them."
            )
        return self._convert(normalize, ACTION, state, dataset)[:, None]

    def _check_action_form(self) -> None:
        for of in self._stats.values():
            if self.action_form == "relative" and len(of[STATE]) != len(of[ACTION]):
                raise ValueError(
                    f"action_form is 'relative', but the state has {len(of[STATE])} dimensions and an action "
                    f"{len(of[ACTION])}: only what commands positions in the state's own dimensions can be a change from "
                    "it. Take 'recorded'."
                )

    def _convert(
        self, change: Callable, key: str, values: np.ndarray | Tensor, dataset: str | Sequence[str] | None
    ) -> Tensor:
        """Map (B, ..., D) values, each row by the statistics of its own dataset."""
        values = torch.as_tensor(values, dtype=torch.float32)
        if dataset is None or isinstance(dataset, str):
            return self._convert_alike(change, key, values, dataset)
        if len(dataset) != len(values):
            raise ValueError(f"dataset names {len(dataset)} datasets, for {len(values)} rows of {key}.")
        changed = torch.empty_like(values)
        for name in dict.fromkeys(dataset):
            rows = torch.tensor([own == name for own in dataset], device=values.device)
            changed[rows] = self._convert_alike(change, key, values[rows], name)
        return changed

    def _convert_alike(self, change: Callable, key: str, values: Tensor, dataset: str | None) -> Tensor:
        stats = self.stats_of(dataset)[key]
        if values.shape[-1] != len(stats):
            raise ValueError(
                f"{key} has {values.shape[-1]} dimensions, but this processor's statistics are of {len(stats)}: "
                "it was made for another robot or dataset."
            )
        return change(values, stats, self.normalization)

    def _tokens(self, task: Sequence[str]) -> dict[str, Tensor]:
        """Tokenize prompts; padding goes behind the text, where the model's causal attention counts on it."""
        prompts = [self.prompt.replace("{task}", text) for text in task]
        tokens = self.tokenizer(prompts, padding="longest", padding_side="right", return_tensors="pt")
        return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}

    def _pixels(self, images: Sequence[Sequence[np.ndarray]]) -> Tensor:
        for pair in images:
            if len(pair) != len(self.views):
                raise ValueError(f"Expected {len(self.views)} views ({', '.join(self.views)}), got {len(pair)}.")
        self._check_means()
        if self.pictures == "mean":
            pixels = self._means.repeat(len(images), 1, 1, 1, 1)
        else:
            pixels = _channels_first(np.stack([self._fit(pair) for pair in images]))
        if not self.center_images:
            return pixels
        return to_unit(pixels) + (torch.tensor(NEUTRAL).view(3, 1, 1) - to_unit(self._means))

    def _fit(self, pair: Sequence[np.ndarray]) -> np.ndarray:
        """Resize the pictures that don't fit yet, and stack them: (V, H, W, 3)."""
        size = (self.image_size, self.image_size, 3)
        fitted = [v if _fits(v, size) else resize_view(v, self.image_size, self.resize) for v in pair]
        return stack_views(fitted)

    def _read_means(self, view_means: np.ndarray | None) -> Tensor | None:
        if view_means is None:
            return None
        if len(view_means) != len(self.views):
            raise ValueError(f"There are {len(self.views)} views, but {len(view_means)} mean pictures.")
        return _channels_first(self._fit(list(view_means)))

    def _check_means(self) -> None:
        if self._means is None and (self.center_images or self.pictures == "mean"):
            raise ValueError(
                "center_images and pictures='mean' need the mean picture of each view: give view_means (V, H, W, 3) uint8, "
                f"or keep {VIEW_MEANS} beside processor_config.json."
            )

    def to_dict(self) -> dict:
        """Give what `processor_config.json` holds; the mean pictures are a file of their own."""
        values = super().to_dict()
        values.pop("view_means", None)
        return values

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs) -> list[str]:
        """Write tokenizer, settings, statistics and mean pictures into a directory."""
        save_directory = Path(save_directory)
        save_directory.mkdir(parents=True, exist_ok=True)
        if self.view_means is not None:
            Image.fromarray(np.concatenate(self.view_means)).save(save_directory / VIEW_MEANS)
        return super().save_pretrained(str(save_directory), push_to_hub, **kwargs)

    @classmethod
    def get_processor_dict(cls, pretrained_model_name_or_path: str | Path, **kwargs) -> tuple[dict, dict]:
        """Read `processor_config.json` and the mean pictures; transformers calls it first in `from_pretrained`."""
        values, kwargs = super().get_processor_dict(pretrained_model_name_or_path, **kwargs)
        if "stats" not in values:
            raise ValueError(
                f"{pretrained_model_name_or_path} holds no processor with statistics, and without those that the model was "
                "trained with its actions have no unit. Save the run's processor there (processor.save_pretrained)."
            )
        where = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
        path = cached_file(
            pretrained_model_name_or_path, VIEW_MEANS, _raise_exceptions_for_missing_entries=False, **where
        )
        if path is not None:
            stacked = np.asarray(Image.open(path).convert("RGB"))
            values["view_means"] = stacked.reshape(len(values["views"]), -1, *stacked.shape[1:])
        return values, kwargs


def _fits(picture: np.ndarray, size: tuple[int, int, int]) -> bool:
    return picture.shape == size and picture.dtype == np.uint8


def _channels_first(pictures: np.ndarray) -> Tensor:
    """Turn (..., H, W, 3) uint8 into (..., 3, H, W) uint8."""
    return torch.from_numpy(pictures).movedim(-1, -3).contiguous()


def _read_stats(stats: dict | None) -> dict[str | None, dict[str, Stats]]:
    """Read statistics by dataset; those of a policy of one, which needs no name, are under None."""
    if stats and not {STATE, ACTION} & set(stats):
        return {name: _read_own_stats(values, f" of {name}") for name, values in stats.items()}
    return {None: _read_own_stats(stats or {})}


def _read_own_stats(stats: dict, whose: str = "") -> dict[str, Stats]:
    missing = [key for key in (STATE, ACTION) if key not in stats]
    if missing:
        raise ValueError(
            f"VLAProcessor needs the statistics of {' and '.join(missing)}{whose}: pass stats as the dataset's "
            "meta/stats.json holds them, or load the processor that was saved with the model."
        )
    return {key: Stats.from_dict(stats[key], key + whose) for key in (STATE, ACTION)}


def _unknown_dataset(dataset: str | None, known: Sequence[str]) -> str:
    if not known:
        return f"dataset is {dataset!r}, but this policy's statistics are of one dataset, which needs no name: leave it out."
    return (
        f"dataset is {dataset!r}, but this policy was trained on {len(known)} datasets, each in units of its own: say whose "
        f"state is given and whose units its actions are wanted in. It knows {', '.join(map(repr, known))}. Give one to "
        "Policy.from_pretrained(..., dataset=...), to the processor's calls, or as evaluation.dataset in the recipe."
    )


def _check_choice(name: str, value: str, allowed: Sequence[str]) -> str:
    if value not in allowed:
        raise ValueError(f"Unknown {name} {value!r}; allowed: {', '.join(allowed)}.")
    return value
