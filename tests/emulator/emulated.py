"""csrc/cuda on the CPU: built by the host compiler behind emulator.h, called on tensors."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from aape_kernels.backends.native import DTYPE_CODES
from aape_kernels.geometry import PatchGrid
from aape_kernels.reference import working_dtype

ROOT = Path(__file__).parents[2]
ORDERS = ("forward", "reverse", "shuffled")


def compiler() -> str | None:
    """The host compiler, None if there is none."""
    return shutil.which(os.environ.get("CXX", "g++"))


def build(target: Path, *flags: str, root: Path = ROOT) -> Path:
    """Compile emulated.cpp, of this checkout or of a copy of it, into a library."""
    command = [compiler(), "-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    here = root / "tests" / "emulator"
    command += ["-fPIC", "-shared", f"-I{here}", *flags, str(here / "emulated.cpp"), "-o", str(target)]
    subprocess.run(command, check=True)
    return target


@functools.cache
def library(path: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path))
    loaded.sblu.restype = loaded.sblu_backward.restype = ctypes.c_char_p
    loaded.windows_size.restype = ctypes.c_int64
    return loaded


def _numbers(values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*values)


def _view(tensor: Tensor | None) -> list[int]:
    if tensor is None:
        return [0] * 7
    strides = [*tensor.stride(), 0, 0, 0, 0, 0][:5]
    return [tensor.data_ptr(), *strides, DTYPE_CODES[tensor.dtype]]


def _views(*tensors: Tensor | None) -> ctypes.Array[ctypes.c_int64]:
    return _numbers([number for tensor in tensors for number in _view(tensor)])


def _check(said: bytes | None) -> None:
    if said is not None:
        raise RuntimeError(said.decode())


@dataclass
class Emulated:
    """The kernels of one library; `order` is that in which a block's threads take turns, shuffled by `seed`.

    All memory that they write to is poisoned before.
    """

    path: Path
    order: str = "forward"
    seed: int = 0

    def _library(self) -> ctypes.CDLL:
        native = library(self.path)
        native.set_order(ORDERS.index(self.order), self.seed)
        return native

    def sblu(
        self, x: Tensor, decay: Tensor, frequency: Tensor, weight: Tensor, grid: PatchGrid, quadrature: bool,
        ranges: tuple[float, ...] | None = None,
    ) -> Tensor:  # fmt: skip
        """y, as `aape_kernels.reference.sblu`; with ranges decay and frequency are logits."""
        states = _arithmetic(x, decay, frequency, weight)
        y = _poisoned(x, *decay.shape[:3], 2, decay.shape[3])
        views = _views(x, *states, y)
        _check(self._library().sblu(_sizes(x, decay, grid), int(quadrature), views, _ranges(ranges)))
        return y

    def sblu_backward(
        self, grad: Tensor, x: Tensor, decay: Tensor, frequency: Tensor, weight: Tensor, grid: PatchGrid,
        quadrature: bool, ranges: tuple[float, ...] | None = None, programs: int = 3,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """Gradients of x, decay, frequency, weight, and y; the weight's as the sum of `programs` partial sums."""
        states = _arithmetic(x, decay, frequency, weight)
        work = states[0]
        y = _poisoned(x, *decay.shape[:3], 2, decay.shape[3])
        grad_x, grad_decay, grad_frequency = _poisoned(x, *x.shape), _poisoned(work, *decay.shape), _poisoned(
            work, *decay.shape)  # fmt: skip
        partial = _poisoned(work, programs, *weight.flatten(1).shape)
        views = _views(x, *states, y, grad, grad_x, grad_decay, grad_frequency)
        native, sizes = self._library(), _sizes(x, decay, grid)
        windows = _poisoned(work, native.windows_size(sizes, views))
        pointers = ctypes.c_void_p(partial.data_ptr()), ctypes.c_int64(programs), ctypes.c_void_p(windows.data_ptr())
        _check(native.sblu_backward(sizes, int(quadrature), views, _ranges(ranges), *pointers))
        return grad_x, grad_decay, grad_frequency, partial.sum(0).view(weight.shape), y


def _arithmetic(x: Tensor, decay: Tensor, frequency: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    work = working_dtype(x.dtype)
    return decay.to(work).contiguous(), frequency.to(work).contiguous(), weight.to(work).flatten(1).contiguous()


def _poisoned(like: Tensor, *shape: int) -> Tensor:
    return torch.full(shape, torch.nan, dtype=like.dtype)


def _sizes(x: Tensor, decay: Tensor, grid: PatchGrid) -> ctypes.Array[ctypes.c_int64]:
    return _numbers([*x.shape, *grid.patch, *grid.stride, grid.window, *decay.shape[1:]])


def _ranges(ranges: tuple[float, ...] | None) -> ctypes.Array[ctypes.c_double] | None:
    return None if ranges is None else (ctypes.c_double * 4)(*ranges)
