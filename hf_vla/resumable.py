"""Hugging Face's Trainer, with a run that goes on after a kill as if it had not stopped: its loader, checkpoints and log.

Trainer alone replays the data that it has seen, gives each rank the same random draws, loses the losses since its last line
of the log, and leaves half a checkpoint where it is killed while writing one.
"""

import logging
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback, set_seed
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from hf_vla import saving
from hf_vla.data.loader import SKIPPED, DrawnSamples, RankBatches, build_loader, collate_drawn, step_aside
from hf_vla.data.order import Order, Part
from hf_vla.progress import Progress

logger = logging.getLogger(__name__)


class ResumableTrainer(Trainer):
    """Trainer that seeks in its data instead of replaying it, and whose checkpoints hold all that the next step depends on.

    Args:
        order: of the training samples; None shuffles all of them alike.
        on_error: `raise`, or `skip` to leave out samples that can't be read, and count them.
        kwargs: arguments of `transformers.Trainer`.
    """

    def __init__(self, order: Order | None = None, on_error: str = "raise", **kwargs):
        super().__init__(**kwargs)
        self.order, self.on_error = order, on_error
        self.batches: RankBatches | None = None
        self.resumed: Progress | None = None
        """What the checkpoint said, in a run that goes on."""
        self.skipped = 0
        """Samples of all ranks that couldn't be read."""
        self._began, self._summary = time.monotonic(), {}
        self._batches_done = self._steps_in_epoch = 0
        self._epoch_is_over = False
        self._step_start = (0, torch.zeros(()))
        self.add_callback(_Bookmark(self))

    def train(self, resume_from_checkpoint: str | None = None, **kwargs):
        """Train, from a checkpoint's folder on if one is given."""
        self.resumed = Progress.load(Path(resume_from_checkpoint)) if resume_from_checkpoint else None
        if self.resumed:
            self.args.eval_on_start = False  # it was done
        result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        result.metrics.update(self._summary)
        return result

    # Data

    def get_train_dataloader(self) -> DataLoader:
        """Build the loader of this rank's share; accelerate, which would share it out again, is left out."""
        args = self.args
        if self.order is None:
            seed = args.seed if args.data_seed is None else args.data_seed
            self.order = Order((Part((len(self.train_dataset),)),), seed)
        workers = args.dataloader_num_workers
        self.batches = RankBatches(self.order, self._train_batch_size, args.process_index, args.world_size, workers)
        return build_loader(
            self.train_dataset,
            self.batches,
            self.data_collator,
            workers,
            self.on_error,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
        )

    def get_eval_dataloader(self, eval_dataset: Dataset | None = None) -> DataLoader:
        """Build the loader of what is held out; what can't be read is skipped there too."""
        dataset, collate = eval_dataset or self.eval_dataset, self.data_collator
        if dataset is not None and self.on_error != "raise":
            eval_dataset, self.data_collator = DrawnSamples(dataset, self.on_error), collate_drawn(collate)
        try:
            loader = super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = collate
        loader.base_dataloader.worker_init_fn = step_aside  # of accelerate's wrapper
        return loader

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device):
        """Take the batches of an optimizer step, and note where it began."""
        self._step_start = (self._batches_done, self._tr_loss.clone())
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._batches_done += len(batches)
        return batches, count

    def undo_step(self) -> None:
        """Stand again where the unfinished optimizer step began."""
        self._batches_done, self._tr_loss = self._step_start

    def take_skipped(self, batches: list[dict[str, Any]]) -> list[str]:
        """Take out of loaded batches what was wrong with samples that were left out."""
        return [text for batch in batches for text in batch.pop(SKIPPED, [])]

    # Going on

    def set_initial_training_values(self, args, dataloader):
        """Count steps as Trainer does; epochs that go on in other batches have other steps left."""
        *values, max_steps = super().set_initial_training_values(args, dataloader)
        if self.resumed and args.max_steps <= 0 and self._change():
            begun = self.batches.seek(
                self.resumed.epoch, self.resumed.position, self.resumed.lanes, self._accumulation
            )
            epochs = math.ceil(args.num_train_epochs) - self.resumed.epoch
            max_steps = self.resumed.step + epochs * values[1] - begun // self._accumulation
        return (*values, max_steps)

    def _init_training_state(self, max_steps, num_update_steps_per_epoch, *others):
        """Say in which epoch to go on, and after how many of its batches."""
        found = super()._init_training_state(max_steps, num_update_steps_per_epoch, *others)
        if self.resumed is None:
            return found
        saved = self.resumed
        if saved.position < len(self.order) and saved.step < max_steps:
            return saved.epoch, self.batches.seek(saved.epoch, saved.position, saved.lanes, self._accumulation)
        if saved.epoch_is_over:
            return saved.epoch + 1, 0
        # All steps of this epoch are done, and not yet what follows the last of them.
        self.batches.seek(saved.epoch, saved.position, saved.lanes)
        return saved.epoch, num_update_steps_per_epoch * self._accumulation

    def take_up(self) -> None:
        """Go on with the log and the generators where the checkpoint left them; in a new run, let ranks draw apart."""
        saved, rank = self.resumed, self.args.process_index
        self._began = time.monotonic()
        if saved is None:
            if rank:
                self._draw_apart(0)
            return
        change = self._change()
        if change:
            self.tell("resumed_differently", change)
        if saved.ranks == self.args.world_size:
            self._tr_loss += saved.losses[rank]
        else:
            self._tr_loss += sum(saved.losses) / len(saved.losses)
        self._total_loss_scalar, self._globalstep_last_logged = saved.total_loss, saved.logged_step
        self.skipped = saved.skipped
        self._load_rng_state(self._checkpoint(saved.step))

    def tell(self, kind: str, text: str) -> None:
        """Say what a user should know."""
        logger.warning(text)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Put this rank's generators back; where there were other ranks, begin new draws."""
        if self.resumed.ranks == self.args.world_size:
            super()._load_rng_state(checkpoint)
        else:
            self._draw_apart(self.resumed.step)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Read the optimizer's states by way of the host, on several ranks too: Trainer would read them onto each GPU, and
        bitsandbytes copy them there.
        """
        file = Path(checkpoint or "", OPTIMIZER_NAME)
        if checkpoint is None or not file.is_file():  # as where states are sharded
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        self.optimizer.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        self.lr_scheduler.load_state_dict(torch.load(file.with_name(SCHEDULER_NAME), weights_only=True))

    def _draw_apart(self, step: int) -> None:
        """Seed torch, numpy and Python by rank; Trainer gives all ranks one seed, and so the same dropout."""
        numbers = np.random.SeedSequence([self.args.seed, self.args.process_index, step])
        set_seed(int(numbers.generate_state(1)[0]))

    def _run_epoch(
        self,
        *,
        epoch,
        epochs_trained,
        steps_in_epoch,
        num_update_steps_per_epoch,
        steps_trained_in_current_epoch,
        **others,
    ):
        """Run what is left of an epoch: to Trainer a whole, shorter one, since its loader stands where that begins."""
        begun = steps_trained_in_current_epoch if epoch == epochs_trained else 0
        self._batches_done, self._steps_in_epoch, self._epoch_is_over = begun, steps_in_epoch, False
        skipped = begun if begun < steps_in_epoch else 0  # an epoch of no steps would end the training
        super()._run_epoch(
            epoch=epoch,
            epochs_trained=epochs_trained,
            steps_in_epoch=steps_in_epoch - skipped,
            num_update_steps_per_epoch=num_update_steps_per_epoch - skipped // self._accumulation,
            steps_trained_in_current_epoch=begun - skipped,
            **others,
        )

    def end_step(self) -> None:
        """Say how far the training is by the whole epoch's steps."""
        self.state.epoch = self.batches.epoch + self._batches_done / self._steps_in_epoch

    def end_epoch(self) -> None:
        """Note that an epoch's steps are done: what is saved from now on goes on with the next."""
        self._epoch_is_over = True

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as Trainer does, the whole run's mean loss and speed in place of those since it went on."""
        if "train_loss" in logs:
            self._summary = {**self._speed(), "train_loss": self.mean_loss}
            logs.update(self._summary)
        super().log(logs, start_time)

    def _speed(self) -> dict[str, float]:
        seconds = self.seconds
        return {
            "train_runtime": round(seconds, 4),
            "train_samples_per_second": round(self.state.epoch * len(self.order) / seconds, 3),
            "train_steps_per_second": round(self.state.global_step / seconds, 3),
        }

    @property
    def mean_loss(self) -> float:
        """Give the mean loss of all steps since the run began, once training has ended."""
        return self._total_loss_scalar / max(self.state.global_step, 1)

    @property
    def seconds(self) -> float:
        """Give the seconds that training took so far, those before it went on among them."""
        return (self.resumed.seconds if self.resumed else 0.0) + time.monotonic() - self._began

    @property
    def _accumulation(self) -> int:
        return self.args.gradient_accumulation_steps

    def _change(self) -> str | None:
        return self.resumed.describe_change(
            len(self.order), self.args.world_size, self._train_batch_size, self._accumulation
        )

    # Checkpoints

    def progress(self) -> Progress:
        """Say where the training stands; all ranks ask together."""
        losses = self.accelerator.gather(self._tr_loss.detach().reshape(1)).tolist()
        return Progress(
            step=self.state.global_step,
            epoch=self.batches.epoch,
            position=self.batches.position_after(self._batches_done),
            epoch_is_over=self._epoch_is_over,
            samples=len(self.order),
            lanes=self.batches.lanes,
            ranks=self.args.world_size,
            batch_size=self._train_batch_size,
            accumulation=self._accumulation,
            losses=losses,
            total_loss=self._total_loss_scalar,
            logged_step=self._globalstep_last_logged,
            seconds=self.seconds,
            skipped=self.skipped,
        )

    def _save_checkpoint(self, model, trial) -> None:
        """Write a checkpoint, whole or not at all; keep the newest ones and the best."""
        with saving.said_plainly(Path(self.args.output_dir)):
            self._write_checkpoint()

    def _write_checkpoint(self) -> None:
        run = Path(self.args.output_dir)
        if self.args.should_save:
            saving.begin(run, self.state.global_step)
        self._wait()
        aside = saving.aside(run, self.state.global_step)
        self.store_flos()
        self.save_model(str(aside), _internal_call=True)
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(str(aside))
            self._save_scaler(str(aside))
            self._save_rng_state(str(aside))
        progress = self.progress()
        self._wait()
        if self.args.should_save:
            progress.save(aside)
            self._save_state(aside)
            saving.finish(run, self.state.global_step)
            saving.keep(run, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _save_state(self, directory: Path) -> None:
        step = self.state.best_global_step
        if step is not None and (step == self.state.global_step or Path(self._checkpoint(step)).is_dir()):
            self.state.best_model_checkpoint = self._checkpoint(step)
        stateful = [c for c in (*self.callback_handler.callbacks, self.control) if isinstance(c, ExportableState)]
        self.state.stateful_callbacks.update({type(c).__name__: c.state() for c in stateful})
        self.state.save_to_json(str(directory / TRAINER_STATE_NAME))

    def _checkpoint(self, step: int) -> str:
        return str(saving.place(Path(self.args.output_dir), step))

    def _wait(self) -> None:
        if self.args.world_size > 1:
            dist.barrier()


class _Bookmark(TrainerCallback):
    """Tells the trainer of the moments that it has no method for."""

    def __init__(self, trainer: ResumableTrainer):
        self._trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self._trainer.take_up()

    def on_step_end(self, args, state, control, **kwargs):
        self._trainer.end_step()

    def on_epoch_end(self, args, state, control, **kwargs):
        self._trainer.end_epoch()
