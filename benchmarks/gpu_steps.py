"""The steps of one call: each kernel method of a backend by itself, its time beside what its tensors cost to move."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from aape_kernels.backends.fused import Kernels

from .gpu_clock import Clock, graph_of
from .measure import spread

__all__ = ["Step", "kernels_of", "recording", "times"]

# What reads x beside its arguments.
READ_X = ("responses", "grad_states", "grad_weight", "gather", "prologue", "tokens", "adjoint")


def kernels_of(backend: str) -> type[Kernels] | None:
    """A backend's class of kernels; None for one that has none."""
    module = f"aape_kernels.backends.{backend}" + (".launch" if backend == "triton" else "")
    found = vars(importlib.import_module(module)).values()
    own = [one for one in found if isinstance(one, type) and issubclass(one, Kernels) and one is not Kernels]
    return own[0] if own else None


@dataclass
class Step:
    """One method with the arguments that it was called with, to be called again: methods only write their outputs."""

    name: str
    owner: Kernels
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    returned: Any = field(default=None, repr=False)

    def tensors(self) -> list[Tensor]:
        """Everything it reads or writes, each once."""
        given = list(_flat([*self.arguments, *self.options.values(), self.returned]))
        given += [self.owner.x] if self.name in READ_X else []
        seen = {(value.data_ptr(), value.shape): value for value in given if isinstance(value, Tensor)}
        return list(seen.values())

    @property
    def floor_bytes(self) -> int:
        """Bytes of all of them, moved once."""
        return sum(value.numel() * value.element_size() for value in self.tensors())


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    """With what tuples hold in their place."""
    for value in values:
        if isinstance(value, tuple):
            yield from _flat(value)
        else:
            yield value


@contextlib.contextmanager
def recording(kernels: type[Kernels]) -> Iterator[list[Step]]:
    """The steps that calls make meanwhile, outermost ones only."""
    steps: list[Step] = []
    inside = False

    def recorded(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def method(self: Kernels, *arguments: Any, **options: Any) -> Any:
            nonlocal inside
            if inside:
                return plain(self, *arguments, **options)
            inside = True
            try:
                returned = plain(self, *arguments, **options)
            finally:
                inside = False
            steps.append(Step(name, self, arguments, options, returned))
            return returned

        return method

    names = [name for name, value in vars(Kernels).items() if callable(value) and not name.startswith("_")]
    with contextlib.ExitStack() as patches:
        for name in names:
            if name in vars(kernels):
                patches.enter_context(mock.patch.object(kernels, name, recorded(name, vars(kernels)[name])))
        yield steps


def times(clock: Clock, step: Step) -> dict[str, float]:
    """Milliseconds of a step, as a graph where there are such: without Python and launches."""

    def call() -> object:
        method: Callable[..., object] = getattr(step.owner, step.name)
        return method(*step.arguments, **step.options)

    with torch.no_grad():  # as in the registered ops
        (found,) = clock.times(graph_of(call) if clock.device.type == "cuda" else call)
    return spread(found)
