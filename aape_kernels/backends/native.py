"""The native module: loaded on first use, chosen instruction set, and tensors as it takes them."""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType

import torch
from torch import Tensor

from ..geometry import PatchGrid

__all__ = ["instruction_set", "load", "sizes", "view"]

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # enum class DType of api.h


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
