"""Hugging Face's Trainer, with what a VLA inside a budget needs changed: how the loss is counted, what happens when a
step doesn't fit, and what a checkpoint holds.
"""

import json
import logging
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import NoReturn

import accelerate.optimizer
import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from hf_vla.checkpoint import load_trained, save_checkpoint
from hf_vla.memory import ranks
from hf_vla.memory.budget import MemoryBudgetError
from hf_vla.memory.embedding_states import forget_earlier_training, keep_in_8_bits
from hf_vla.memory.encode_ahead import EncodeAhead
from hf_vla.memory.headroom import has_headroom
from hf_vla.memory.in_backward import OptimizerInBackward
from hf_vla.memory.lookahead import Lookahead
from hf_vla.memory.microbatch import EvaluationBatcher, Fit, MicroBatcher, Rung, divisors
from hf_vla.memory.monitor import MemoryMonitor, log_values
from hf_vla.memory.out_of_memory import Attempt, free_cache
from hf_vla.memory.paged_states import load_into_pages
from hf_vla.memory.update import guard_update
from hf_vla.model.processing_vla import VLAProcessor
from hf_vla.recipe import Recipe
from hf_vla.resumable import ResumableTrainer
from hf_vla.run import add_event, report_skipped, write_json

MICRO_BATCH = "micro_batch.json"
"""What was found to fit: in each checkpoint, and in the run itself once it had to stop for it."""

logger = logging.getLogger(__name__)

# accelerate looks on the disk for a package, twice in every update: more time than all else that it does in a step.
accelerate.optimizer.is_lomo_available = cache(accelerate.optimizer.is_lomo_available)


