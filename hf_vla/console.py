"""What a person reads on the terminal: our own words, and none that libraries say to their developers."""

import logging

from transformers.utils import logging as transformers_logging


def set_up_logging() -> None:
    """Show our messages as plain lines, and quiet what no user of a recipe can act on."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for chatty in ("httpx", "httpx2", "datasets", "absl", "OpenGL"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)  # of broken files, which our errors name
    # bitsandbytes advises an optional CPU kernel whenever PEFT or accelerate import it, even if nothing is quantised.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()  # of loading and writing weights; Trainer's own bar stays
