"""Pre-training and fine-tuning: modules, optimisation, sharding, monitor, and the commands that run them."""

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    """What `aape_ssl.training` held when it was one module."""
    if name.startswith("__"):
        raise AttributeError(name)
    return getattr(import_module(f"{__name__}.pretraining"), name)
