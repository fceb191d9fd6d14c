"""The Triton backend with searched configurations, and compiling ahead of the GPU benchmark, side by side.

`python -m benchmarks.gpu_search DEVICE K N` compiles the Kth of N parts of what a search tries.
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
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from .cases import Sizes
from .check import DIRECTIONS, runner
from .gpu_cases import BATCHES, problem_of, work_of
from .gpu_table import COMPILED
from .peers import peers

__all__ = ["SEARCHED", "compile_ahead", "main", "searching"]

SEARCHED = (("sblu", "float32"), ("sblu", "bfloat16"), ("stem", "float32"), ("stem", "bfloat16"))  # op, mode
SECONDS = 80  # that compiling ahead may take


@contextlib.contextmanager
def searching(file: Path) -> Iterator[dict[tuple[str, int, str], Any]]:
    """AAPE_AUTOTUNE=1 with its cache in `file`; what was chosen, by kernel, tokens and key."""
    from aape_kernels.backends.triton import configurations, launch

    chosen: dict[tuple[str, int, str], Any] = {}
    plain = launch.configuration

    def choose(kernel: str, rows: int, key: str, *rest: Any) -> Any:
        found = chosen[kernel, rows, key] = plain(kernel, rows, key, *rest)
        return found

    configurations._kept.cache_clear()
    try:
        with (
            mock.patch.dict(os.environ, AAPE_AUTOTUNE="1", AAPE_AUTOTUNE_CACHE=str(file)),
            mock.patch.object(launch, "configuration", choose),
        ):
            yield chosen
    finally:
        configurations._kept.cache_clear()


def compile_ahead(device: torch.device, batch: int, search: bool) -> str:
    """Compile in other processes what would otherwise be compiled one after the other: the compiled peers at `batch`
    and, if asked, every configuration that a search tries. Their caches on disk serve the rows; what is not there in
    time is compiled later. Returns how it went; what failed is printed.
    """
    # Horner's forward is the same graph in both directions
    jobs = [*((COMPILED[0], direction) for direction in DIRECTIONS), (COMPILED[1], DIRECTIONS[1])]
    commands = [
        ["benchmarks.warm", str(device), str(torch.get_num_threads()), json.dumps([["sblu", peer, direction, batch]])]
        for peer, direction in jobs
    ]
    if search:
        parts = max(1, min(12, (os.cpu_count() or 1) - len(commands)))
        commands += [["benchmarks.gpu_search", str(device), str(part), str(parts)] for part in range(parts)]
    with tempfile.TemporaryFile() as log:
        workers = [
            subprocess.Popen([sys.executable, "-m", *command], stdout=log, stderr=log, cwd=Path(__file__).parents[1])
            for command in commands
        ]
        until = time.monotonic() + SECONDS
        late = failed = 0
        for worker in workers:
            try:
                failed += worker.wait(max(0.0, until - time.monotonic())) != 0
            except subprocess.TimeoutExpired:
                late += 1
                worker.kill()
                worker.wait()
        if failed:
            log.seek(0)
            print(log.read()[-2000:].decode(errors="replace"), flush=True)
    return f"{len(workers)} processes, {late} not in time, {failed} failed"


def main(device_name: str, part: str, parts: str) -> None:
    """Compile every `parts`th configuration that a search tries, from the `part`th on, by one launch of each."""
    import triton

    from aape_kernels.backends.triton import configurations

    device = torch.device(device_name)
    torch.cuda.set_device(device.index or 0)

    def once(launch: Callable[[], object], **_: Any) -> float:
        launch()
        torch.cuda.synchronize()
        return 1.0

    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(configurations, "CANDIDATES", configurations.CANDIDATES[int(part) :: int(parts)]),
        mock.patch.object(triton.testing, "do_bench", once),
        searching(Path(folder) / "autotune.json"),
    ):
        for op, mode in SEARCHED:
            problem = problem_of(op, mode, Sizes(), max(BATCHES), device)
            name = "AaPE, triton" if op == "stem" else "sblu, triton"
            (peer,) = (peer for peer in peers(op, device) if peer.name == name)
            runner(work_of(peer, problem, mode), DIRECTIONS[1], problem.cotangent)()


if __name__ == "__main__":
    main(*sys.argv[1:])
