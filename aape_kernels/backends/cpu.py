"""The CPU backend: SBLU, and the whole stem in `cpu_stem`, computed by the native module.

The functions take the arguments of the registered ops; `functional` has checked the tensors.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from torch import Tensor

from ..geometry import PatchGrid
from ..reference import working_dtype
from . import native
from .cpu_stem import embed, embed_backward

if TYPE_CHECKING:
    from . import Call

__all__ = ["NATIVE_BUILT", "embed", "embed_backward", "reason", "sblu", "sblu_backward"]

# Whether this installation has the native module: looks for the file without loading it.
NATIVE_BUILT = find_spec("aape_kernels._native") is not None


def reason(call: Call) -> str | None:
    """Why this backend cannot run `call`, which is on the CPU."""
    if not NATIVE_BUILT:
        return "the native module was not built; `AAPE_NATIVE=require pip install …` shows why"
    return None


def sblu(x: Tensor, decay: Tensor, frequency: Tensor, weight: Tensor, grid: PatchGrid, quadrature: bool) -> Tensor:
    """y (B, N_f, N_t, 2, S) in x's dtype; x is read through its strides."""
    y = x.new_empty(*decay.shape[:3], 2, decay.shape[3])
    if y.numel():
        dtype = working_dtype(x.dtype)
        native.sblu(x, decay.to(dtype), frequency.to(dtype), weight.to(dtype), y, grid, quadrature)
    return y


def sblu_backward(
    grad: Tensor,
    x: Tensor,
    decay: Tensor,
    frequency: Tensor,
    weight: Tensor,
    grid: PatchGrid,
    quadrature: bool,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, decay, frequency, weight in their dtypes, contiguous; empty where not needed."""
    dtype = working_dtype(x.dtype)
    wide = (decay.to(dtype), frequency.to(dtype), weight.to(dtype))
    # the native call writes gradients but adds to x's, and nothing is written for an empty batch
    made = [x.new_zeros, *[x.new_empty if grad.numel() else x.new_zeros] * 3]
    out = [
        make(value.shape, dtype=dtype) if wanted else None
        for make, value, wanted in zip(made, (x, *wide), need, strict=True)
    ]
    if grad.numel() and any(need):
        native.sblu_backward(grad, x, *wide, out, grid, quadrature)
    gradients = [
        value.new_empty(0) if gradient is None else gradient.to(value.dtype)
        for value, gradient in zip((x, decay, frequency, weight), out, strict=True)
    ]
    return gradients[0], gradients[1], gradients[2], gradients[3]
