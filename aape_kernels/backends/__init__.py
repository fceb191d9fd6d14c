"""Which backend runs a call: `choose`, and for each one that cannot, the reason.

`Backend.reason(call)` says why a backend cannot run a call, or None if it can. It is asked at every call, also while
`torch.compile` traces one: it must be quick, and import nothing.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .. import autograd, reference
from ..geometry import is_traced
from . import cpu, cuda, triton

__all__ = ["BACKENDS", "Backend", "Call", "check_backend", "choose", "reasons"]

LOG = logging.getLogger("aape_kernels")


class Implementation(Protocol):
    """What a backend computes, in the signatures of `aape_kernels.reference`."""

    @property
    def sblu(self) -> Callable[..., Tensor]:
        """Responses y."""

    @property
    def embed(self) -> Callable[..., Tensor]:
        """Tokens."""


class Call(NamedTuple):
    """What the choice of a backend depends on."""

    op: str
    device: torch.device
    dtype: torch.dtype

    @property
    def kind(self) -> str:
        """The device's type."""
        return reference.device_type(self.device)

    def __str__(self) -> str:
        return f"{self.op} of {self.dtype} on {self.device}"


@dataclass(frozen=True)
class Backend:
    """One way to compute the operations.

    Attributes:
        name: what `backend=` and `AAPE_BACKEND` call it.
        needs: what a machine must have for it, in one phrase.
        device: the device type of the tensors it takes; None for any.
        anywhere: whether, when it is named, it takes tensors of other devices as well.
        excuse: why it cannot run a call on a device that it takes; None if it can.
        run: `sblu` and `embed` in the signatures of `aape_kernels.reference`.
    """

    name: str
    needs: str
    device: str | None
    excuse: Callable[[Call], str | None]
    run: Implementation
    anywhere: Callable[[], bool] = lambda: False

    def reason(self, call: Call, named: bool = False) -> str | None:
        """Why it cannot run `call`, for which it was `named` or is only considered; None if it can."""
        if self.device not in (None, call.kind) and not (named and self.anywhere()):
            return f"it runs on {self.device} tensors, not on {call.device}"
        return self.excuse(call)


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("cuda", "an NVIDIA GPU; built with nvcc", "cuda", cuda.reason, autograd.bind("cuda")),
        Backend("triton", "a GPU; Triton", "cuda", triton.reason, autograd.bind("triton"), triton.interpreted),
        Backend("cpu", "built with a C++ compiler", "cpu", cpu.reason, autograd.bind("cpu")),
        Backend("reference", "nothing but PyTorch", None, lambda call: None, reference),
    )
}


# The order in which "auto" asks, by the dtype of x: the fastest first, between the GPU backends as measured on an H100
# and an H200 (benchmarks/results). The CUDA stem of bfloat16 is on tensor cores; its other products are register tiles
# of float32 multiply-adds, where Triton's of float16 use the tensor cores too.
ORDER = {
    torch.bfloat16: ("cuda", "triton", "cpu", "reference"),
    torch.float16: ("triton", "cuda", "cpu", "reference"),
    torch.float32: ("cuda", "triton", "cpu", "reference"),
    torch.float64: ("cuda", "triton", "cpu", "reference"),
}

# The same with the device's type: the backends that take its tensors.
CANDIDATES = {
    (kind, dtype): tuple(BACKENDS[name] for name in names if BACKENDS[name].device in (None, kind))
    for kind in ("cpu", "cuda")
    for dtype, names in ORDER.items()
}


def reasons(call: Call) -> dict[str, str | None]:
    """For every backend, in the order in which "auto" asks: None if it can run `call`, else why not."""
    return {name: BACKENDS[name].reason(call) for name in ORDER[call.dtype]}


def check_backend(name: str, argument: str = "backend") -> str:
    """`name` if it is "auto" or a backend's, else a `ValueError` naming `argument`."""
    if not isinstance(name, str) or (name != "auto" and name not in BACKENDS):
        raise ValueError(f"{argument}: expected one of {', '.join(['auto', *BACKENDS])}, got {name!r}")
    return name


def choose(name: str, call: Call) -> Implementation:
    """What runs `call`: the backend called `name`, or for "auto" the fastest that can.

    The environment variable `AAPE_BACKEND` stands for `name` where `name` is "auto"; it is read at every call (under
    `torch.compile`, when the call is traced). Where "auto" passes over a faster backend for this device, one line is
    logged, once, with the reason. What `torch.jit.trace` and ONNX's exporters trace, "auto" gives to the reference: no
    runtime of theirs has our ops.

    Errors: `ValueError` for an unknown name, `RuntimeError` with the reason if the one named cannot run the call.
    """
    source = "backend"
    if name == "auto":
        name = os.environ.get("AAPE_BACKEND") or "auto"
        source = "AAPE_BACKEND"
    if check_backend(name, source) == "auto":
        return _fastest(call)
    backend = BACKENDS[name]
    why = backend.reason(call, named=True)
    if why is not None:
        raise RuntimeError(f"{source}: {name!r} cannot run {call}: {why}")
    return backend.run


def _for_other_runtimes() -> bool:
    """Whether what is traced will run where our ops are not: TorchScript or ONNX."""
    return is_traced() or (torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export())


def _fastest(call: Call) -> Implementation:
    if _for_other_runtimes():
        return BACKENDS["reference"].run
    # those for other devices are passed over without a line: no version of this machine could change that
    for backend in CANDIDATES.get((call.kind, call.dtype), ()):
        why = backend.excuse(call)
        if why is None:
            return backend.run
        if not torch.compiler.is_compiling():  # tracing has no place for one
            _log_fallback(backend.name, call.kind, why)
    return BACKENDS["reference"].run


@functools.cache
def _log_fallback(name: str, device: str, why: str | None) -> None:
    LOG.warning("backend 'auto' on %s passes over %r: %s", device, name, why)
