"""The memory meter, on calls whose memory is known."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from benchmarks.memory import held_bytes, peak_bytes

CPU = torch.device("cpu")
FLOATS = 1_000_000
BYTES = 4 * FLOATS
ABOUT = 1000  # PyTorch makes tensors of scalars here and there


def test_peak_counts_what_is_alive_together() -> None:
    def call() -> torch.Tensor:
        first, second = torch.ones(FLOATS), torch.ones(2 * FLOATS)
        del first
        third = torch.ones(FLOATS)  # 3 alive before and after
        del second
        return third

    assert peak_bytes(call, CPU) == pytest.approx(3 * BYTES, abs=ABOUT)


def test_peak_counts_temporaries_and_results_only() -> None:
    x = torch.ones(FLOATS)
    assert peak_bytes(lambda: x.view(1000, 1000), CPU) == pytest.approx(0, abs=ABOUT)
    assert peak_bytes(lambda: x + 1, CPU) == pytest.approx(BYTES, abs=ABOUT)
    assert peak_bytes(lambda: (x + 1) * 2, CPU) == pytest.approx(2 * BYTES, abs=ABOUT)


def test_peak_counts_backward() -> None:
    x = torch.ones(FLOATS, requires_grad=True)
    cotangent = torch.ones(FLOATS)
    # exp keeps its result, backward returns one gradient
    assert peak_bytes(lambda: torch.autograd.grad(x.exp(), x, cotangent), CPU) == pytest.approx(2 * BYTES, abs=ABOUT)


def test_held_is_what_backward_needs_beyond_the_inputs() -> None:
    x, weight = torch.ones(FLOATS, requires_grad=True), torch.ones(FLOATS, requires_grad=True)
    assert held_bytes(lambda: x * weight, [x, weight]) == 0
    assert held_bytes(lambda: x * weight, [x]) == BYTES
    assert held_bytes(lambda: x.exp(), [x]) == BYTES
    assert held_bytes(lambda: F.silu(x * weight), [x, weight]) == BYTES


def test_held_counts_shared_storage_once() -> None:
    x = torch.ones(1000, 1000, requires_grad=True)

    def forward() -> torch.Tensor:
        y = x.exp()
        return y.t() @ y[:10].t()  # both factors, and exp's own result: one storage

    assert held_bytes(forward, [x]) == BYTES


def test_nothing_is_held_without_a_graph() -> None:
    x = torch.ones(FLOATS, requires_grad=True)
    with torch.no_grad():
        assert held_bytes(lambda: x.exp(), [x]) == 0
