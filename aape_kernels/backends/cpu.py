"""The CPU backend's place: says whether the native module is there and what it holds."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import Call

__all__ = ["NATIVE_BUILT", "reason"]

# Whether this installation has the native module: looks for the file without loading it.
NATIVE_BUILT = find_spec("aape_kernels._native") is not None


def reason(call: Call) -> str | None:
    """Why this backend cannot run `call`."""
    if call.device.type != "cpu":
        return f"it runs on cpu tensors, not on {call.device}"
    if not NATIVE_BUILT:
        return "the native module was not built; `AAPE_NATIVE=require pip install …` shows why"
    return "this version's native module has no kernels"
