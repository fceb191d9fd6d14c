"""`python -m aape_kernels.doctor`: what this installation runs on, which backends it can use and why not the others,
and whether each of them computes what the reference computes. One block of text, to be pasted into an issue.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import io
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from . import __version__, self_test
from .backends import BACKENDS, Backend, Call, choose, cuda, native, reasons

__all__ = ["cpu_model", "main"]

VARIABLES = (
    "AAPE_BACKEND",
    "AAPE_CPU_ISA",
    "AAPE_AUTOTUNE",
    "AAPE_AUTOTUNE_CACHE",
    "TRITON_INTERPRET",
    "CUDA_VISIBLE_DEVICES",
    "CUDA_LAUNCH_BLOCKING",
    "OMP_NUM_THREADS",
    # either can put TF32 into float32 products, which the stem's bounds have no room for
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)

Rows = list[tuple[str, str]]


def _in_one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _answer(ask: Callable[..., str], *arguments: object) -> str:
    """What `ask` says; the error if a module or a driver is too broken to ask."""
    try:
        return ask(*arguments)
    except Exception as error:
        return f"cannot be asked: {_in_one_line(error)}"


# What there is.


def _version(module: str) -> str:
    try:
        return str(importlib.import_module(module).__version__)
    except Exception as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == module
        return "not installed" if missing else f"cannot be imported: {_in_one_line(error)}"


def _versions() -> Rows:
    kits = [
        f"{name} {found}" for name in ("CUDA", "HIP", "XPU") if (found := getattr(torch.version, name.lower(), None))
    ]
    return [
        # with its path: a checkout in the current folder hides what is installed
        ("aape_kernels", f"{__version__} in {Path(__file__).parent}"),
        ("Python", platform.python_version()),
        ("platform", platform.platform()),
        ("torch", f"{torch.__version__}, built {'with ' + ', '.join(kits) if kits else 'without CUDA, HIP and XPU'}"),
        ("triton", _version("triton")),
        ("numpy", _version("numpy")),
    ]


def _native_module() -> Rows:
    """What the native module says about itself."""
    try:
        facts = native.load().build_info()
    except Exception as error:
        return [("cannot be loaded", _in_one_line(error))]
    rows = [
        (name, ", ".join(map(str, value)) or "none" if isinstance(value, (list, tuple)) else str(value))
        for name, value in facts.items()
    ]
    return [*rows, ("CUDA kernels", cuda.unusable() or "a driver is there")]


def cpu_model() -> str:
    """The processor's name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Hardware", "cpu model") and value.strip():
            return value.strip()
    return platform.processor() or platform.machine()


def _nvidia_driver() -> str:
    """The driver's version, which torch does not know, or what nvidia-smi says instead."""
    command = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "driver unknown: nvidia-smi cannot run"
    said = (done.stdout or done.stderr).strip().partition("\n")[0]
    return f"driver {said}" if done.returncode == 0 else f"driver unknown: {said}"


def _accelerators() -> list[torch.device]:
    """Every GPU that this torch counts, of any kind; none if the driver cannot even be asked."""
    kind = torch.accelerator.current_accelerator()
    if kind is None:
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `_no_accelerator` gives the driver's message, too
        try:
            count = torch.accelerator.device_count()
        except RuntimeError:
            count = 0
    return [torch.device(kind.type, index) for index in range(count)]


def _no_accelerator() -> str:
    """Why there is no GPU: the error that torch raises if one is used anyway."""
    kind = torch.accelerator.current_accelerator()
    if kind is None:
        return "none, and this torch is built for none"
    try:
        torch.empty(1, device=kind)
    except Exception as error:
        return f"no {kind.type} device: {_in_one_line(error)}"
    return f"no {kind.type} device"


def _describe(device: torch.device) -> str:
    if device.type == "cpu":
        capability = torch.backends.cpu.get_cpu_capability()
        return f"{cpu_model()}; cores: {os.cpu_count()}; torch: {capability}, threads: {torch.get_num_threads()}"
    ask = getattr(torch.get_device_module(device), "get_device_properties", None)
    if ask is None:  # MPS
        return "present"
    properties = ask(device)
    facts = [properties.name, f"{properties.total_memory / 2**30:.1f} GiB"]
    if device.type == "cuda" and torch.version.hip is not None:
        facts.append(properties.gcnArchName)
    elif device.type == "cuda":
        facts += [f"compute capability {properties.major}.{properties.minor}", _nvidia_driver()]
    return ", ".join(facts)


