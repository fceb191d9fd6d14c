"""The Triton backend with searched configurations, and compiling ahead of the GPU benchmark, side by side.

python -m benchmarks.gpu_search peers DEVICE      what torch.compile makes of the peers
python -m benchmarks.gpu_search DEVICE K N        the Kth of N parts of what a search tries
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from .check import DIRECTIONS, runner
from .gpu_cases import LARGE, Case, problem_of
from .gpu_table import COMPILED
from .peers import peers, work_of

__all__ = ["SEARCHED", "SEARCH_SECONDS", "Found", "compile_ahead", "main", "peers_ahead", "search_ahead", "searching"]

SEARCHED = (Case("stem", "bfloat16"), Case("stem", "float32"), Case("sblu", "float32"), Case("sblu", "bfloat16"))
# Seconds that compiling ahead may take: the peers' beside the tests, a search's before it.
PEERS_SECONDS, SEARCH_SECONDS = 170, 80


@dataclass(frozen=True)
class Found:
    """What one search has timed, in milliseconds, the usual configuration first."""

    kernel: str
    times: dict[Any, float]


@contextlib.contextmanager
def searching(file: Path) -> Iterator[list[Found]]:
    """AAPE_AUTOTUNE=1 with its cache in `file`; what is searched meanwhile."""
    from aape_kernels.backends.triton import configurations

    found: list[Found] = []
    kernels = sorted({kernel for kernel, _ in configurations.DEFAULTS})
    plain = configurations.timed

    def timed(key: str, *rest: Any) -> dict[Any, float]:
        times = plain(key, *rest)
        found.append(Found(next(kernel for kernel in kernels if f" {kernel} " in key), times))
        return times

    configurations._kept.cache_clear()
    try:
        with (
            mock.patch.dict(os.environ, AAPE_AUTOTUNE="1", AAPE_AUTOTUNE_CACHE=str(file)),
            mock.patch.object(configurations, "timed", timed),
        ):
            yield found
    finally:
        configurations._kept.cache_clear()


def compile_ahead(commands: list[list[str]], seconds: float) -> str:
    """Run modules side by side, in other processes, for what they leave in the compilers' caches on disk; what is not
    there in time is compiled later. Returns how it went; what failed is printed.
    """
    # each compiles on its own thread: with helpers of their own they would only be in each other's way
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
    root = Path(__file__).parents[1]
    with tempfile.TemporaryFile() as log:
        workers = [
            subprocess.Popen([sys.executable, "-m", *command], stdout=log, stderr=log, cwd=root, env=environment)
            for command in commands
        ]
        until = time.monotonic() + seconds
        late = failed = 0
        try:
            for worker in workers:
                try:
                    failed += worker.wait(max(0.0, until - time.monotonic())) != 0
                except subprocess.TimeoutExpired:
                    late += 1
                    worker.kill()
                    worker.wait()
        finally:
            for worker in workers:
                worker.kill()  # nothing, where it has ended
        if failed:
            log.seek(0)
            print(log.read()[-2000:].decode(errors="replace"), flush=True)
    return f"{len(workers)} processes, {late} not in time, {failed} failed"


def peers_ahead(device: torch.device) -> list[list[str]]:
    """The commands that compile the compiled peers."""
    # Horner's forward is the same graph in both directions
    jobs = [*((COMPILED[0], direction) for direction in DIRECTIONS), (COMPILED[1], DIRECTIONS[1])]
    threads = str(torch.get_num_threads())
    return [
        ["benchmarks.warm", str(device), threads, json.dumps([["sblu", peer, direction, LARGE]])]
        for peer, direction in jobs
    ]


def search_ahead(device: torch.device) -> list[list[str]]:
    """The commands that compile what a search tries, one for each part."""
    parts = max(1, min(12, (os.cpu_count() or 1) - 2))
    return [["benchmarks.gpu_search", str(device), str(part), str(parts)] for part in range(parts)]


def main(*arguments: str) -> None:
    """Compile the compiled peers; or every Nth configuration that a search tries, from the Kth on, by launching it."""
    if arguments[0] == "peers":
        print(f"compiled peers: {compile_ahead(peers_ahead(torch.device(arguments[1])), PEERS_SECONDS)}")
        return
    import triton

    from aape_kernels.backends.triton import configurations

    device, part, parts = torch.device(arguments[0]), int(arguments[1]), int(arguments[2])
    torch.cuda.set_device(device.index or 0)
    candidates = configurations.candidates

    def once(launch: Callable[[], object], **_: Any) -> float:
        launch()
        torch.cuda.synchronize()
        return 1.0

    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(configurations, "candidates", lambda kernel: candidates(kernel)[part::parts]),
        mock.patch.object(triton.testing, "do_bench", once),
        searching(Path(folder) / "autotune.json"),
    ):
        for case in SEARCHED:
            problem = problem_of(case, device)
            name = "AaPE, triton" if case.op == "stem" else "sblu, triton"
            (peer,) = (peer for peer in peers(case.op, device) if peer.name == name)
            runner(work_of(peer, problem, case.mode), DIRECTIONS[1], problem.cotangent)()


if __name__ == "__main__":
    main(*sys.argv[1:])
