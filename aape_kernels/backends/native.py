"""The native module: loading it on first use, and passing it tensors."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from ..geometry import PatchGrid
from ..ranges import LogitRanges

__all__ = [
    "DTYPE_CODES",
    "Stem",
    "has_products",
    "instruction_set",
    "load",
    "sblu",
    "sblu_backward",
    "sizes",
    "view",
    "views",
]

# pointer, element strides, dtype code
View = tuple[int, tuple[int, ...], int]

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


def sizes(x: Tensor, grid: PatchGrid, states: int) -> tuple[int, ...]:
    """The twelve sizes of `struct Grid` for x (B, C, F, T)."""
    return (*x.shape, *grid.patch, *grid.stride, grid.window, *grid.tokens(x.shape[2], x.shape[3]), states)


def views(*tensors: Tensor | None) -> tuple[View | None, ...]:
    """Tensors as pointer, element strides and dtype code; None where there is none.

    Errors: `RuntimeError` for a tensor whose memory was freed, as FSDP does with parameters outside of its forward.
    """
    found: list[View | None] = []
    for tensor in tensors:  # in one function for all: behind a large call each more costs µs
        if tensor is None:
            found.append(None)
            continue
        pointer = tensor.data_ptr()
        if not pointer and tensor.numel():
            raise RuntimeError(
                f"expected tensors that have memory, got one of shape {tuple(tensor.shape)} whose memory was freed "
                "(by FSDP, whose own forward brings it back?)"
            )
        found.append((pointer, tensor.stride(), DTYPE_CODES[tensor.dtype]))
    return tuple(found)


def view(tensor: Tensor) -> View | None:
    """A tensor as `views` has it."""
    return views(tensor)[0]


def sblu(
    x: Tensor,
    decay: Tensor,
    frequency: Tensor,
    weight: Tensor,
    y: Tensor,
    grid: PatchGrid,
    quadrature: bool,
) -> None:
    """Write y (B, N_f, N_t, 2, S); decay, frequency and weight are in the arithmetic's dtype. Any strides will do."""
    load().sblu(
        sizes(x, grid, weight.shape[0]),
        quadrature,
        None,
        *views(x, decay, frequency, weight, y),
        torch.get_num_threads(),
    )


class Stem:
    """The whole stem of one call: the module's `embed` and `embed_backward`, with tensors in place of pointers.

    Args:
        shape: planes of the features, D, H, whether tokens are time-major.
    """

    def __init__(
        self,
        x: Tensor,
        grid: PatchGrid,
        quadrature: bool,
        ranges: LogitRanges,
        states: int,
        shape: tuple[int, int, int, bool],
    ) -> None:
        self.given = (sizes(x, grid, states), quadrature, ranges, shape, view(x))

    def forward(self, weights: Sequence[Tensor | None], outputs: Sequence[Tensor | None]) -> None:
        """Write tokens, operand (either may be missing), hidden and r."""
        load().embed(*self.given, views(*weights), views(*outputs), torch.get_num_threads())

    def backward(
        self, weights: Sequence[Tensor | None], given: Sequence[Tensor | None], gradients: Sequence[Tensor | None]
    ) -> None:
        """Write the gradients of x and the weights, None where not needed.

        Args:
            given: hidden, r, the cotangent of the tokens or of the features, and the operand, which is written.
        """
        load().embed_backward(*self.given, views(*weights), views(*given), views(*gradients), torch.get_num_threads())


def sblu_backward(
    grad: Tensor,
    x: Tensor,
    decay: Tensor,
    frequency: Tensor,
    weight: Tensor,
    gradients: Sequence[Tensor | None],
    grid: PatchGrid,
    quadrature: bool,
) -> None:
    """Write the gradients of decay, frequency and weight and add to that of x, in the arithmetic's dtype, None where
    not needed."""
    load().sblu_backward(
        sizes(x, grid, weight.shape[0]),
        quadrature,
        None,
        *views(grad, x, decay, frequency, weight, None, *gradients),
        torch.get_num_threads(),
    )
