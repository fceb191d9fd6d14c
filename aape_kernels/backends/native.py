"""The native module: loading it on first use, and what it is passed beside tensors."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch

from ..geometry import PatchGrid

__all__ = ["DTYPE_CODES", "has_products", "instruction_set", "load", "sizes"]

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # enum class DType of calls.h


@functools.cache
def load() -> ModuleType:
    """The native module. Errors: `ImportError` with the loader's own words."""
    return importlib.import_module("aape_kernels._native")


@functools.cache
def has_products(dtype: torch.dtype) -> bool:
    """Whether this processor has instructions for matrix products of a 16-bit dtype; torch emulates them elsewhere."""
    return str(dtype).removeprefix("torch.") in load().build_info()["narrow_products"]


def instruction_set() -> str:
    """The fastest instruction set that the module has and this machine runs, or the one that `AAPE_CPU_ISA` names.

    Errors: `ValueError` if `AAPE_CPU_ISA` names one that is not built or does not run here.
    """
    name: str = load().instruction_set()
    return name


def sizes(grid: PatchGrid, states: int) -> tuple[int, ...]:
    """What the native module makes a `struct Grid` of, beside x: (P_f, P_t, S_f, S_t, window, states)."""
    return (*grid.patch, *grid.stride, grid.window, states)
