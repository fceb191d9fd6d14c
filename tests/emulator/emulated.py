"""csrc/cuda on the CPU: built by the host compiler behind emulator.h, called on tensors."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
from collections.abc import Sequence
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
    loaded.sblu.restype = ctypes.c_char_p
    return loaded


def _numbers(values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*values)


def _view(tensor: Tensor) -> list[int]:
    strides = [*tensor.stride(), 0, 0, 0, 0, 0][:5]
    return [tensor.data_ptr(), *strides, DTYPE_CODES[tensor.dtype]]


def sblu(
    path: Path, x: Tensor, decay: Tensor, frequency: Tensor, weight: Tensor, grid: PatchGrid, quadrature: bool,
    order: str = "forward", seed: int = 0, ranges: tuple[float, ...] | None = None,
) -> Tensor:  # fmt: skip
    """y of `aape_kernels.sblu`, from memory poisoned before; `order` is that in which a block's threads take turns."""
    work = working_dtype(x.dtype)
    decay, frequency, weight = (value.to(work).contiguous() for value in (decay, frequency, weight))
    y = torch.full((*decay.shape[:3], 2, decay.shape[3]), torch.nan, dtype=x.dtype)
    sizes = _numbers([*x.shape, *grid.patch, *grid.stride, grid.window, *decay.shape[1:3], decay.shape[3]])
    views = _numbers([number for value in (x, decay, frequency, weight.flatten(1), y) for number in _view(value)])
    native = library(path)
    native.set_order(ORDERS.index(order), seed)
    said = native.sblu(sizes, int(quadrature), views, None if ranges is None else (ctypes.c_double * 4)(*ranges))
    if said is not None:
        raise RuntimeError(said.decode())
    return y