class VLATrainer(ResumableTrainer):
    """Trainer whose loss is a mean over every valid action entry of an optimizer step, however the step is cut up.

    Out of memory, an ordinary step is run again in smaller pieces (`memory/microbatch.py`). Two kinds of step can't be:
    one with the optimizer in its backward has moved weights, and under sharding (FSDP, DeepSpeed) the other ranks wait in a
    collective. There all ranks stop at once with exit code `ranks.RESTART`, and --resume goes on from the last checkpoint
    with what is found to fit.

    Args:
        recipe: the run, written into each checkpoint.
        processor: the processor that the collator uses, written into each checkpoint.
        what_fits: says, for people, which recipe would fit; asked when nothing is left to try.
        left_out: what was wrong with each episode that isn't trained on, for the run's record.
        kwargs: arguments of `ResumableTrainer`.
    """

    def __init__(
        self,
        recipe: Recipe,
        processor: VLAProcessor,
        what_fits: Callable[[Recipe], str] = lambda recipe: "See what would fit with `hf-vla plan`.",
        left_out: Sequence[str] = (),
        **kwargs,
    ):
        super().__init__(on_error=recipe.data.on_error, processing_class=processor, **kwargs)
        self.recipe, self.what_fits, self.left_out = recipe, what_fits, left_out
        self.in_backward: OptimizerInBackward | None = None
        self._trained: list[nn.Parameter] = []
        self.monitor: MemoryMonitor | None = None
        size = recipe.data.batch_size
        sizes = [size] if recipe.memory.optimizer_in_backward else divisors(size)
        self.batcher = MicroBatcher(self.model, sizes, self._rungs(), self.tell)
        self.ahead = EncodeAhead(recipe, self.bare_model().model, self.tell) if recipe.memory.encode_ahead else None
        self.lookahead: Lookahead | None = None
        if recipe.memory.encode_overlap:
            self.lookahead = Lookahead(self.ahead, self.args.gradient_accumulation_steps, self.args.device, self.tell)
        self._fetched: list[dict] = []
        size = self.args.per_device_eval_batch_size
        self.evaluation_batcher = EvaluationBatcher([size] if self.is_sharded else divisors(size), self.tell)
        self._restrict(Path(self.args.output_dir), "This run stopped for want of memory")

    def watch_memory(self, monitor: MemoryMonitor) -> None:
        """Let a monitor read each step, and log what it reads beside the loss."""
        self.monitor = monitor
        self.add_callback(monitor)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as Trainer does, and what the monitor read of this step."""
        watched = log_values(self.monitor.reading) if self.monitor and "loss" in logs else {}
        super().log({**logs, **watched}, start_time)

    def get_batch_samples(self, epoch_iterator, *args, **kwargs):
        """Take the batches of an optimizer step, and keep them in sight for its first micro-step."""
        batches = self.lookahead.over(epoch_iterator) if self.lookahead else epoch_iterator
        self._fetched, count = super().get_batch_samples(batches, *args, **kwargs)
        return self._fetched, count

    def training_step(self, model: nn.Module, inputs: dict, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Run one micro-step; after the last of an optimizer step, agree with the other ranks and average gradients."""
        step = partial(super().training_step, model, num_items_in_batch=num_items_in_batch)
        encoder = self.lookahead or self.ahead
        if encoder and self._fetched:
            encoder.run(self._fetched)  # of which `inputs` is the first
        self._fetched = []
        inputs = self._prepare_inputs(inputs)
        if self.is_sharded:
            return self._run_once(inputs, step)
        if self.in_backward:
            self._prove(inputs, step)
            return self._run_once(inputs, step)
        loss = self.batcher.run(inputs, step)
        if self.accelerator.sync_gradients:
            self._agree()
            ranks.average_gradients(self.model)
        return loss

    def _prepare_inputs(self, inputs: dict) -> dict:
        """Send a batch's tensors to the device and go on: Trainer would wait until all that runs there is done."""
        if self.is_deepspeed_enabled:  # which has them in another dtype
            return super()._prepare_inputs(inputs)
        device = self.args.device
        return {
            name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in inputs.items()
        }

    def _agree(self) -> None:
        fit = self.batcher.wish(partial(has_headroom, self.batcher.fit.size))
        agreed = ranks.agree(fit, self.args.device)
        if agreed.is_exhausted:
            self._give_up()
        self.batcher.finish_step(agreed)

    def _prove(self, inputs: dict, step: Callable[[dict], Tensor]) -> None:
        """Make sure that a step fits before it moves the first weight."""
        if not self.in_backward.is_proven(inputs):
            with self.in_backward.rehearsal(inputs):
                self.batcher.run(inputs, step)
            self.batcher.rewind()
        self._agree()

    def _run_once(self, inputs: dict, step: Callable[[dict], Tensor]) -> Tensor:
        loss = self.batcher.run_once(inputs, step)
        if loss is None:
            self._restart_smaller()
        return loss

    def _restart_smaller(self) -> NoReturn:
        """Stop all ranks, for --resume to go on from the last checkpoint with the next thing to try."""
        can_go_on = self.batcher.shrink()
        self._save_fit(Path(self.args.output_dir))
        if not can_go_on:
            self._stop(f"Not even one sample fits. {self.what_fits(self.recipe)}")
        self._stop("This step can't be run again: go on from the last checkpoint with --resume.", ranks.RESTART)

    def _stop(self, text: str, code: int = 1) -> NoReturn:
        """End this process and, through the launcher, those that may be waiting for it."""
        if not ranks.is_alone():
            logger.error(text)
            ranks.stop_all_ranks(code)
        if code == ranks.RESTART:
            logger.error(text)
            raise SystemExit(code)
        raise MemoryBudgetError(text)

    def _give_up(self) -> NoReturn:
        """End the run, on all ranks together, with nothing lost: the weights are those of the last whole step."""
        self.batcher.forget()
        self.batcher.rewind()
        self.undo_step()
        self._save_checkpoint(self.model, trial=None)
        raise MemoryBudgetError(
            f"Not even one sample fits, whatever was tried. Step {self.state.global_step} is saved in "
            f"{self.args.output_dir}; --resume goes on from it. {self.what_fits(self.recipe)}"
        )

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Evaluate one batch; where it doesn't fit, in pieces, weighted by what counts in each."""
        step = partial(super().prediction_step, model, prediction_loss_only=True)
        for text in self.take_skipped([inputs]):
            self.tell("skipped_in_evaluation", f"A held-out sample was left out (data.on_error): {text}")
        inputs = self._prepare_inputs(inputs)
        inputs["draws"] = self.bare_model().draws(inputs["actions"])
        parts = self.evaluation_batcher.run(inputs, lambda part: (step(part)[0], (~part["action_is_pad"]).sum()))
        if parts is None:
            self._stop(
                "Evaluation doesn't fit, though training did: has another process taken this GPU's memory? `hf-vla doctor` "
                "says who holds what. Go on from the last checkpoint with --resume."
            )
        losses, counts = (torch.stack(values) for values in zip(*parts, strict=True))
        return (losses * counts).sum() / counts.sum().clamp_min(1), None, None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer; guard its update against running out of memory, or move its work into the backward."""
        if self.optimizer is not None:
            return self.optimizer
        if "8bit" in self.args.optim and "torch" not in self.args.optim:  # torchao's have no such list
            forget_earlier_training()
        optimizer = super().create_optimizer(model)
        if self.recipe.memory.embedding_state_bits == 8:
            keep_in_8_bits(self.model)
        if self.args.optim.startswith("paged_"):
            load_into_pages(optimizer)
        if not self.is_sharded:  # or whole parameters would live on beside their shards
            self._trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            # Trainer's way through the model walks through thousands of modules after every step.
            self.model.zero_grad = partial(_forget_gradients, self._trained)
        if self.recipe.memory.optimizer_in_backward:
            average = (lambda parameter: None) if ranks.is_alone() else ranks.average
            self.in_backward = OptimizerInBackward(optimizer, average)
        else:
            guard_update(optimizer, self.tell, partial(self._stop, code=ranks.RESTART))
        return optimizer

    def _clip_grad_norm(self, model):
        """Clip what trains, without walking through all modules or looking for shards, which there are none of here."""
        if self.is_sharded:
            return super()._clip_grad_norm(model)
        self.accelerator.unscale_gradients()
        return nn.utils.clip_grad_norm_(self._trained, self.args.max_grad_norm)

    def floating_point_ops(self, inputs: dict) -> int:
        """Count none: Trainer's estimate takes a sample's state for its tokens, and walks through all modules each time."""
        return 0

    def _get_grad_norm(self, model, grad_norm=None):
        """Leave the norm out of the log where gradients are gone by now: it would be 0."""
        return None if self.in_backward else super()._get_grad_norm(model, grad_norm)

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader=None) -> nn.Module:
        """Prepare autocast and device, and leave out DistributedDataParallel: `memory/ranks.py` does its work."""
        if self.is_sharded or not training:
            return super()._wrap_model(model, training, dataloader)
        model = self.accelerator.prepare_model(model, evaluation_mode=True)
        model._is_accelerate_prepared = True  # accelerate's own mark; it wraps whatever hasn't got it
        ranks.copy_from_first(model)
        return model

    @property
    def is_uncut(self) -> bool:
        """Whether all training so far has fitted as the recipe has it."""
        is_whole = self.batcher.fit == Fit(self.recipe.data.batch_size)
        is_whole &= self.ahead is None or self.ahead.pairs == self.ahead.asked
        return is_whole and not (self.lookahead and self.lookahead.is_given_up)

    @property
    def is_sharded(self) -> bool:
        """Whether the forward is itself a collective."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def _rungs(self) -> list[Rung]:
        """What is tried when one sample doesn't fit; it costs time, and changes no number."""
        options = self.args.activation_checkpointing_kwargs or {}
        enable, rungs = self.model.activation_checkpointing_enable, []
        if not self.args.activation_checkpointing or options.get("every_n_layers", 1) > 1:
            rungs.append(Rung("activation checkpointing", enable))
        if self.args.device.type == "cuda" and not options.get("offload"):
            rungs.append(Rung("activations offloaded to the host", partial(enable, offload=True)))
        return rungs

    def tell(self, kind: str, text: str) -> None:
        """Log what a user should know, and write it into the run's events; without memory to spare, stop looking ahead."""
        logger.warning(text)
        if self.is_world_process_zero():
            add_event(self.args.output_dir, self.state.global_step, kind, text)
        if kind == "out_of_memory" and self.lookahead:
            self.lookahead.give_up()

    def _get_num_items_in_batch(self, batch_samples: list[dict], device: torch.device) -> Tensor | int:
        """Count valid action entries of all this step's micro-batches, a rank's share of them; Trainer only knows `labels`.

        Batches are still on the host, so that to count them is to wait for nothing. A share, since gradients are averaged
        over ranks and not summed.
        """
        self._report_skipped(batch_samples)
        count = sum(int((~batch["action_is_pad"]).sum()) * batch["actions"].shape[-1] for batch in batch_samples)
        if self.args.world_size == 1:
            return max(count, 1)  # where all samples of a step were skipped
        count = torch.tensor(count).to(device, non_blocking=True)
        return self.accelerator.gather(count).sum().clamp_min(1) / self.args.world_size

    def _report_skipped(self, batch_samples: list[dict]) -> None:
        """Count the samples that were left out, on all ranks, and name the first of them in `run.json`."""
        texts = self.take_skipped(batch_samples)
        if self.on_error == "raise":
            return
        for text in texts:
            logger.warning("A sample was left out (data.on_error): %s", text)
        texts = gather_object(texts) if self.args.world_size > 1 else texts
        self.skipped += len(texts)
        if texts and self.is_world_process_zero():
            report_skipped(self.args.output_dir, self.skipped, texts)

    def save_policy(self, directory: Path) -> None:
        """Write what was trained, by itself; all ranks call it, since each may hold only a shard."""
        state = self.accelerator.get_state_dict(self.model) if self.is_sharded else None
        if self.args.should_save:
            save_checkpoint(self.bare_model(), self.processing_class, self.recipe, directory, state)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return  # under sharding Trainer asks every rank
        directory = Path(output_dir or self.args.output_dir)
        save = partial(save_checkpoint, self.bare_model(), self.processing_class, self.recipe, directory, state_dict)
        self._try_twice(save, "The model")
        self._save_fit(directory, patience=self.batcher.patience)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        self._try_twice(partial(super()._save_optimizer_and_scheduler, output_dir), "The optimizer")

    def _try_twice(self, save: Callable[[], None], what: str) -> None:
        """Save; out of memory, free what can be freed and save again."""
        with Attempt():
            return save()
        self.tell("out_of_memory", f"{what} couldn't be saved for want of memory: trying again with all caches freed.")
        free_cache()
        return save()

    def _save_fit(self, directory: Path, **more: dict) -> None:
        fit = self.batcher.fit
        rungs = [rung.name for rung in self.batcher.rungs[: fit.rungs]]
        ahead = {"encode_ahead": self.ahead.pairs} if self.ahead else {}
        ahead |= {"encode_overlap": not self.lookahead.is_given_up} if self.lookahead else {}
        write_json(directory / MICRO_BATCH, {"size": fit.size, "rungs": rungs, **ahead, **more})

    def _restrict(self, directory: Path, reason: str) -> None:
        file = directory / MICRO_BATCH
        if file.is_file():
            found = json.loads(file.read_text())
            self.batcher.restrict(Fit(found["size"], len(found["rungs"])), reason)
            self.batcher.patience = found.get("patience", self.batcher.patience)
            if self.ahead:
                self.ahead.restrict(found.get("encode_ahead", self.ahead.pairs))
            if self.lookahead:
                self.lookahead.is_given_up |= not found.get("encode_overlap", True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_trained(self.bare_model(), self.recipe, resume_from_checkpoint)
        self._restrict(Path(resume_from_checkpoint), "The checkpoint says what fitted")

    def _load_best_model(self) -> None:
        load_trained(self.bare_model(), self.recipe, self.state.best_model_checkpoint)

    def bare_model(self) -> nn.Module:
        """Give the model without the wrappers that accelerate puts around it."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)


def _forget_gradients(trained: list[nn.Parameter], set_to_none: bool = True) -> None:
    """Stand in for a model's `zero_grad`; the optimizer's own would keep its states as long as the model lives."""
    for parameter in trained:
        parameter.grad = None
