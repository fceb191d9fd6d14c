"""What of `sblu`'s rows is the host's: `python -m benchmarks.host` prints where the time of a call goes, on the CPU.

The rows of `make bench` run a Conv2d stem before every call, which leaves nothing of Python, torch or this package in
the caches. Beside `sblu` and its native calls stands what PyTorch asks of anything that is differentiated from Python:
an `autograd.Function` of as many tensors that computes nothing. `sblu` takes at least that and its native calls.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from aape_kernels.backends import cpu, native

from .cases import Problem
from .check import DIRECTIONS, runner
from .environment import allocator_environment
from .measure import Session
from .peers import CONV2D, Work, peers, work_of

__all__ = ["BATCH", "costs", "main", "table"]

BATCH = 8
ROUNDS = 100
OURS, PEER, NOTHING = "sblu, cpu", "Horner, torch.compile", "a Function of nothing"


class _Nothing(torch.autograd.Function):
    """Outputs and gradients of `sblu`'s sizes, of whatever the memory holds."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, decay: Tensor, frequency: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(decay, frequency, weight)
        return x.new_empty(*decay.shape[:3], 2, decay.shape[3])

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> Any:
        return None, *map(torch.empty_like, ctx.saved_tensors)


def _nothing(problem: Problem) -> Work:
    wrt = {name: value.clone().requires_grad_() for name, value in problem.parameters.items()}
    return Work(lambda: _Nothing.apply(problem.x, *wrt.values()), wrt)


@contextmanager
def _native_seconds(into: dict[str, float]) -> Iterator[None]:
    """What the native calls take, by name, of the last call of each."""
    module = native.load()

    def timed(name: str) -> Callable[..., None]:
        call = getattr(module, name)

        def run(*arguments: Any) -> None:
            start = time.perf_counter()
            call(*arguments)
            into[name] = time.perf_counter() - start

        return run

    with mock.patch.multiple(module, sblu=timed("sblu"), sblu_backward=timed("sblu_backward")):
        yield


def _turns(names: Sequence[str], rounds: int) -> Iterator[tuple[bool, str]]:
    """Each in a loop of its own, then all by turns behind a Conv2d stem."""
    yield from ((False, name) for name in names for _ in range(rounds))
    yield from ((True, name) for _ in range(rounds) for name in names)


def costs(session: Session, rounds: int = ROUNDS) -> dict[tuple[str, str, bool], float]:
    """Median seconds by what is timed, the direction, and whether a Conv2d stem ran before every call.

    Timed are `OURS`, "native" (its native calls), `PEER` and `NOTHING`.
    """
    problem, plain = session.problem("sblu", BATCH), session.problem("stem", BATCH)
    works = {peer.name: peer for peer in peers("sblu", session.device) if peer.name in (OURS, PEER)}
    found: dict[tuple[str, str, bool], list[float]] = {}
    for direction in DIRECTIONS:
        calls = {name: work_of(peer, problem, "float32", session.compile_) for name, peer in works.items()}
        calls[NOTHING] = _nothing(problem)
        runs = {name: runner(work, direction, problem.cotangent) for name, work in calls.items()}
        before = runner(work_of(CONV2D, plain, "float32", session.compile_), direction, plain.cotangent)
        inside: dict[str, float] = {}
        with _native_seconds(inside):
            for cold, name in _turns(list(runs), rounds):
                if cold:
                    before()
                inside.clear()
                start = time.perf_counter()
                runs[name]()
                took = time.perf_counter() - start
                found.setdefault((name, direction, cold), []).append(took)
                if name == OURS:
                    found.setdefault(("native", direction, cold), []).append(sum(inside.values()))
    return {key: statistics.median(values) for key, values in found.items()}


def table(found: dict[tuple[str, str, bool], float]) -> str:
    """The costs in µs, and what the sum of the native calls and of nothing is to the peer."""
    lines = [
        "| µs | in a loop: forward | forward + backward | after a Conv2d stem: forward | forward + backward |",
        "|---|---:|---:|---:|---:|",
    ]
    columns = [(direction, cold) for cold in (False, True) for direction in DIRECTIONS]
    times = {name: [found[(name, *column)] for column in columns] for name in (OURS, "native", NOTHING, PEER)}
    for name, seconds in times.items():
        label = "its native calls" if name == "native" else name
        lines.append(f"| {label} | " + " | ".join(f"{1e6 * value:.0f}" for value in seconds) + " |")
    floor = [sum(pair) for pair in zip(times["native"], times[NOTHING], strict=True)]
    for label, seconds in ((OURS, times[OURS]), (f"its native calls and {NOTHING}", floor)):
        shares = [value / peer for value, peer in zip(seconds, times[PEER], strict=True)]
        lines.append(f"| {label}, over {PEER} | " + " | ".join(f"{share:.2f}" for share in shares) + " |")
    return "\n".join(lines)


def main() -> None:
    """Print the table, under the benchmarks' own allocator setting."""
    if not cpu.NATIVE_BUILT:
        sys.exit("benchmarks.host: the native module was not built")
    environment = allocator_environment("pinned", os.environ)
    if environment is not None:  # glibc reads it when a process starts
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.host"], environment)
    print(table(costs(Session(torch.device("cpu")))))


if __name__ == "__main__":
    main()
