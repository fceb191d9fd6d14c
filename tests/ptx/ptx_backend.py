"""Backend "cuda" on CPU tensors, by nvcc's own PTX: recorded launches of the real launcher, run by the interpreter."""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import emulated
import pybind11
import pytest
from ptx_machine import Observer, Program, run
from ptx_memory import Global
from ptx_text import ENTRY, kernel_of
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
NVCC = shutil.which("nvcc")
# as CMakeLists.txt has them
FLAGS = ("-std=c++17", "--expt-relaxed-constexpr", "--fmad=false", "-O3", "-Icsrc", "-Icsrc/cuda")
SOURCE = {"gradients_kernel": "gradients", "gather_kernel": "gather", "overlap_add_kernel": "overlap_add",
          "sblu_forward_kernel": "sblu_forward", "sblu_backward_states_kernel": "sblu_backward",
          "sblu_backward_weight_kernel": "sblu_backward", "sblu_backward_windows_kernel": "sblu_backward",
          "standardise_kernel": "standardise", "stem_kernel": "stem", "warp_sblu_kernel": "warp_sblu",
          "warp_sblu_backward_kernel": "warp_sblu_backward", "warp_stem_kernel": "warp_stem",
          "warp_stem_backward_kernel": "warp_stem_backward", "warp_tokens_kernel": "warp_tokens",
          "token_weights_kernel": "warp_tokens"}  # fmt: skip


@functools.cache
def ptx_of(source: str, architecture: int = 90) -> str:
    """What nvcc makes of csrc/cuda/`source`.cu."""
    assert NVCC is not None
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "out.ptx"
        command = [NVCC, *FLAGS, f"-arch=sm_{architecture}", "-ptx", "-o", str(target), f"csrc/cuda/{source}.cu"]
        subprocess.run(command, cwd=ROOT, capture_output=True, check=True, timeout=300)
        return target.read_text()


def short(name: str) -> str:
    """A kernel's name with template arguments, the same whether c++filt or GCC's __PRETTY_FUNCTION__ wrote it."""
    name = name.replace("__nv_bfloat16", "BFloat16").replace("__half", "Float16").replace("aape::", "")
    name = name.replace("(bool)1", "true").replace("(bool)0", "false").replace("long int", "long").replace("cuda::", "")
    return re.sub(r"^void |[ &()]", "", re.sub(r"\((?:int|long)\)(?=\d)", "", name))


def instance(kernel: str, launcher: str) -> str:
    """The short name of "(kernel<T, I>)", launched by "void launch(…) [with T = float; I = int]".

    An argument that the launcher does not have is the type of what it got, if that is a generic lambda: "auto:1".
    """
    _, _, arguments = launcher.rstrip("]").partition("[with ")
    pairs = (each.split(" = ", 1) for each in arguments.split("; ") if " = " in each)
    values = {name.split()[-1]: value for name, value in pairs}  # "int kFrames"
    (given,) = [value for name, value in values.items() if name.startswith("auto:")] or [""]
    base, _, parameters = kernel.strip("()").partition("<")
    if not parameters:
        return short(base)
    return short(f"{base}<{', '.join(values.get(each.strip(), given) for each in parameters[:-1].split(','))}>")


@functools.cache
def entries_of(source: str) -> dict[str, str]:
    """The kernels' text by short names."""
    texts = {entry["name"]: entry[0] for entry in ENTRY.finditer(ptx_of(source))}
    found = subprocess.run(["c++filt"], input="\n".join(texts), capture_output=True, text=True, check=True).stdout
    names = (name[: name.index(">(") + 1] if ">(" in name else name[: name.index("(")] for name in found.splitlines())
    return dict(zip(map(short, names), texts.values(), strict=True))


def text_of(kernel: str) -> str:
    return entries_of(SOURCE[kernel.partition("<")[0]])[kernel]


@functools.cache
def program_of(text: str) -> Program:
    return Program(kernel_of(text))


def build_recorder(into: Path) -> ModuleType:
    """csrc/cuda's host side as a module, by the host compiler."""
    here, target = Path(__file__).parent, into / "recorded_launches.so"
    folders = (here, here.parent / "emulator", pybind11.get_include(), sysconfig.get_path("include"))
    includes = [f"-I{folder}" for folder in folders]
    command = [
        str(emulated.compiler()),
        "-std=c++17",
        "-O0",
        "-w",
        "-fPIC",
        "-fvisibility=hidden",
        "-shared",
        *includes,
    ]
    subprocess.run([*command, str(here / "recorded.cpp"), "-o", str(target)], check=True)
    spec = importlib.util.spec_from_file_location("recorded_launches", target)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass
class Launch:
    kernel: str  # short name
    grid: tuple[int, int, int]
    block: int
    shared: int
    parameters: bytes
    size: int | None  # bytes of the tensors that it may touch; None for all but the last of a call


# Functions that take x for its sizes alone: their kernels may not touch it.
SIZES_ALONE = ("gradients", "overlap_add", "standardise")


def hand_out(value: Any, memory: Global) -> None:
    """Let kernels touch the elements of a tensor, or of those in a tuple."""
    if isinstance(value, tuple):
        for one in value:
            hand_out(one, memory)
    elif isinstance(value, Tensor) and value.numel():
        last = sum((n - 1) * stride for n, stride in zip(value.shape, value.stride(), strict=True))
        start = value.data_ptr()
        memory.add(start, start + (last + 1) * value.element_size())


class Interpreter:
    """The module of the backend: every call's launches are run from PTX, and kept in `launches`.

    Args:
        recorder: the module that records them.
        changed: text to take instead of nvcc's, by short name.
        observer: who is told what a launch executes.
        chosen: the blocks of a launch to run, None for all of them.
    """

    def __init__(self, recorder: ModuleType) -> None:
        self.recorder = recorder
        self.launches: list[Launch] = []
        self.changed: dict[str, str] = {}
        self.observer: Callable[[Launch], Observer | None] = lambda launch: None
        self.chosen: Callable[[Launch], Sequence[int] | None] = lambda launch: None

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.recorder, name)

        def call(*arguments: Any) -> Any:
            memory = Global()
            hand_out(arguments[1:] if name in SIZES_ALONE else arguments, memory)
            result = function(*arguments)
            taken = self.recorder.take()
            for k, (kernel, launcher, grid, block, shared, parameters) in enumerate(taken, 1):
                size = memory.size if k == len(taken) else None
                launch = Launch(instance(kernel, launcher), grid, block[0], shared, parameters, size)
                self.launches.append(launch)
                self.run(launch, memory)
            return result

        return function if name in ("tile_tokens", "set_multiprocessors") else call

    def run(self, launch: Launch, memory: Global) -> None:
        text = self.changed.get(launch.kernel) or text_of(launch.kernel)
        run(
            program_of(text), launch.parameters, launch.grid, launch.block, launch.shared, memory,
            self.observer(launch), self.chosen(launch),
        )  # fmt: skip


def use(monkeypatch: pytest.MonkeyPatch, interpreter: Interpreter) -> None:
    """Let backend "cuda", when named, run on CPU tensors from PTX."""
    emulated.use(monkeypatch, interpreter)  # type: ignore[arg-type]
