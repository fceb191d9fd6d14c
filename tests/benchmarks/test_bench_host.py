"""Where the time of a call goes: the native calls are part of `sblu`'s, and every figure reaches the table."""

from __future__ import annotations

import pytest
import torch

from aape_kernels.backends import cpu
from benchmarks.cases import Sizes
from benchmarks.host import NOTHING, OURS, PEER, costs, table
from benchmarks.measure import Session

pytestmark = pytest.mark.skipif(not cpu.NATIVE_BUILT, reason="the native module was not built")


def test_native_calls_are_part_of_the_row() -> None:
    session = Session(torch.device("cpu"), Sizes(frames=64, dim=8), lambda function: function)
    found = costs(session, rounds=3)
    for direction in ("forward", "forward + backward"):
        for cold in (False, True):
            assert 0 < found[("native", direction, cold)] < found[(OURS, direction, cold)]
            assert found[(NOTHING, direction, cold)] > 0


def test_table_has_times_and_shares() -> None:
    seconds = {OURS: 4e-4, "native": 2e-4, NOTHING: 1e-4, PEER: 8e-4}
    columns = [(direction, cold) for direction in ("forward", "forward + backward") for cold in (False, True)]
    printed = table({(name, *column): value for name, value in seconds.items() for column in columns})
    *_, ours, floor = printed.splitlines()
    assert "| sblu, cpu | 400 | 400 | 400 | 400 |" in printed.splitlines()
    assert ours == f"| sblu, cpu, over {PEER} | 0.50 | 0.50 | 0.50 | 0.50 |"
    assert floor == f"| its native calls and {NOTHING}, over {PEER} | 0.38 | 0.38 | 0.38 | 0.38 |"
