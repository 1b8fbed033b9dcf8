"""Curves of a training for TensorBoard, which a full disk ends and the training outlives."""

import logging

from transformers import Trainer
from transformers.integrations import TensorBoardCallback

logger = logging.getLogger(__name__)


class TensorBoard(TensorBoardCallback):
    """Trainer's own, save that a file that can't be written costs the rest of the curves and not the training."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Write what was logged; `log_history.json` gets all of it in any case."""
        try:
            super().on_log(args, state, control, logs, **kwargs)
        except OSError as error:
            self.tb_writer = self._SummaryWriter = None  # of which no other is made, then
            logger.warning(
                "Step %d: TensorBoard's curves end here, they can't be written: %s.", state.global_step, error
            )

    def on_train_end(self, args, state, control, **kwargs):
        """Close the file."""
        try:
            super().on_train_end(args, state, control, **kwargs)
        except OSError as error:
            logger.warning("The end of TensorBoard's curves can't be written: %s.", error)


def outlive_tensorboard(trainer: Trainer) -> None:
    """Put ours in the place of Trainer's own, where the recipe reports to TensorBoard."""
    if trainer.pop_callback(TensorBoardCallback):
        trainer.add_callback(TensorBoard)
