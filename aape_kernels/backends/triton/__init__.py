"""The Triton backend: SBLU and the stem's prologue as fused kernels, with the matrix product by the library's GEMM.

Importing this package does not import Triton: the kernels are imported when the registered ops first need them.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .. import Call

__all__ = ["TRITON_INSTALLED", "embed", "embed_backward", "reason", "sblu", "sblu_backward"]

TRITON_INSTALLED = find_spec("triton") is not None

# The first NVIDIA generation with bfloat16, and the oldest that the kernels are compiled for in the tests.
OLDEST_CAPABILITY = 8


def reason(call: Call) -> str | None:
    """Why this backend cannot run `call`, which is on a GPU, or on the CPU if the interpreter is on."""
    if not TRITON_INSTALLED:
        return 'Triton is not installed; `pip install "triton>=3.6"`'
    if call.dtype == torch.float64:
        return "it computes in float32, and x is float64"
    if call.device.type == "cuda" and torch.version.hip is None:
        properties = torch.cuda.get_device_properties(call.device)
        if properties.major < OLDEST_CAPABILITY:
            found = f"{properties.major}.{properties.minor}"
            return f"it needs compute capability {OLDEST_CAPABILITY}.0, {call.device} has {found}"
    return None


def interpreted() -> bool:
    """Whether Triton's interpreter is on, which runs kernels on CPU tensors: for tests, thousands of times slower."""
    return os.environ.get("TRITON_INTERPRET") == "1"


# Called only for names that the package does not have: no submodule may have one of these names, as importing it would
# make it an attribute.
def __getattr__(name: str) -> Any:
    if name in ("embed", "embed_backward", "sblu", "sblu_backward"):
        from . import launch

        return getattr(launch, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
