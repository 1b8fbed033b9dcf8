"""The policy: VGGT and LLaMA give features, the fusion joins them with the robot's state, the head makes actions of them.

Letters: B batch, V views, H W pixels, P patches of a view, g grid side after pooling, L text tokens, D LLaMA width, C VGGT
width (outputs are 2C), T chunk, A action dims, S state dims, F fusion width.
"""

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput, has_file

from .action_heads import HEADS, DiscreteHead, uniform_levels
from .configuration_vla import VLAConfig
from .fusion import FUSIONS, pool_patches
from .modeling_vggt import VGGTModel

TRAINED = "trained.safetensors"
"""File of a checkpoint that holds what training changed, and leaves the rest to where it came from."""


@dataclass
class VLAModelOutput(ModelOutput):
    """What the fusion made of a batch."""

    context: Tensor | None = None
    """(B, T, F): one vector for each step of the chunk."""
    align_loss: Tensor | None = None
    """(B,) float32: distance of LLaMA's view states from VGGT's tokens, where that is trained."""


@dataclass
class VLAOutput(ModelOutput):
    """What `VLAForActionPrediction` returns."""

    loss: Tensor | None = None
    """Scalar float32; only if actions were given."""
    context: Tensor | None = None
    """(B, T, F): what the head reads."""
    align_loss: Tensor | None = None
    """Scalar float32, already in `loss` by its weight; only where it is trained."""


class VLAPreTrainedModel(PreTrainedModel):
    """What both models share: the config, and how new weights begin."""

    config_class = VLAConfig
    base_model_prefix = "model"
    # Not input_ids: with cached features there are none, and activation checkpointing would then demand gradients of
    # LLaMA's embeddings, and so record a graph through a frozen LLaMA. The state is in every batch.
    main_input_name = "state"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ("Block", "SelfBlock", "CrossBlock")
    # A checkpoint states one dtype, that of its backbones; fusion and head are float32 beside bf16 ones.
    _keep_in_fp32_modules_strict = (r"(^|\.)fusion\.", r"^head\.")

    def _init_weights(self, module: nn.Module) -> None:
        # As torch begins linear layers: scaled by their inputs, so that a narrow model learns as a wide one does.
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, DiscreteHead):
            init.copy_(module.levels, uniform_levels(*module.levels.shape))


