"""The gate before the clock: a peer whose output or gradient is wrong gets no figure."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .cases import Problem, Truth
from .peers import Work

__all__ = ["BOUNDS", "DIRECTIONS", "WrongOutput", "check", "runner"]

DIRECTIONS = ("forward", "forward + backward")

# Relative errors float32 is held to, docs/maths.md §6: (output, gradients).
BOUNDS = {"sblu": (2e-6, 1e-5), "stem": (1e-5, 3e-5)}
# The same for outputs of 16 bits, of either operation.
BOUNDS_16 = {torch.bfloat16: (4e-3, 1e-2), torch.float16: (5e-4, 2e-3)}


class WrongOutput(AssertionError):  # noqa: N818  # pytest prints the name: it says what happened
    """A peer does not compute what it claims to."""


def runner(work: Work, direction: str, cotangent: Tensor) -> Callable[[], tuple[Tensor, tuple[Tensor, ...]]]:
    """The call that is checked and timed: no arguments; returns the output and a tuple of gradients.

    "forward" runs without recording a graph. "forward + backward" returns gradients rather than accumulating them.
    """
    wrt = list(work.wrt.values())

    def forward() -> tuple[Tensor, tuple[Tensor, ...]]:
        with torch.no_grad():
            return work.forward(), ()

    def forward_backward() -> tuple[Tensor, tuple[Tensor, ...]]:
        output = work.forward()
        return output, torch.autograd.grad(output, wrt, cotangent)

    return forward if direction == "forward" else forward_backward


def _error(got: Tensor, expected: Tensor) -> float:
    return float((got.detach().double() - expected).norm() / expected.norm())


def check(work: Work, direction: str, problem: Problem, truth: Truth) -> dict[str, float]:
    """The relative error of the output, and of each gradient that `direction` asks for, by name.

    The output is to have the cotangent's dtype, whose bounds hold, and a gradient that of its input.

    Errors: `WrongOutput` naming everything out of bounds, of the wrong shape or dtype, or not contiguous.
    """
    output, gradients = runner(work, direction, problem.cotangent)()
    faults = []
    if not output.is_contiguous():
        faults.append("output: not contiguous")
    bound_output, bound_gradient = BOUNDS_16.get(problem.cotangent.dtype, BOUNDS[problem.op])
    named = zip(work.wrt, gradients, strict=True) if gradients else ()
    results = [("output", output, truth.output, problem.cotangent.dtype, bound_output)]
    results += [(name, got, truth.gradients[name], work.wrt[name].dtype, bound_gradient) for name, got in named]
    errors = {}
    for name, got, expected, dtype, bound in results:
        if got.shape != expected.shape or got.dtype != dtype:
            faults.append(f"{name}: expected {tuple(expected.shape)} {dtype}, got {tuple(got.shape)} {got.dtype}")
            continue
        errors[name] = _error(got, expected)
        if not errors[name] <= bound:  # a NaN is wrong, too
            faults.append(f"{name}: relative error {errors[name]:.1e}, bound {bound:.0e}")
    if faults:
        raise WrongOutput(f"{problem.op}, {direction}: refused: " + "; ".join(faults))
    return errors