def _devices(devices: Sequence[torch.device]) -> Rows:
    rows = [(str(device), _answer(_describe, device)) for device in devices]
    return rows if len(rows) > 1 else [*rows, ("GPU", _no_accelerator())]


# What it can do.


def _usable(backend: Backend, call: Call) -> str:
    why = backend.reason(call)
    return "usable" if why is None else f"no: {why}"


def _auto(call: Call) -> str:
    named = os.environ.get("AAPE_BACKEND") or "auto"
    if named == "auto":
        return f"takes {next(name for name, why in reasons(call).items() if why is None)}"
    try:
        choose("auto", call)
    except (RuntimeError, ValueError) as error:
        return f"raises: {error}"
    return f"takes {named}, which AAPE_BACKEND names"


def _per_op(ask: Callable[[Call], str], device: torch.device) -> str:
    """The answer for float32 calls, one for each operation if they differ."""
    answers = {op: _answer(ask, Call(op, device, torch.float32)) for op in self_test.OPS}
    if len(set(answers.values())) == 1:
        return next(iter(answers.values()))
    return "; ".join(f"{op}: {answer}" for op, answer in answers.items())


def _backends(device: torch.device) -> Rows:
    rows = [(name, _per_op(functools.partial(_usable, backend), device)) for name, backend in BACKENDS.items()]
    return [*rows, ("auto", _per_op(_auto, device))]


def _results(devices: Sequence[torch.device]) -> Iterator[tuple[bool, str]]:
    """For every device, backend usable there, operation and dtype: whether the backend is right, and a line of text."""
    problems = {(op, dtype): self_test.problems(op, dtype) for op, dtype in self_test.BOUNDS}
    for device in devices:
        for name, backend in BACKENDS.items():
            for (op, dtype), given in problems.items():
                try:
                    if backend.reason(Call(op, device, dtype)) is not None:
                        continue
                    right, text = self_test.verdict(name, device, given)
                except Exception as error:
                    right, text = False, f"FAILED: {_in_one_line(error)}"
                yield right, f"  {device!s:6}  {name:9}  {op:5}  {str(dtype).removeprefix('torch.'):8}  {text}"


# The block.


# Written at once: a kernel that hangs or kills the process must not take the earlier output with it.
_say = functools.partial(print, sep="\n", flush=True)


def _show(title: str, rows: Rows) -> None:
    width = max((len(name) for name, _ in rows), default=0)
    _say(title, *(f"  {name:{width}}  {text}" for name, text in rows))


def _report(with_self_test: bool) -> int:
    devices = [torch.device("cpu"), *_accelerators()]
    variables = [(name, repr(os.environ[name])) for name in VARIABLES if name in os.environ]
    _show("versions", _versions())
    _show("native module", _native_module())
    _show(f"environment variables{'' if variables else ': none set'}", variables)
    _show("devices", _devices(devices))
    for device in devices:
        _show(f"backends for float32 on {device}, fastest first", _backends(device))
    if not with_self_test:
        return 0

    _say("self-test against the reference in float64: worst relative error / bound, of output and of gradients")
    results = []
    for right, line in _results(devices):
        _say(line)
        results.append(right)
    failed = results.count(False)
    _say(f"self-test: {failed} of {len(results)} FAILED" if failed else f"self-test: all {len(results)} ok")
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m aape_kernels.doctor",
        description="Prints versions and devices, which backends of aape_kernels can run on them, and why the others "
        "cannot; then tests each usable backend on each device. The text is meant to be pasted into an issue.",
        epilog="Exit status: 0, 1 if a self-test failed, 2 for a wrong option.",
    )
    parser.add_argument(
        "--no-self-test",
        action="store_true",
        help="compute nothing. The self-test compares sblu and the whole stem (embed), outputs and all gradients, "
        "with the reference in float64; it takes seconds on a CPU, and on a GPU longer the first time, when kernels "
        "are compiled",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print the block, with the options in `argv` (`sys.argv` unless given), and return the exit status."""
    args = _parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # reasons and names come from others, in any alphabet
    try:
        return _report(with_self_test=not args.no_self_test)
    except BrokenPipeError:  # `| head`: nobody reads on, and Python would complain once more when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())
