"""Compile ahead of the run: `python -m benchmarks.warm` fills torch.compile's cache on disk, one process a batch size.

The compiler is single-threaded and slow (most of a minute for one graph), so compiling side by side halves what a
first run waits. What is timed later comes from the cache.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from .cases import Problem, Sizes
from .check import runner
from .peers import compile_static, peers

__all__ = ["Case", "main", "warm"]

Case = tuple[str, str, str, int]  # op, peer, direction, batch


def warm(cases: Iterable[Case], device: torch.device) -> None:
    """Compile `cases` in other processes, and wait for them.

    A failure is not reported here: the row itself will meet and report it.
    """
    batches: dict[int, list[Case]] = {}
    for case in cases:
        batches.setdefault(case[3], []).append(case)
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.warm", str(device), str(torch.get_num_threads()), json.dumps(batch)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=Path(__file__).parents[1],
        )
        for batch in batches.values()
    ]
    for worker in workers:
        worker.wait()


def main(device_name: str, threads: str, cases: str) -> None:
    """Run every case once; `threads` is part of the generated code."""
    device = torch.device(device_name)
    torch.set_num_threads(int(threads))
    for op, name, direction, batch in json.loads(cases):
        torch.compiler.reset()
        problem = Problem.make(op, Sizes(), batch, device)
        (peer,) = (peer for peer in peers(op, device) if peer.name == name)
        runner(peer.make(problem, compile_static), direction, problem.cotangent)()


if __name__ == "__main__":
    main(*sys.argv[1:])
