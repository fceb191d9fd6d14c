"""Triton's interpreter as tests use it: with less to do for every call, and with GPUs' rounding."""

from __future__ import annotations

import importlib
import inspect
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch


def _interpreter() -> ModuleType:
    return importlib.import_module("triton.runtime.interpreter")


def remember_builtins() -> None:
    """Look through the members of a part of Triton's language once in a process.

    The interpreter does so for each call of a function within a kernel, after the kernel's launch has replaced all that
    there is to replace: a third of its time.
    """
    interpreter, of = _interpreter(), {}

    def replace(part: Any, *rest: Any) -> None:
        if part not in of:
            is_builtin = interpreter.tl.core.is_builtin
            of[part] = [(name, member) for name, member in inspect.getmembers(part) if is_builtin(member)]
        for name, member in of[part]:
            if getattr(part, name) is member:
                interpreter._patch_attr(part, name, member, *rest)

    interpreter._patch_builtin = replace


def use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let backend "triton" be what "auto" takes, on CPU tensors.

    The interpreter truncates to bfloat16 where GPUs round, which is mended here.
    """
    interpreter = _interpreter()
    bits = interpreter._convert_float

    def rounded(value: np.ndarray, source: Any, target: Any, mode: Any) -> np.ndarray:
        if (str(source), str(target)) != ("fp32", "bf16"):
            return bits(value, source, target, mode)
        wide = np.frombuffer(value.tobytes(), dtype=np.float32).copy()
        return torch.from_numpy(wide).bfloat16().view(torch.uint16).numpy().reshape(value.shape)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("AAPE_BACKEND", "triton")
