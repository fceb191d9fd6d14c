"""Geometries, random inputs and golden cases, shared by the tests of every backend."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

GOLDEN = sorted((Path(__file__).parent / "data").glob("case-*.npz"))
GOLDEN_STEMS = sorted((Path(__file__).parent / "data").glob("stem-*.npz"))
NAMES = ("x", "decay", "frequency", "weight")
STEM_NAMES = ("x", "proj_w", "proj_b", "w1", "b1", "w2", "b2", "sblu_w", "fusion_w")


@dataclass(frozen=True)
class Case:
    batch: int
    channels: int
    states: int
    patch: tuple[int, int]
    stride: tuple[int, int]
    window: int
    grid: tuple[int, int]
    rest: tuple[int, int]  # mel bins and frames left over behind the last patch
    kernel: str

    @property
    def size(self) -> tuple[int, int]:
        f, t = ((n - 1) * s + p + r for n, s, p, r in zip(self.grid, self.stride, self.patch, self.rest, strict=True))
        return f, t

    @property
    def hard(self) -> bool:
        """Overlapping patches or an odd window."""
        return self.window % 2 == 1 or any(s < p for s, p in zip(self.stride, self.patch, strict=True))

    def inputs(self, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Tensor]:
        """x, decay, frequency, weight, and a cotangent for y; 16-bit for x, weight and y only."""
        rest = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
        tokens = (self.batch, *self.grid)
        x = torch.randn(self.batch, self.channels, *self.size).to(dtype)
        decay = torch.rand(*tokens, self.states).to(rest) * 2 + 0.1
        frequency = torch.rand(*tokens, self.states).to(rest) * math.pi
        weight = torch.randn(self.states, self.channels, self.patch[0]).to(dtype)
        cotangent = torch.randn(*tokens, 2, self.states).to(dtype)
        return [x, decay, frequency, weight], cotangent

    @property
    def options(self) -> dict[str, object]:
        return {"patch_size": self.patch, "stride": self.stride, "window": self.window, "kernel": self.kernel}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any geometry of docs/maths.md §1, small; at least two in three with overlap or an odd window."""
    p_f = draw(st.integers(1, 5))
    s_f = draw(st.integers(1, 6))
    match draw(st.sampled_from(["overlap", "odd", "any"])):
        case "overlap":
            p_t = draw(st.integers(2, 7))
            s_t = draw(st.integers(1, p_t - 1))
        case "odd":
            p_t = 2 * draw(st.integers(0, 3)) + 1
            s_t = draw(st.integers(1, 8))
        case _:
            p_t = draw(st.integers(1, 7))
            s_t = draw(st.integers(1, 8))
    return Case(
        batch=draw(st.integers(1, 2)),
        channels=draw(st.integers(1, 2)),
        states=draw(st.integers(1, 3)),
        patch=(p_f, p_t),
        stride=(s_f, s_t),
        window=draw(st.sampled_from(range(2 - p_t % 2, p_t + 7, 2))),
        grid=(draw(st.integers(1, 3)), draw(st.integers(1, 3))),
        rest=(draw(st.integers(0, s_f - 1)), draw(st.integers(0, s_t - 1))),
        kernel=draw(st.sampled_from(["bilateral", "quadrature"])),
    )


SQUARE = Case(2, 1, 4, (4, 8), (4, 8), 8, (2, 3), (0, 0), "quadrature")
"""No overlap, K = P_t: what masked pre-training uses, small."""

AWKWARD = Case(2, 2, 3, (3, 5), (2, 4), 9, (3, 4), (1, 2), "quadrature")
"""Overlap on both axes, odd K > P_t, two channels, left-over bins and frames."""


def golden(path: Path, dtype: torch.dtype) -> tuple[list[Tensor], Tensor, dict[str, object], list[Tensor]]:
    """Inputs and cotangent, options of `sblu`, and y and the gradients in float64; 16-bit as in `Case.inputs`."""
    data = np.load(path)
    rest = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    inputs = [torch.tensor(data[name], dtype=rest if name in ("decay", "frequency") else dtype) for name in NAMES]
    options = {key: tuple(data[key].tolist()) for key in ("patch_size", "stride")}
    options |= {"window": int(data["window"]), "kernel": str(data["kernel"])}
    want = [torch.tensor(data[name]) for name in ("y", *(f"grad_{name}" for name in NAMES))]
    return inputs, torch.tensor(data["cotangent"], dtype=dtype), options, want


def golden_stem(
    path: Path, dtype: torch.dtype
) -> tuple[dict[str, Tensor], Tensor, dict[str, object], dict[str, Tensor]]:
    """Inputs by their names in `embed`, cotangent, options of `embed`, and "tokens" and "grad_<name>" in float64."""
    data = np.load(path)
    inputs = {name: torch.tensor(data[name], dtype=dtype) for name in STEM_NAMES if name in data}
    options: dict[str, object] = {key: tuple(data[key].tolist()) for key in ("stride", "decay", "band")}
    options |= {"window": int(data["window"]), "kernel": str(data["kernel"])}
    want = {name: torch.tensor(data[name]) for name in ("tokens", *(f"grad_{name}" for name in inputs))}
    return inputs, torch.tensor(data["cotangent"], dtype=dtype), options, want
