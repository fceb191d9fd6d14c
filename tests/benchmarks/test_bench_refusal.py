"""A peer that is wrong fails its test and gets no figure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.cases import Problem, Sizes, truth
from benchmarks.check import BOUNDS, DIRECTIONS, WrongOutput, check
from benchmarks.measure import Session
from benchmarks.peers import CONV2D, Peer, Work, backend_sblu, conv_stem

SMALL = Sizes(mel_bins=8, frames=24, patch=(4, 6), stride=(4, 6), window=6, dim=10, states=3, hidden=5)
ROOT = Path(__file__).parents[2]


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: object, *grad: Tensor) -> Tensor:
        return grad[0] * 1.001


def _altered(change: Callable[[Tensor], Tensor]) -> Callable[..., Work]:
    """A Conv2d stem with `change` applied to its tokens."""

    def make(problem: Problem, compile_: object) -> Work:
        right = conv_stem(problem, lambda function: function)
        return replace(right, forward=lambda: change(right.forward()))

    return make


def _one_nan(tokens: Tensor) -> Tensor:
    return torch.cat([tokens[:, :-1], tokens[:, -1:] * float("nan")], dim=1)


WRONG = {
    "slightly-off": (_altered(lambda tokens: tokens * (1 + 3e-5)), "output: relative error"),
    "one-nan": (_altered(_one_nan), "output: relative error nan"),
    "gradient-only": (_altered(_ScaledGradient.apply), "proj.weight: relative error"),
    "not-contiguous": (_altered(lambda tokens: tokens.mT.contiguous().mT), "output: not contiguous"),
    "shape": (_altered(lambda tokens: tokens[:, :-1].contiguous()), "output: expected"),
    "dtype": (_altered(lambda tokens: tokens.bfloat16()), "output: expected"),
}


class _NoFixture:
    """Stands for pytest-benchmark's fixture, and fails the test if anything is timed."""

    group = None

    def pedantic(self, *args: object, **kwargs: object) -> None:
        raise AssertionError("a wrong peer was timed")


@pytest.mark.parametrize(("make", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_peer_is_not_timed(make: Callable[..., Work], message: str) -> None:
    session = Session(torch.device("cpu"), SMALL)
    direction = DIRECTIONS["gradient" in message or "proj" in message]
    with pytest.raises(WrongOutput, match=message):
        session.measure(_NoFixture(), Peer("wrong", "plain", make), "stem", direction, 2)


def test_right_peer_is_timed() -> None:
    session = Session(torch.device("cpu"), SMALL)
    with pytest.raises(AssertionError, match="was timed"):
        session.measure(_NoFixture(), CONV2D, "stem", DIRECTIONS[1], 2)


def test_bounds_are_those_of_the_specification() -> None:
    assert BOUNDS == {"sblu": (2e-6, 1e-5), "stem": (1e-5, 3e-5)}


def test_the_other_kernel_is_refused() -> None:
    problem = Problem.make("sblu", SMALL, 2)
    bilateral = replace(problem, sizes=replace(SMALL, kernel="bilateral"))
    work = backend_sblu("reference")(bilateral, lambda function: function)
    with pytest.raises(WrongOutput):
        check(work, DIRECTIONS[0], problem, truth(problem, "sblu"))


PLUGIN = """
from dataclasses import replace
import benchmarks.peers as peers

right = peers.linear_stem

def wrong(problem, compile_):
    work = right(problem, compile_)
    return replace(work, forward=lambda: work.forward() * 1.001)

peers.linear_stem = wrong
"""


@pytest.mark.slow
def test_wrong_row_fails_and_has_no_figure(tmp_path: Path) -> None:
    """The suite itself, run with one peer made wrong."""
    (tmp_path / "wrong_peer.py").write_text(PLUGIN)
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "pytest", "benchmarks", "-p", "wrong_peer", "-p", "no:cacheprovider"]
    command += ["--allocator", "default", "-k", "test_stem and Linear and B1 and not backward"]
    run = subprocess.run(
        [*command, f"--benchmark-json={report}"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1, run.stdout + run.stderr
    assert "1 failed" in run.stdout
    assert "WrongOutput: stem, forward: refused: output: relative error 1.0e-03, bound 1e-05" in run.stdout
    assert not report.exists() or not report.read_text() or not json.loads(report.read_text())["benchmarks"]
