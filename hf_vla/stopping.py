"""Leaving when asked: at a scheduler's SIGTERM, or Ctrl-C, the step that runs is ended and a checkpoint written.

Trainer's own way, `enable_jit_checkpoint`, saves within a step too: a run that goes on would never see that step's samples.
"""

import logging
import os
import signal
import threading

from transformers import TrainerCallback

from hf_vla.memory import ranks

SIGNALS = (signal.SIGTERM, signal.SIGINT)

logger = logging.getLogger(__name__)


class StopWhenAsked(TrainerCallback):
    """While it is entered, a signal asks the training to stop, on all ranks after the same step; a second stops at once."""

    def __init__(self):
        self.signal: signal.Signals | None = None
        """That this process was sent."""
        self.has_stopped = False
        self._process = os.getpid()
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopWhenAsked":
        if threading.current_thread() is threading.main_thread():  # others can't handle signals
            self._before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def on_step_end(self, args, state, control, **kwargs):
        """Save and stop, if any rank was asked to; after the last step the training ends by itself."""
        if state.global_step < state.max_steps and ranks.any_of_them(self.signal is not None, args.device):
            control.should_save = control.should_training_stop = self.has_stopped = True

    def on_epoch_end(self, args, state, control, **kwargs):
        """Leave out what an epoch ends with, since this one hasn't: Trainer says so wherever its loop is left."""
        if self.has_stopped:
            control.should_log = control.should_evaluate = control.should_save = False

    @property
    def exit_code(self) -> int:
        """What a shell expects of a process that ended by this signal."""
        return 128 + (self.signal or signal.SIGTERM)

    def _ask(self, number: int, frame: object) -> None:
        signal.signal(number, self._before[number])
        if os.getpid() != self._process:  # a worker of the loader, which has inherited this
            os.kill(os.getpid(), number)
            return
        self.signal = signal.Signals(number)
        logger.warning("%s: ending this step and writing a checkpoint; once more stops at once.", self.signal.name)
