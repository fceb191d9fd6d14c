"""The CPU backend: SBLU, and the whole stem in `cpu_stem`, computed by the native module.

The functions take the arguments of the registered ops; `functional` has checked the tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
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


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    # `to` takes most of a µs where there is nothing to do
    return value if value.dtype == dtype else value.to(dtype)


def sblu(x: Tensor, decay: Tensor, frequency: Tensor, weight: Tensor, grid: PatchGrid, quadrature: bool) -> Tensor:
    """y (B, N_f, N_t, 2, S) in x's dtype; x is read through its strides."""
    y = x.new_empty(*decay.shape[:3], 2, decay.shape[3])
    if y.numel():
        dtype = working_dtype(x.dtype)
        wide = (_cast(decay, dtype), _cast(frequency, dtype), _cast(weight, dtype))
        native.load().sblu(x, native.sizes(grid, weight.shape[0]), quadrature, *wide, y, torch.get_num_threads())
    return y


def sblu_backward(
    grad: Tensor,
    x: Tensor,
    decay: Tensor,
    frequency: Tensor,
    weight: Tensor,
    grid: PatchGrid,
    quadrature: bool,
    need: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, decay, frequency, weight in their dtypes, contiguous; None where not needed."""
    dtype = working_dtype(x.dtype)
    wide = (_cast(decay, dtype), _cast(frequency, dtype), _cast(weight, dtype))
    # the native call writes gradients but adds to x's, and nothing is written for an empty batch
    make = torch.empty_like if grad.numel() else torch.zeros_like
    out: list[Tensor | None] = [x.new_zeros(x.shape, dtype=dtype) if need[0] else None]
    for value, wanted in zip(wide, need[1:], strict=True):
        out.append(make(value, memory_format=torch.contiguous_format) if wanted else None)
    if grad.numel() and any(need):
        shape, threads = native.sizes(grid, weight.shape[0]), torch.get_num_threads()
        native.load().sblu_backward(x, shape, quadrature, *wide, grad, tuple(out), threads)
    if dtype != x.dtype:
        inputs = (x, decay, frequency, weight)
        out = [None if one is None else one.to(value.dtype) for one, value in zip(out, inputs, strict=True)]
    return tuple(out)
