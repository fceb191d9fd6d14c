"""Whether a backend computes what the reference computes: `aape_kernels.doctor` tests this on every device."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .functional import embed, sblu
from .geometry import PatchGrid

__all__ = ["BOUNDS", "OPS", "Problem", "problems", "verdict"]

OPS: dict[str, Callable[..., Tensor]] = {"sblu": sblu, "embed": embed}
INPUTS = {
    "sblu": ("x", "decay", "frequency", "weight"),
    "embed": ("x", "proj_w", "proj_b", "w1", "b1", "w2", "b2", "sblu_w", "fusion_w"),
}
# Relative errors allowed: of the output, of a gradient (docs/maths.md §6).
BOUNDS = {
    ("sblu", torch.float32): (2e-6, 1e-5),
    ("embed", torch.float32): (1e-5, 3e-5),
    ("sblu", torch.bfloat16): (4e-3, 1e-2),
    ("embed", torch.bfloat16): (4e-3, 1e-2),
}


@dataclass(frozen=True)
class Geometry:
    """Sizes of a problem."""

    channels: int
    states: int
    size: tuple[int, int]
    grid: PatchGrid
    kernel: str
    planes: int  # of the fusion weight


GEOMETRIES = (
    # the stem's defaults
    Geometry(1, 32, (32, 64), PatchGrid((16, 16), (16, 16), 16), "quadrature", 3),
    # overlap on both axes, odd K > P_t, two channels, mel bins and frames left over; enough states that no gradient is
    # mostly a sum that cancels; magnitudes alone
    Geometry(2, 11, (10, 19), PatchGrid((3, 5), (2, 4), 9), "bilateral", 1),
)
BATCH, HIDDEN, DIM = 4, 64, 24


@dataclass(frozen=True)
class Problem:
    """One call: inputs and cotangent, already rounded, and what the reference makes of them in float64."""

    op: str
    geometry: Geometry
    inputs: list[Tensor]
    cotangent: Tensor
    expected: list[Tensor]


def problems(op: str, dtype: torch.dtype) -> list[Problem]:
    """The operation on every geometry, always with the same numbers; x, its weights and the output in `dtype`."""
    return [_problem(op, geometry, dtype) for geometry in GEOMETRIES]


def _problem(op: str, geometry: Geometry, dtype: torch.dtype) -> Problem:
    # device, dtype and generator are given throughout: the caller's defaults and random numbers are left alone
    generator = torch.Generator("cpu").manual_seed(0)

    def normal(*shape: int, fan_in: int = 1) -> Tensor:
        values = torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)
        return values / math.sqrt(fan_in)

    def uniform(low: float, high: float) -> Tensor:
        shape = (BATCH, *tokens, states)
        values = torch.rand(shape, generator=generator, device="cpu", dtype=torch.float32)
        return values * (high - low) + low

    channels, states, patch = geometry.channels, geometry.states, geometry.grid.patch
    tokens = geometry.grid.tokens(*geometry.size)
    pixels = channels * patch[0] * patch[1]
    x = normal(BATCH, channels, *geometry.size).to(dtype)
    weight = normal(states, channels, patch[0], fan_in=channels * patch[0]).to(dtype)
    if op == "sblu":
        inputs = [x, uniform(0.1, 2.0), uniform(0.0, math.pi), weight]
        cotangent = normal(BATCH, *tokens, 2, states)
    else:
        inputs = [
            x,
            normal(DIM, channels, *patch, fan_in=pixels).to(dtype),
            normal(DIM).to(dtype),
            normal(HIDDEN, channels, *patch, fan_in=pixels),
            normal(HIDDEN),
            normal(2 * states, HIDDEN, fan_in=HIDDEN),
            normal(2 * states),
            weight,
            normal(DIM, geometry.planes, states, fan_in=geometry.planes * states).to(dtype),
        ]
        cotangent = normal(BATCH, tokens[0] * tokens[1], DIM)
    cotangent = cotangent.to(dtype)
    expected = _results(op, geometry, [value.double() for value in inputs], cotangent.double(), "reference")
    return Problem(op, geometry, inputs, cotangent, expected)


def _results(op: str, geometry: Geometry, inputs: Sequence[Tensor], cotangent: Tensor, backend: str) -> list[Tensor]:
    """The output, and the gradient of each input."""
    leaves = [value.detach().requires_grad_() for value in inputs]
    grid = geometry.grid
    options = {"stride": grid.stride, "window": grid.window, "kernel": geometry.kernel, "backend": backend}
    if op == "sblu":
        options["patch_size"] = grid.patch
    output = OPS[op](*leaves, **options)
    return [output.detach(), *torch.autograd.grad(output, leaves, cotangent)]


def _relative_error(got: Tensor, want: Tensor) -> float:
    """‖got − want‖ / ‖want‖; infinite if that is NaN, so that nothing is worse."""
    error = float((got.cpu().double() - want).norm() / want.norm())
    return math.inf if math.isnan(error) else error


@contextmanager
def _without_autotuning() -> Iterator[None]:
    """These sizes are not worth a search of minutes, nor a place in the user's cache."""
    before = os.environ.pop("AAPE_AUTOTUNE", None)
    try:
        yield
    finally:
        if before is not None:
            os.environ["AAPE_AUTOTUNE"] = before


def verdict(backend: str, device: torch.device, given: Sequence[Problem]) -> tuple[bool, str]:
    """Whether a backend is right on problems of one operation and dtype; the worst errors beside their bounds.

    Errors: whatever the backend raises.
    """
    bounds = BOUNDS[given[0].op, given[0].cotangent.dtype]
    worst, faults = [0.0, 0.0], []
    for problem in given:
        inputs = [value.to(device) for value in problem.inputs]
        with _without_autotuning():
            got = _results(problem.op, problem.geometry, inputs, problem.cotangent.to(device), backend)
        names = ("output", *(f"gradient of {name}" for name in INPUTS[problem.op]))
        for k, (name, value, want) in enumerate(zip(names, got, problem.expected, strict=True)):
            error, gradient = _relative_error(value, want), k > 0
            worst[gradient] = max(worst[gradient], error)
            if error > bounds[gradient]:
                faults.append("{} ({}x{} patches)".format(name, *problem.geometry.grid.patch))
    figures = "  ".join(f"{error:7.1e} / {bound:.0e}" for error, bound in zip(worst, bounds, strict=True))
    return not faults, f"{figures}  {'FAILED: ' + ', '.join(faults) if faults else 'ok'}"
