"""One row: check the peer, then time it round by round beside the Conv2d stem, then weigh its memory."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from . import peers as table
from .cases import Problem, Sizes, Truth, truth
from .check import check, runner
from .memory import held_bytes, peak_bytes

__all__ = ["Session", "spread"]

WARM_UP = 4  # pairs; allocator, caches and the compiler's own first-call work
MIN_ROUNDS, MAX_ROUNDS = 15, 400
SECONDS = 1.5  # of timing a row, pairs included


def _label(sizes: Sizes, mode: str) -> str:
    return str(sizes) if mode == "float32" else f"{sizes}, {mode}"


def spread(values: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile, linearly interpolated."""
    if len(values) == 1:
        return dict.fromkeys(("p20", "median", "p80"), values[0])
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return {"p20": fifths[0], "median": statistics.median(values), "p80": fifths[3]}


@dataclass
class Session:
    """What the rows of a run share: the device, the sizes, and the problem and truth of the case last asked for."""

    device: torch.device
    sizes: Sizes = field(default_factory=Sizes)
    compile_: table.Compiler = table.compile_static
    _problems: dict[tuple[str, int, Sizes, str], Problem] = field(default_factory=dict)
    _truths: dict[tuple[str, int, Sizes, torch.dtype], Truth] = field(default_factory=dict)

    def problem(self, op: str, batch: int, sizes: Sizes | None = None, mode: str = "float32") -> Problem:
        """The problem of one case, of the session's sizes unless given; the same tensors whenever it is asked for."""
        key = op, batch, sizes or self.sizes, mode
        if key not in self._problems:
            problem = Problem.make(op, key[2], batch, self.device)
            self._problems[key] = problem.under_autocast() if mode.startswith("autocast") else problem
        return self._problems[key]

    def truth(self, problem: Problem, formula: str) -> Truth:
        """The float64 result of one case."""
        key = formula, problem.batch, problem.sizes, problem.cotangent.dtype
        if key not in self._truths:
            self._truths[key] = truth(problem, formula)
        return self._truths[key]

    def timed(self, work: table.Work, direction: str, problem: Problem) -> Callable[[], None]:
        """The call whose duration counts: results are dropped inside it, and a GPU has finished when it returns."""
        run = runner(work, direction, problem.cotangent)
        if self.device.type != "cuda":

            def call() -> None:
                run()
        else:

            def call() -> None:
                run()
                torch.cuda.synchronize(self.device)

        return call

    def measure(
        self,
        benchmark: Any,
        peer: table.Peer,
        op: str,
        direction: str,
        batch: int,
        sizes: Sizes | None = None,
        mode: str = "float32",
    ) -> None:
        """Fill pytest-benchmark's fixture with the figures of one row, of the session's sizes unless given.

        `mode` is "float32" or "autocast bfloat16", for the peer and for Conv2d.
        `extra_info` gets times in seconds, memory in bytes, and `ratio`: of each round's time to that of the Conv2d
        stem in the same direction, run just before it. A peer that is wrong raises `WrongOutput` and is not timed.
        """
        problem = self.problem(op, batch, sizes, mode)
        work = table.work_of(peer, problem, mode, self.compile_)
        errors = check(work, direction, problem, self.truth(problem, peer.formula))

        plain = self.problem("stem", batch, sizes, mode)
        conv = self.timed(table.work_of(table.CONV2D, plain, mode, self.compile_), direction, plain)
        target = self.timed(work, direction, problem)
        pairs: list[float] = []

        def setup() -> None:
            start = time.perf_counter()
            conv()
            pairs.append(time.perf_counter() - start)

        start = time.perf_counter()
        for _ in range(WARM_UP):
            conv()
            target()
        pair_seconds = (time.perf_counter() - start) / WARM_UP
        rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, round(SECONDS / pair_seconds)))

        benchmark.group = f"{op}, {direction}, batch {batch}"
        gc.collect()
        gc.disable()
        try:
            benchmark.pedantic(target, setup=setup, rounds=rounds)
        finally:
            gc.enable()
        if benchmark.stats is None:  # --benchmark-disable
            return
        times = benchmark.stats.stats.data
        given = [problem.x, *problem.parameters.values(), *work.wrt.values()]
        benchmark.extra_info.update(
            op=op,
            direction=direction,
            batch=batch,
            sizes=_label(sizes or self.sizes, mode) if sizes or mode != "float32" else None,
            peer=peer.name,
            baseline=peer.baseline,
            seconds=spread(times),
            conv2d_seconds=spread(pairs),
            ratio=spread([mine / other for mine, other in zip(times, pairs, strict=True)]),
            rounds=rounds,
            peak_bytes=peak_bytes(runner(work, direction, problem.cotangent), self.device),
            held_bytes=None if direction == "forward" else held_bytes(work.forward, given),
            errors=errors,
        )
