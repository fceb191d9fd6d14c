"""The cases of the GPU benchmark: dtypes, batches, and the bytes that `sblu` cannot do without."""

from __future__ import annotations

from dataclasses import replace

import torch

from .cases import Problem, Sizes
from .peers import Peer, Work, compile_static

__all__ = ["BATCHES", "MODES", "QUICK", "floor_bytes", "problem_of", "work_of"]

# What an operation is timed in: all float32, all bfloat16, or float32 under bfloat16 autocast.
MODES = {"sblu": ("float32", "bfloat16"), "stem": ("float32", "bfloat16", "autocast bfloat16")}
BATCHES = (8, 64)
QUICK = Sizes(mel_bins=32, frames=64, dim=32, states=4, hidden=8)


def problem_of(op: str, mode: str, sizes: Sizes, batch: int, device: torch.device) -> Problem:
    """16 bits mean x, weights and output; decay and frequency of `sblu` stay float32, as the stem's are."""
    dtype = torch.bfloat16 if mode == "bfloat16" else torch.float32
    problem = Problem.make(op, sizes, batch, device, dtype)
    if op == "sblu":
        wide = {name: problem.parameters[name].float() for name in ("decay", "frequency")}
        problem = replace(problem, parameters=problem.parameters | wide)
    if mode.startswith("autocast"):
        problem = replace(problem, cotangent=problem.cotangent.bfloat16())
    return problem


def work_of(peer: Peer, problem: Problem, mode: str) -> Work:
    """The peer's work, under autocast if the mode says so."""
    work = peer.make(problem, compile_static)
    if not mode.startswith("autocast"):
        return work

    def forward() -> torch.Tensor:
        with torch.autocast(problem.x.device.type, dtype=torch.bfloat16):
            return work.forward()

    return replace(work, forward=forward)


def floor_bytes(problem: Problem) -> int:
    """Bytes that `sblu` cannot do without: every input read once, y written once (it is like the cotangent)."""
    given = [problem.x, *problem.parameters.values(), problem.cotangent]
    return sum(value.numel() * value.element_size() for value in given)