class VLAModel(VLAPreTrainedModel):
    """Backbones and fusion: a batch of observations in, the head's context out.

    A backbone whose features come from a cache may be left out: `model.vggt = None`, `model.lang_encoder = None`.
    """

    def __init__(self, config: VLAConfig):
        super().__init__(config)
        self.vggt = VGGTModel(config.vggt_config)
        self.lang_encoder = AutoModel.from_config(config.text_config)
        self.fusion = FUSIONS[config.view_fusion_config.type](config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module | None:
        """Return LLaMA's token embedding, or None where LLaMA is left out."""
        return None if self.lang_encoder is None else self.lang_encoder.get_input_embeddings()

    def forward(
        self,
        *,
        state: Tensor,
        pixel_values: Tensor | None = None,
        view_features: Tensor | None = None,
        input_ids: Tensor | None = None,
        text_features: Tensor | None = None,
        attention_mask: Tensor | None = None,
        needs_align: bool = False,
    ) -> VLAModelOutput:
        """Fuse a batch.

        Args:
            state, pixel_values, view_features, input_ids, text_features, attention_mask: as
                `VLAForActionPrediction.forward` takes them.
            needs_align: whether to compute the alignment loss, if the fusion has one.
        """
        _check_exactly_one(pixel_values=pixel_values, view_features=view_features)
        _check_exactly_one(input_ids=input_ids, text_features=text_features)
        mask = _text_mask(text_features if input_ids is None else input_ids, attention_mask)
        if self.config.view_fusion_config.type == "prefix":
            return self._fuse_early(pixel_values, view_features, input_ids, mask, state, needs_align)
        if view_features is None:
            view_features = self.encode_views(pixel_values)
        if text_features is None:
            text_features = self.encode_text(input_ids)
        return VLAModelOutput(context=self.fusion(view_features, text_features, mask, state))

    def _fuse_early(
        self,
        pixel_values: Tensor | None,
        view_features: Tensor | None,
        input_ids: Tensor | None,
        mask: Tensor,
        state: Tensor,
        needs_align: bool,
    ) -> VLAModelOutput:
        if input_ids is None or self.lang_encoder is None:
            raise ValueError("In `prefix` LLaMA reads the views too: give input_ids, and keep the language encoder.")
        target = None
        if self.fusion.patches is not None:
            if pixel_values is None:
                raise ValueError("With align_weight the fusion looks at the pictures themselves: give pixel_values.")
            target = self.encode_views(pixel_values).detach() if needs_align else None
            view_features = self.fusion.patches(pixel_values)
        elif view_features is None:
            view_features = self.encode_views(pixel_values)
        context, align_loss = self.fusion(view_features, input_ids, mask, state, self.lang_encoder, target)
        return VLAModelOutput(context=context, align_loss=align_loss)

    def encode_views(self, pixel_values: Tensor) -> Tensor:
        """Run VGGT as far as the configured layer and pool each view's patch tokens.

        Args:
            pixel_values: (B, V, 3, H, W), uint8 or in [0, 1].

        Returns:
            (B, V, g², 2C): exactly what a cache stores and what `view_features` takes. VGGT's residual stream is float32
            whatever it computes in; its tokens leave in the dtype of its weights, so that storing them rounds nothing.

        Raises:
            ValueError: if VGGT is left out, or the pictures have fewer patches than the grid.
        """
        if self.vggt is None:
            raise ValueError("This model is without its VGGT, and can't encode pixel_values: give view_features.")
        with _grad_if_trained(self.vggt):
            tokens = self.vggt(pixel_values, layers=[self.config.vggt_layer])[0]
            patches = tokens[:, :, self.vggt.num_special_tokens :].flatten(0, 1)
            h, w = (side // self.config.vggt_config.patch_size for side in pixel_values.shape[-2:])
            grid = patches.transpose(1, 2).unflatten(-1, (h, w))
            pooled = pool_patches(grid, self.config.pool_grid).unflatten(0, pixel_values.shape[:2])
            return pooled.to(self.vggt.dtype)

    def encode_text(self, input_ids: Tensor) -> Tensor:
        """Run LLaMA over text alone.

        Padding stands behind the text, where causal attention never looks, so that no mask is needed: attention keeps its
        fast kernels, and no mask has to be read back from the GPU.

        Args:
            input_ids: (B, L), padded on the right.

        Returns:
            (B, L, D): last hidden states in the dtype of LLaMA's weights, those of padding meaningless.
        """
        if self.lang_encoder is None:
            raise ValueError(
                "This model is without its language encoder, and can't encode input_ids: give text_features."
            )
        with _grad_if_trained(self.lang_encoder):
            states = self.lang_encoder(input_ids=input_ids, use_cache=False).last_hidden_state
            return states.to(self.lang_encoder.dtype)


class VLAForActionPrediction(VLAPreTrainedModel):
    """The whole policy: an observation in, a loss or a chunk of actions out, in normalised space."""

    _auto_class = "AutoModel"  # a saved directory holds the code too, and opens with trust_remote_code
    accepts_loss_kwargs = True  # Trainer passes num_items_in_batch, and doesn't divide by the accumulation steps again

    def __init__(self, config: VLAConfig):
        super().__init__(config)
        self._parts: list[nn.Module] = []
        self.model = VLAModel(config)
        self.head = HEADS[config.head_config.type](config)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs) -> "VLAForActionPrediction":
        """Open a checkpoint of the whole model, as `PreTrainedModel` does.

        Raises:
            OSError: if there is none; says what to do where only what training changed was saved.
        """
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        except OSError:
            where = {name: kwargs[name] for name in ("revision", "token", "cache_dir") if name in kwargs}
            if not has_file(pretrained_model_name_or_path, TRAINED, **where):
                raise
        raise OSError(
            f"{pretrained_model_name_or_path} holds only what training changed ({TRAINED}, adapters), not the whole model. "
            "Merge it first (`hf-vla merge RUN`), or open it with hf_vla.Policy.from_pretrained."
        )

    def get_input_embeddings(self) -> nn.Module | None:
        """Return LLaMA's token embedding, or None where LLaMA is left out."""
        return self.model.get_input_embeddings()

    def train(self, mode: bool = True) -> "VLAForActionPrediction":
        """Switch all parts to training, or to evaluation.

        Trainer asks before every micro-step. With adapters there are thousands of parts, and walking through them takes
        longer than looking at each: those of the last walk are looked at, and only if one isn't training it is done again.
        """
        if mode and self.training and self._parts and all(map(attrgetter("training"), self._parts)):
            return self
        self._parts = [part for part in self.modules() if part is not self] if mode else []  # itself would be a cycle
        return super().train(mode)

    def forward(
        self,
        *,
        state: Tensor,
        pixel_values: Tensor | None = None,
        view_features: Tensor | None = None,
        input_ids: Tensor | None = None,
        text_features: Tensor | None = None,
        attention_mask: Tensor | None = None,
        actions: Tensor | None = None,
        action_is_pad: Tensor | None = None,
        draws: dict[str, Tensor] | None = None,
        num_items_in_batch: Tensor | int | None = None,
        generator: torch.Generator | None = None,
    ) -> VLAOutput:
        """Compute the loss of a batch; without actions, only the context.

        Args:
            state: (B, S), normalised.
            pixel_values: (B, V, 3, H, W), uint8 or in [0, 1]; or else
            view_features: (B, V, g², 2C), what `encode_views` gives.
            input_ids: (B, L), padded on the right; or else
            text_features: (B, L, D), what `encode_text` gives.
            attention_mask: (B, L), 1 where there is text; None where all is text.
            actions: (B, T, A), normalised.
            action_is_pad: (B, T) bool, True where an action doesn't count; None where all count.
            draws: the head's random numbers for these samples, as `draws` gives them; None draws them now.
            num_items_in_batch: valid action entries (steps x dimensions) of the whole optimizer step, by which the summed
                loss is divided; None counts this batch's own.
            generator: that `draws` are drawn from; None takes torch's own.

        Raises:
            ValueError: unless there is exactly one of pixels and view features, and of ids and text features.
        """
        features = self.model(
            state=state,
            pixel_values=pixel_values,
            view_features=view_features,
            input_ids=input_ids,
            text_features=text_features,
            attention_mask=attention_mask,
            needs_align=actions is not None,
        )
        if actions is None:
            return VLAOutput(context=features.context)
        if action_is_pad is None:
            action_is_pad = torch.zeros_like(actions[..., 0], dtype=torch.bool)
        if draws is None:
            draws = self.draws(actions, generator)
        loss = self.head(features.context, actions, action_is_pad, draws)
        entries = (~action_is_pad).sum(1) * self.config.action_dim
        count = entries.sum() if num_items_in_batch is None else num_items_in_batch
        if features.align_loss is None:
            return VLAOutput(loss=loss / count, context=features.context)
        # A sample's alignment weighs as much as its actions do, so that a batch in pieces gives the loss of the whole.
        align_loss = (features.align_loss * entries).sum() / count
        loss = loss / count + self.config.view_fusion_config.align_weight * align_loss
        return VLAOutput(loss=loss, context=features.context, align_loss=align_loss)

    def draws(self, actions: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Draw everything random that the loss of these actions (B, T, A) needs; each tensor has B rows."""
        return self.head.draws(actions, generator)

    @torch.no_grad()
    def predict_action(self, *, generator: torch.Generator | None = None, **observation: Tensor) -> Tensor:
        """Predict the chunk of actions of each observation.

        Args:
            generator: that a sampling head draws from; None takes torch's own.
            observation: what `forward` takes, without actions.

        Returns:
            (B, T, A) float32, normalised.
        """
        return self.head.sample(self.model(**observation).context, generator)


def _grad_if_trained(module: nn.Module) -> AbstractContextManager:
    """Record no graph through a frozen module, even if a hook makes its embeddings require gradients."""
    is_trained = any(parameter.requires_grad for parameter in module.parameters())
    return torch.set_grad_enabled(torch.is_grad_enabled() and is_trained)


def _check_exactly_one(**given: Tensor | None) -> None:
    names = [name for name, tensor in given.items() if tensor is not None]
    if len(names) != 1:
        raise ValueError(f"Expected exactly one of {' and '.join(given)}, got {' and '.join(names) or 'neither'}.")


def _text_mask(text: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Give the (B, L) bool mask of text (B, L, ...)."""
    if attention_mask is None:
        return torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
    return attention_mask.bool()
