"""What the tests of failures share."""

import gc

import pytest


@pytest.fixture(autouse=True, scope="module")
def collect_fast():
    """Leave what is imported out of garbage collection: every recovery collects, and that takes most of a second."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
