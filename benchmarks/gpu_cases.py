"""The cases of the GPU benchmark: sizes, dtypes, batches, and the bytes that `sblu` cannot do without."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from .cases import Problem, Sizes

__all__ = ["LARGE", "MODES", "QUICK", "SMALL", "USUAL", "Case", "cases", "floor_bytes", "problem_of"]

# What an operation is timed in: all float32, all bfloat16, or float32 under bfloat16 autocast.
MODES = {"sblu": ("float32", "bfloat16"), "stem": ("float32", "bfloat16", "autocast bfloat16")}
LARGE, SMALL = 64, 8  # batches


USUAL = Sizes()
QUICK = Sizes(mel_bins=32, frames=64, dim=32, states=4, hidden=8)


@dataclass(frozen=True)
class Case:
    """One problem that peers are timed on.

    Attributes:
        others: whether peers of other origin are timed on it too; stems always have Conv2d beside them.
        compiled: whether those that torch.compile makes are, and no others.
    """

    op: str
    mode: str
    batch: int = LARGE
    sizes: Sizes = USUAL
    others: bool = False
    compiled: bool = False

    def __str__(self) -> str:
        return f"{self.op}, {self.mode}, batch {self.batch}, {self.label}{', torch.compile' if self.compiled else ''}"

    @property
    def label(self) -> str:
        """The sizes in which cases differ."""
        of_stem = f"{self.sizes.features}, D {self.sizes.dim}, " if self.op == "stem" else ""
        return f"{of_stem}S {self.sizes.states}"

    @property
    def key(self) -> dict[str, Any]:
        """By which rows are found."""
        return {"op": self.op, "mode": self.mode, "batch": self.batch, "sizes": self.label}


def cases(quick: bool = False) -> Iterator[Case]:
    """What is timed, the project's own figures first, and what only completes the picture last."""
    if quick:
        for op, modes in MODES.items():
            yield from (Case(op, mode, 2, QUICK, others=True) for mode in modes)
        return
    yield Case("stem", "bfloat16", others=True)
    yield Case("sblu", "float32", others=True)
    yield Case("stem", "float32", others=True)
    yield Case("sblu", "bfloat16", others=True)
    yield Case("stem", "bfloat16", sizes=replace(USUAL, features="complex"))
    yield Case("stem", "bfloat16", sizes=replace(USUAL, states=32, hidden=64))
    yield Case("stem", "bfloat16", SMALL)
    yield Case("stem", "autocast bfloat16")
    yield Case("sblu", "float32", compiled=True)
    yield Case("stem", "bfloat16", sizes=replace(USUAL, dim=192))
    yield Case("stem", "bfloat16", sizes=replace(USUAL, dim=192, states=32, hidden=64))
    yield Case("stem", "float32", sizes=replace(USUAL, features="complex"))
    yield Case("stem", "float32", sizes=replace(USUAL, states=32, hidden=64))
    yield Case("stem", "bfloat16", sizes=replace(USUAL, features="magnitude"))
    yield Case("stem", "bfloat16", sizes=replace(USUAL, features="complex", states=32, hidden=64))
    yield Case("sblu", "float32", sizes=replace(USUAL, states=32, hidden=64))
    yield Case("sblu", "bfloat16", sizes=replace(USUAL, states=32, hidden=64))
    yield Case("stem", "float32", SMALL)
    yield Case("sblu", "float32", SMALL)
    yield Case("sblu", "bfloat16", SMALL)
    yield Case("stem", "bfloat16", SMALL, replace(USUAL, dim=192, states=32, hidden=64))
    yield Case("stem", "bfloat16", SMALL, replace(USUAL, features="complex"))


def problem_of(case: Case, device: torch.device) -> Problem:
    """16 bits mean x, weights and output; decay and frequency of `sblu` stay float32, as the stem's are."""
    dtype = torch.bfloat16 if case.mode == "bfloat16" else torch.float32
    problem = Problem.make(case.op, case.sizes, case.batch, device, dtype)
    if case.op == "sblu":
        wide = {name: problem.parameters[name].float() for name in ("decay", "frequency")}
        problem = replace(problem, parameters=problem.parameters | wide)
    if case.mode.startswith("autocast"):
        problem = problem.under_autocast()
    return problem


def floor_bytes(problem: Problem) -> int:
    """Bytes that `sblu` cannot do without: every input read once, y written once (it is like the cotangent)."""
    given = [problem.x, *problem.parameters.values(), problem.cotangent]
    return sum(value.numel() * value.element_size() for value in given)
