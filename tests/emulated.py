"""csrc/cuda on the CPU: built by the host compiler behind emulator.h, a module with the functions of the real one."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pybind11
import pytest

from aape_kernels.backends import BACKENDS, cuda

ROOT = Path(__file__).parents[1]
ORDERS = ("forward", "reverse", "shuffled")
# devices.cu is about real ones
SOURCES = (
    "gather.cu", "overlap_add.cu", "sblu_backward.cu", "sblu_forward.cu", "standardise.cu", "stem.cu",
    "warp_sblu.cu", "warp_sblu_backward.cu", "warp_stem.cu", "warp_stem_backward.cu", "warp_tokens.cu",
    "gradients.cu", "bindings.cpp",
)  # fmt: skip
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")


def compiler() -> str | None:
    """The host compiler, None if there is none."""
    return shutil.which(os.environ.get("CXX", "g++"))


def more_flags() -> list[str]:
    """AAPE_EMULATOR_FLAGS: sanitizers, say."""
    return shlex.split(os.environ.get("AAPE_EMULATOR_FLAGS", ""))


def run_compiler(*arguments: str) -> None:
    """By itself: a sanitizer's allocator that is preloaded into this process makes a compiler several times slower."""
    command = [compiler(), *arguments]
    subprocess.run(command, check=True, env={k: v for k, v in os.environ.items() if k != "LD_PRELOAD"})


def compile_sources(root: Path, into: Path, sources: Iterable[str], *flags: str) -> list[Path]:
    """Object files of csrc/cuda's `sources`, of this checkout or of a copy of it."""
    here = root / "tests" / "emulator"
    includes = [f"-I{here}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]

    def one(name: str) -> Path:
        path = here / name if (here / name).exists() else root / "csrc" / "cuda" / name
        behind = ["-x", "c++", "-include", "emulator.h"] if path.suffix == ".cu" else []
        target = into / f"{path.stem}.o"
        lines = ["-g"] if flags else []  # of the sources, for sanitizers' reports: a third of the compiler's time
        options = ["-std=c++17", "-O1", *lines, *WARNINGS, "-fPIC", "-fvisibility=hidden", *includes]
        run_compiler(*options, *flags, *behind, "-c", str(path), "-o", str(target))
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(one, sources))


def build(into: Path) -> list[Path]:
    """The object files of this checkout's kernels."""
    return compile_sources(ROOT, into, SOURCES, *more_flags())


def link(objects: Iterable[Path], into: Path, name: str) -> ModuleType:
    """A module called `name`; several, of different sources, can be loaded side by side."""
    own = compile_sources(ROOT, into, ["emulated.cpp"], f"-DAAPE_MODULE={name}", *more_flags())
    target = into / f"{name}.so"
    run_compiler("-shared", *more_flags(), *map(str, [*own, *objects]), "-o", str(target))
    spec = importlib.util.spec_from_file_location(name, target)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# To run a block's threads at the same time, or in turns.
RACES = ("-std=c++20", "-DAAPE_EMULATOR_THREADS", "-fsanitize=thread")
BOUNDS = ("-fsanitize=address",)


def build_program(root: Path, into: Path, flags: Sequence[str], sources: Iterable[str] = ()) -> list[Path]:
    """Object files of the program that runs every kernel, or those of some `sources`, for one of the sanitizers."""
    return compile_sources(root, into, sources or (*SOURCES[:-1], "every_kernel.cpp"), *flags)


def run_program(objects: Iterable[Path], into: Path, flags: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Link and run that program: status 0 and "clean" if the sanitizer has nothing to say."""
    target = into / "every_kernel"
    run_compiler(flags[-1], *map(str, objects), "-o", str(target))
    environment = {"TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run([target], env=environment, capture_output=True, text=True)


def use(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> None:
    """Let backend "cuda", when named, run on CPU tensors by the emulated kernels."""
    monkeypatch.setattr(cuda, "kernels", lambda: module)
    emulated = replace(BACKENDS["cuda"], excuse=lambda call: None, anywhere=lambda: True)
    monkeypatch.setitem(BACKENDS, "cuda", emulated)
    monkeypatch.setenv("AAPE_BACKEND", "cuda")
