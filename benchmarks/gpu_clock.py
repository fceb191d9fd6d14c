"""Clocks of the GPU benchmark: calls by events with a cold cache, graphs, the card's ceilings, times by kernel.

Each works on a CPU as well, by the host's clock and without graphs, so that it can be tried without a GPU.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["Clock", "graph_of", "kernel_times"]

WARM_UP = 5
MAX_ROUNDS = 50
PROFILED = 5  # calls


@dataclass
class Clock:
    """Times calls on one device, each with caches that hold nothing of its input.

    Attributes:
        seconds: what timing a row may take, unless that allows fewer rounds than `min_rounds`.
    """

    device: torch.device
    seconds: float = 0.15
    min_rounds: int = 10
    _buffer: torch.Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        size = 2**20
        if self.device.type == "cuda":
            properties = torch.cuda.get_device_properties(self.device)
            # long enough to write that the host has enqueued a small call before the device gets to it
            size = max(4 * getattr(properties, "L2_cache_size", 0), 2**29)
        self._buffer = torch.empty(size, dtype=torch.uint8, device=self.device)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def flush(self) -> None:
        """Overwrite a buffer larger than every cache of the device."""
        self._buffer.zero_()

    def _once(self, call: Callable[[], object]) -> Callable[[], float]:
        """Enqueue one timed call; the function returned gives its milliseconds once the device has been waited for."""
        self.flush()
        if self.device.type != "cuda":
            start = time.perf_counter()
            call()
            elapsed = 1e3 * (time.perf_counter() - start)
            return lambda: elapsed
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start_event.record()
        call()
        end_event.record()
        return lambda: float(start_event.elapsed_time(end_event))

    def times(self, *calls: Callable[[], object]) -> list[list[float]]:
        """Milliseconds of every round of each call; a round runs all of them, one after the other."""
        for _ in range(WARM_UP):
            for call in calls:
                call()
        self.synchronize()
        start = time.perf_counter()
        for call in calls:
            self._once(call)
        self.synchronize()
        each = time.perf_counter() - start
        rounds = min(MAX_ROUNDS, max(self.min_rounds, round(self.seconds / each)))
        pending = [[self._once(call) for call in calls] for _ in range(rounds)]
        self.synchronize()
        return [[elapsed() for elapsed in column] for column in zip(*pending, strict=True)]

    def copy_bandwidth(self) -> float:
        """Bytes a second, read and written counted both, of a copy many times larger than the caches."""
        size = 2**31 if self.device.type == "cuda" else 2**24
        source = torch.empty(size, dtype=torch.uint8, device=self.device).random_()
        target = torch.empty_like(source)
        (times,) = self.times(lambda: target.copy_(source))
        return 2 * size / (1e-3 * statistics.median(times))

    def matmul_rate(self, dtype: torch.dtype = torch.bfloat16) -> float:
        """Operations a second of a large square product, a multiply-add counted as two, of random numbers: zeros run
        faster."""
        size = 8192 if self.device.type == "cuda" else 128
        a, b = (torch.randn(size, size, device=self.device).to(dtype) for _ in range(2))
        (times,) = self.times(lambda: a @ b)
        return 2 * size**3 / (1e-3 * statistics.median(times))


def graph_of(call: Callable[[], object]) -> Callable[[], None]:
    """The replay of `call` as a CUDA graph: what it takes without Python and launches.

    Errors: those of the capture, where the call does what a graph cannot hold.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = call()

    def replay() -> None:
        graph.replay()

    replay.held = held  # type: ignore[attr-defined]  # the graph writes there
    return replay


def kernel_times(call: Callable[[], object]) -> list[dict[str, Any]]:
    """Every kernel of one call with its launches and its microseconds, longest first; caches are as the call before
    left them. Empty where the profiler sees no device.
    """
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    for _ in range(WARM_UP):
        call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as run:
        for _ in range(PROFILED):
            call()
        torch.cuda.synchronize()
    kernels: dict[str, list[float]] = {}
    for event in run.events():
        if event.device_type == DeviceType.CUDA:
            kernels.setdefault(event.name, []).append(event.time_range.elapsed_us())
    rows = [
        {"kernel": name, "launches": len(times) / PROFILED, "us": sum(times) / PROFILED}
        for name, times in kernels.items()
    ]
    return sorted(rows, key=lambda row: -float(row["us"]))
