"""Every peer computes what it claims to, whatever the geometry; torch.compile itself is left out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.cases import Problem, Sizes, truth
from benchmarks.check import DIRECTIONS, check
from benchmarks.measure import Session
from benchmarks.peers import CONV2D, Peer, horner_sblu, peers

SMALL = Sizes(mel_bins=11, frames=31, patch=(4, 6), stride=(4, 6), window=6, dim=10, states=3, hidden=5)
GEOMETRIES = {
    "even": SMALL,
    "odd": replace(SMALL, patch=(4, 5), stride=(4, 5), window=5),
    "overlap": replace(SMALL, stride=(2, 3)),
    "odd-overlap-long": replace(SMALL, patch=(4, 5), stride=(3, 2), window=9),
    "gaps": replace(SMALL, stride=(5, 8)),
    "window-longer": replace(SMALL, window=10),
    "window-shorter": replace(SMALL, window=2),
    "one-frame": replace(SMALL, patch=(4, 5), stride=(4, 5), window=1),
    "two-channels": replace(SMALL, channels=2, stride=(3, 6)),
    "complex": replace(SMALL, features="complex"),
    "magnitude": replace(SMALL, features="magnitude", states=5),
    "one-token": replace(SMALL, mel_bins=4, frames=6),
}
CPU = torch.device("cpu")
ROWS = [(op, peer) for op in ("stem", "sblu") for peer in peers(op, CPU)]


def _as_is(function):
    return function


@pytest.mark.parametrize("kernel", ["bilateral", "quadrature"])
@pytest.mark.parametrize("sizes", GEOMETRIES.values(), ids=GEOMETRIES.keys())
@pytest.mark.parametrize(("op", "peer"), ROWS, ids=[f"{op}-{peer.name}" for op, peer in ROWS])
def test_agrees_with_float64(op: str, peer: Peer, sizes: Sizes, kernel: str) -> None:
    problem = Problem.make(op, replace(sizes, kernel=kernel), 2)
    work = peer.make(problem, _as_is)
    expected = truth(problem, peer.formula)
    for direction in DIRECTIONS:
        errors = check(work, direction, problem, expected)
    assert errors.keys() == {"output", *work.wrt}


@pytest.mark.parametrize("kernel", ["bilateral", "quadrature"])
@pytest.mark.parametrize("window", [5, 6])
def test_horner_holds_near_zero(window: int, kernel: str) -> None:
    """Where gain and its derivative cancel, and across the border between series and closed form."""
    sizes = replace(SMALL, patch=(4, window), stride=(4, window), window=window, kernel=kernel)
    problem = Problem.make("sblu", sizes, 2)
    for name in ("decay", "frequency"):
        values = problem.parameters[name]
        values.copy_(torch.linspace(0, 0.3, values.numel()).view_as(values))
    check(horner_sblu(problem, _as_is), DIRECTIONS[1], problem, truth(problem, "sblu"))


def test_stems_deliver_contiguous_tokens() -> None:
    problem = Problem.make("stem", SMALL, 2)
    for peer in peers("stem", CPU):
        tokens = peer.make(problem, _as_is).forward()
        assert tokens.shape == (2, 10, SMALL.dim)
        assert tokens.is_contiguous()


def test_gradients_are_not_accumulated() -> None:
    problem = Problem.make("stem", SMALL, 2)
    session = Session(CPU, SMALL, _as_is)
    work = CONV2D.make(problem, _as_is)
    session.timed(work, DIRECTIONS[1], problem)()
    assert all(tensor.grad is None for tensor in work.wrt.values())


def test_problem_is_the_same_every_time() -> None:
    once, again = (Problem.make("stem", SMALL, 2) for _ in range(2))
    assert torch.equal(once.x, again.x)
    assert torch.equal(once.cotangent, again.cotangent)
    assert all(torch.equal(once.parameters[name], again.parameters[name]) for name in once.parameters)


def test_parameters_are_those_of_a_stem() -> None:
    assert Problem.make("stem", SMALL, 1).parameters.keys() == SMALL.stem("reference").state_dict().keys()
