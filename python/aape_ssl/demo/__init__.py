"""What a stem hears, as a picture: the command `demo`, its arithmetic, and the clips that come with it."""

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    """What `aape_ssl.demo` held when it was one module."""
    if name.startswith("__"):
        raise AttributeError(name)
    return getattr(import_module(f"{__name__}.command"), name)
