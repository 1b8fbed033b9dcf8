"""What every test runs under."""

import signal

import datasets
import pytest

signal.signal(signal.SIGINT, signal.default_int_handler)
"""A shell that runs the tests in the background has them, and the programs that they start, ignore Ctrl-C."""


@pytest.fixture(autouse=True, scope="session")
def own_datasets_cache(tmp_path_factory):
    """Keep the Arrow caches of tiny test datasets out of the user's own, and their progress bars out of the output."""
    patch = pytest.MonkeyPatch()
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    datasets.disable_progress_bars()
    yield
    patch.undo()
