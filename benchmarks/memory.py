"""Memory of one call: the peak of what it allocates, and what it keeps for backward."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

__all__ = ["held_bytes", "peak_bytes"]


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most that `call` has allocated at one time, in bytes, its results included.

    Counted are the allocations of PyTorch's allocator, so neither the scratch space inside a BLAS nor what native
    code takes from malloc by itself. Call it once before, for what is allocated at the first call only.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        result = call()
    del result
    assert run.profiler is not None
    events = [event for event in run.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def held_bytes(forward: Callable[[], object], given: Iterable[Tensor]) -> int:
    """Bytes that `forward` saves for backward beyond the tensors `given`; storage that is shared counts once."""
    known = {tensor.untyped_storage().data_ptr() for tensor in given}
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()  # alive until counted, or a freed address could come twice
    total = sum(held.values())
    del output
    return total
