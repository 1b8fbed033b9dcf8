"""What a person reads on the terminal: our own words, and none that libraries say to their developers."""

import logging
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # this file comes before all imports that take their time
    from rich.progress import Progress


def end_quietly_when_interrupted() -> None:
    """Let Ctrl-C end a program as it ends any other, without a traceback; to be called before imports that take seconds."""
    show = sys.excepthook
    sys.excepthook = lambda kind, *rest: None if issubclass(kind, KeyboardInterrupt) else show(kind, *rest)


def set_up_logging() -> None:
    """Show our messages as plain lines, and quiet what no user of a recipe can act on."""
    from transformers.utils import logging as transformers_logging

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for chatty in ("httpx", "httpx2", "datasets", "absl", "OpenGL"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)  # of broken files, which our errors name
    # bitsandbytes advises an optional CPU kernel whenever PEFT or accelerate import it, even if nothing is quantised.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()  # of loading and writing weights; Trainer's own bar stays


def passing_progress() -> "Progress":
    """Show on a terminal how far a job is, and nothing once it is done, nor in a log."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    return Progress(console=console, transient=True, disable=not console.is_terminal)
