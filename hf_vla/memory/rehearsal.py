"""A recipe's model at work under a tracker: micro-steps, update, evaluation, checkpoint, as Trainer goes through them."""

import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from hf_vla.memory.embedding_states import plan_states
from hf_vla.memory.in_backward import OptimizerInBackward
from hf_vla.memory.materialize import quantized_kind
from hf_vla.memory.tracker import MemoryTracker
from hf_vla.recipe import Recipe

PAGED = 100_000
"""Elements from which on bitsandbytes pages a state (optim/optimizer.py, get_state_buffer)."""


class Rehearsal:
    """Goes through a run phase by phase.

    Args:
        recipe: the run.
        model: its model, with tensors in it.
        tracker: sees and labels everything; it must be active.
    """

    def __init__(self, recipe: Recipe, model: nn.Module, tracker: MemoryTracker):
        self._model, self._tracker = model, tracker
        self._max_norm = recipe.training["max_grad_norm"]
        self._follow_parts()
        enable_checkpointing(model, recipe)
        self._optimizer = make_optimizer(model, recipe)
        self._place_paged_states(recipe)
        in_backward = recipe.memory.optimizer_in_backward
        self._in_backward = OptimizerInBackward(self._optimizer) if in_backward else None
        self._forward = autocast_forward(model, recipe)

    def warm_up(self) -> None:
        """Bring optimizer states into being without a step of training.

        What follows then runs beside them, as every step but the first does. The first holds no more: it does the same
        with less.
        """
        trained = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        self._optimizer.step()
        self._label_states()
        self._model.zero_grad()

    def accumulate(self) -> None:
        """Bring gradients into being, beside which every micro-step but the first runs."""
        for component, part in parts_of(self._model).items():
            for parameter in filter(lambda p: p.requires_grad, part.parameters()):
                parameter.grad = torch.zeros_like(parameter)
                self._tracker.label([parameter.grad], component, "gradients")

    def train_step(self, batches: Iterable[dict[str, Tensor]]) -> None:
        """Run one optimizer step: micro-steps, clipping, update."""
        self._model.train()
        for batch in batches:
            self._micro_step(batch)
        with self._tracker.phase("step"):
            if self._max_norm:
                nn.utils.clip_grad_norm_(self._model.parameters(), self._max_norm)
            self._optimizer.step()
            self._model.zero_grad()
        self._label_states()

    def evaluate(self, batch: dict[str, Tensor]) -> None:
        """Run one batch of the evaluation."""
        self._model.eval()
        with self._tracker.phase("evaluation"), torch.no_grad():
            self._forward(**batch)

    def save(self) -> None:
        """Make what a checkpoint holds ready for the file, one tensor after another: only a copy takes memory."""
        with self._tracker.phase("saving"):
            for tensor in (*self._model.parameters(), *self._model.buffers()):
                tensor.contiguous()

    def _micro_step(self, batch: dict[str, Tensor]) -> None:
        with self._tracker.phase("forward"), self._tracker.saved_as_activations():
            loss = self._forward(**batch).loss
        with self._tracker.phase("backward"):
            loss.backward()

    def _follow_parts(self) -> None:
        for component, part in parts_of(self._model).items():
            self._tracker.label(weights_of(part), component, "weights")
            self._tracker.follow(part, component)
            for parameter in part.parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(self._label_gradient(component))

    def _label_gradient(self, component: str) -> Callable[[nn.Parameter], None]:
        tracker = self._tracker  # not self: the hook would hold the model that holds it, and no collector sees that
        return lambda parameter: tracker.label([parameter.grad], component, "gradients")

    def _label_states(self) -> None:
        for component, part in parts_of(self._model).items():
            for parameter in part.parameters():
                states = self._optimizer.state.get(parameter, {}).values()
                self._tracker.label_device([s for s in states if isinstance(s, Tensor)], component, "optimizer")

    def _place_paged_states(self, recipe: Recipe) -> None:
        """Let bitsandbytes' paged states live where they do on a GPU: in the host's memory, fetched page by page."""
        if not str(recipe.training.get("optim", "")).startswith("paged_"):
            return
        make_state = self._optimizer.get_state_buffer

        def make_paged_state(parameter: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
            with self._tracker.host() if parameter.numel() >= PAGED else nullcontext(), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
                return make_state(parameter, dtype)

        self._optimizer.get_state_buffer = make_paged_state


def parts_of(model: nn.Module) -> dict[str, nn.Module]:
    """Give the model's parts by the component they count as; what comes from the cache is not there."""
    parts = {
        "vggt": model.model.vggt,
        "language": model.model.lang_encoder,
        "fusion": model.model.fusion,
        "head": model.head,
    }
    return {name: part for name, part in parts.items() if part is not None}


def weights_of(module: nn.Module) -> list[Tensor]:
    """List a module's parameters and buffers, and the scales that quantised layers carry beside them."""
    tensors = [*module.parameters(), *module.buffers()]
    for state in filter(None, [getattr(tensor, "quant_state", None) for tensor in tensors]):
        tensors += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    layers = [layer for layer in module.modules() if quantized_kind(layer) == "Linear8bitLt"]
    return tensors + [layer.state.SCB for layer in layers]


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Make the optimizer that Trainer makes: the recipe's class, weights with decay apart from those without."""
    known = ("optim", "optim_args", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
    values = {name: recipe.training[name] for name in known if name in recipe.training}
    arguments = TrainingArguments(output_dir="unused", use_cpu=True, **values)
    decayed = set(Trainer.get_decay_parameter_names(None, model))
    trained = [(name in decayed, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for decays, p in trained if decays], "weight_decay": arguments.weight_decay},
        {"params": [p for decays, p in trained if not decays], "weight_decay": 0.0},
    ]
    optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    optimizer = optimizer_class([group for group in groups if group["params"]], **options)
    if options.get("optim_bits") == 8:
        plan_states(model, optimizer, recipe.memory.embedding_state_bits)
    return optimizer


def enable_checkpointing(model: nn.Module, recipe: Recipe) -> None:
    """Switch activation checkpointing on as Trainer does."""
    if recipe.training.get("activation_checkpointing"):
        options = dict(recipe.training.get("activation_checkpointing_kwargs") or {})
        every, offload = options.pop("every_n_layers", 1), options.pop("offload", False)
        model.activation_checkpointing_enable(options or None, every_n_layers=every, offload=offload)


def autocast_forward(model: nn.Module, recipe: Recipe) -> Callable:
    """Wrap the model's forward as accelerate does for mixed precision."""
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}
    dtype = next((half[key] for key in half if recipe.training.get(key)), None)
    if dtype is None:
        return model.forward
    return convert_outputs_to_fp32(torch.autocast(model.device.type, dtype)(model.forward))
