"""What a person reads on the terminal: our own words, and none that libraries say to their developers."""

import logging
import sys


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
