"""Which backend runs a call: `choose`, and for each one that cannot, the reason.

`reason(call)` says why a backend cannot run a call, or None if it can. It is asked at every call, also while
`torch.compile` traces one: it must be quick, and import nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch

from .. import reference
from . import cpu

__all__ = ["BACKENDS", "Backend", "Call", "check_backend", "choose", "reasons"]


@dataclass(frozen=True)
class Call:
    """What the choice of a backend depends on."""

    op: str
    device: torch.device
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.op} of {self.dtype} on {self.device}"


@dataclass(frozen=True)
class Backend:
    """One way to compute the operations.

    Attributes:
        name: what `backend=` and `AAPE_BACKEND` call it.
        needs: what a machine must have for it, in one phrase.
        reason: why it cannot run a call; None if it can.
        run: the module whose `sblu` and `embed` compute it (the signatures of `aape_kernels.reference`); None for a
            backend that never can.
    """

    name: str
    needs: str
    reason: Callable[[Call], str | None]
    run: ModuleType | None = None


def _not_in_this_version(kernels: str) -> Callable[[Call], str | None]:
    return lambda call: f"this version has no {kernels} kernels"


# Fastest first: the order in which "auto" asks.
BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("cuda", "an NVIDIA GPU; built with nvcc", _not_in_this_version("CUDA")),
        Backend("triton", "a GPU; Triton", _not_in_this_version("Triton")),
        Backend("cpu", "built with a C++ compiler", cpu.reason),
        Backend("reference", "nothing but PyTorch", lambda call: None, reference),
    )
}


def reasons(call: Call) -> dict[str, str | None]:
    """For every backend, fastest first: None if it can run `call`, else why not."""
    return {name: backend.reason(call) for name, backend in BACKENDS.items()}


def check_backend(name: str, argument: str = "backend") -> str:
    """`name` if it is "auto" or a backend's, else a `ValueError` naming `argument`."""
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"{argument}: expected one of {', '.join(['auto', *BACKENDS])}, got {name!r}")
    return name


def choose(name: str, call: Call) -> ModuleType:
    """The module that runs `call`: that of the backend called `name`, or for "auto" the fastest that can run `call`.

    The environment variable `AAPE_BACKEND` stands for `name` where `name` is "auto"; it is read at every call (under
    `torch.compile`, when the call is traced).

    Errors: `ValueError` for an unknown name, `RuntimeError` with the reason if the one named cannot run the call.
    """
    source = "backend"
    if name == "auto":
        name = os.environ.get("AAPE_BACKEND") or "auto"
        source = "AAPE_BACKEND"
    if check_backend(name, source) == "auto":
        return next(backend.run for backend in BACKENDS.values() if backend.run and backend.reason(call) is None)
    backend = BACKENDS[name]
    why = backend.reason(call)
    if why is not None or backend.run is None:
        raise RuntimeError(f"{source}: {name!r} cannot run {call}: {why}")
    return backend.run
