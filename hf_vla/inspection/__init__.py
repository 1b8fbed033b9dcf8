"""What is wrong with a dataset, before a training finds out: `hf-vla inspect DATASET` writes one HTML page."""

from hf_vla.inspection.finding import Finding
from hf_vla.inspection.inspect_dataset import inspect

__all__ = ["Finding", "inspect"]
