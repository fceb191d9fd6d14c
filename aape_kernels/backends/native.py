"""The native module: loaded on first use, chosen instruction set, and tensors as it takes them."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from ..geometry import PatchGrid

__all__ = ["DTYPE_CODES", "Ranges", "gather", "instruction_set", "load", "sblu", "sblu_backward", "sizes", "view"]

# decay low, log(high/low), band low, band width: given where decay and frequency are the Lambda Encoder's logits
Ranges = tuple[float, float, float, float]

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # enum class DType of calls.h


@functools.cache
def load() -> ModuleType:
    """The native module. Errors: `ImportError` with the loader's own words."""
    return importlib.import_module("aape_kernels._native")


@functools.cache
def _runnable() -> tuple[str, ...]:
    return tuple(load().build_info()["instruction_sets"])


def instruction_set() -> str:
    """The fastest instruction set that the module has and this machine runs, or the one that `AAPE_CPU_ISA` names.

    Errors: `ValueError` if `AAPE_CPU_ISA` names one that is not built or does not run here.
    """
    names = _runnable()
    name = os.environ.get("AAPE_CPU_ISA", "")
    if not name:
        return names[0]
    if name not in names:
        raise ValueError(f"AAPE_CPU_ISA: expected one of {', '.join(names)} on this machine, got {name!r}")
    return name


def sizes(x: Tensor, grid: PatchGrid, states: int) -> tuple[int, ...]:
    """The twelve sizes of `struct Grid` for x (B, C, F, T)."""
    return (*x.shape, *grid.patch, *grid.stride, grid.window, *grid.tokens(x.shape[2], x.shape[3]), states)


def view(tensor: Tensor | None) -> tuple[int, tuple[int, ...], int] | None:
    """A tensor as pointer, element strides and dtype code."""
    return None if tensor is None else (tensor.data_ptr(), tensor.stride(), DTYPE_CODES[tensor.dtype])


def sblu(
    x: Tensor,
    decay: Tensor,
    frequency: Tensor,
    weight: Tensor,
    features: Tensor | None,
    grid: PatchGrid,
    quadrature: bool,
    ranges: Ranges | None = None,
    grad_features: Tensor | None = None,
    grad_y: Tensor | None = None,
) -> None:
    """Write the features (B, N_f, N_t, planes, S): y with 2 planes, n with 1, y and n with 3 (docs/maths.md §4).

    With their cotangent, that of y is written to grad_y (B, N_f, N_t, 2, S). decay, frequency and weight are in the
    arithmetic's dtype. All strides are taken.
    """
    (like, *_) = (value for value in (features, grad_features) if value is not None)
    load().sblu(
        instruction_set(),
        sizes(x, grid, weight.shape[0]),
        quadrature,
        ranges,
        *map(view, (x, decay, frequency, weight, features)),
        like.shape[3],
        *map(view, (grad_features, grad_y)),
        torch.get_num_threads(),
    )


def sblu_backward(
    grad: Tensor,
    x: Tensor,
    decay: Tensor,
    frequency: Tensor,
    weight: Tensor,
    y: Tensor | None,
    gradients: Sequence[Tensor | None],
    grid: PatchGrid,
    quadrature: bool,
    ranges: Ranges | None = None,
) -> None:
    """Write the gradients of decay, frequency and weight and add to that of x, in the arithmetic's dtype, None where
    not needed. With those of decay and frequency y comes for nothing, if it is given."""
    load().sblu_backward(
        instruction_set(),
        sizes(x, grid, weight.shape[0]),
        quadrature,
        ranges,
        *map(view, (grad, x, decay, frequency, weight, y, *gradients)),
        torch.get_num_threads(),
    )


def gather(x: Tensor, patches: Tensor, grid: PatchGrid) -> None:
    """Write the patches of x, (B, N_f, N_t, C·P_f·P_t); fastest where one of the last two axes is contiguous."""
    load().gather(instruction_set(), sizes(x, grid, 0), view(x), view(patches), torch.get_num_threads())
