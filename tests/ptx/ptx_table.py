"""What the CUDA kernels execute at the default sizes, as a table: python tests/ptx/ptx_table.py > table.md

Batch 64 of 128 mel bins × 1024 frames, patches of 16 × 16, launched as on an H100. A few blocks of every launch, spread
over it, run from nvcc's PTX for sm_90 and are counted. Nothing is timed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest
import torch
from ptx_backend import Interpreter, Launch, build_recorder, use
from ptx_counts import H100, Count, Counts

from aape_kernels import AaPE, sblu

BATCH, BLOCKS = 64, 6  # blocks of a launch that are run


def stem(
    dtype: torch.dtype, states: int, hidden: int, patch: tuple[int, int] = (16, 16), cast: torch.dtype | None = None
) -> Callable[[int], None]:
    def step(batch: int) -> None:
        sizes = {"patch_size": patch, "stride": (patch[0], 16), "num_states": states, "encoder_dim": hidden}
        module = AaPE(embed_dim=8, dtype=dtype, **sizes)
        with torch.autocast("cpu", dtype=cast or torch.bfloat16, enabled=cast is not None):
            tokens = module(torch.randn(batch, 1, 128, 1024).to(dtype))
        tokens.sum().backward()

    return step


def tokens(dtype: torch.dtype, states: int, hidden: int, cast: torch.dtype | None = None) -> Callable[[int], None]:
    """Forward only, of a width whose tokens one kernel makes."""

    def forward(batch: int) -> None:
        module = AaPE(embed_dim=768, dtype=dtype, num_states=states, encoder_dim=hidden)
        with torch.no_grad(), torch.autocast("cpu", dtype=cast or torch.bfloat16, enabled=cast is not None):
            module(torch.randn(batch, 1, 128, 1024).to(dtype))

    return forward


def unit(dtype: torch.dtype, states: int, patch: tuple[int, int] = (16, 16)) -> Callable[[int], None]:
    def step(batch: int) -> None:
        x, tokens = torch.randn(batch, 1, 128, 1024).to(dtype).requires_grad_(), (batch, 128 // patch[0], 64, states)
        leaves = [torch.rand(tokens) + 0.1, torch.rand(tokens) + 1, torch.randn(states, 1, patch[0]).to(dtype)]
        y = sblu(x, *(leaf.requires_grad_() for leaf in leaves), patch_size=patch, stride=(patch[0], 16))
        y.backward(torch.ones_like(y))  # whose cotangent takes memory, as that of a sum would not

    return step


# A step, its states, and its tokens of a clip. Tensor cores are not used for odd windows.
CALLS = {
    "stem, bfloat16, S = 16, H = 32": (stem(torch.bfloat16, 16, 32), 16, 512),
    "stem, bfloat16, S = 32, H = 64": (stem(torch.bfloat16, 32, 64), 32, 512),
    "stem, float32, S = 16, H = 32": (stem(torch.float32, 16, 32), 16, 512),
    "stem, float32, S = 32, H = 64": (stem(torch.float32, 32, 64), 32, 512),
    "stem, float32 to bfloat16, S = 16, H = 32": (stem(torch.float32, 16, 32, cast=torch.bfloat16), 16, 512),
    "tokens, bfloat16, S = 16, H = 32": (tokens(torch.bfloat16, 16, 32), 16, 512),
    "tokens, bfloat16, S = 32, H = 64": (tokens(torch.bfloat16, 32, 64), 32, 512),
    "tokens, float32, S = 16, H = 32": (tokens(torch.float32, 16, 32), 16, 512),
    "tokens, float32, S = 32, H = 64": (tokens(torch.float32, 32, 64), 32, 512),
    "tokens, float32 to bfloat16, S = 16, H = 32": (tokens(torch.float32, 16, 32, torch.bfloat16), 16, 512),
    "`sblu`, bfloat16, S = 16": (unit(torch.bfloat16, 16), 16, 512),
    "`sblu`, float32, S = 16": (unit(torch.float32, 16), 16, 512),
    "`sblu`, float32, S = 32": (unit(torch.float32, 32), 32, 512),
    "stem, 32 rows, float32, S = 16, H = 32": (stem(torch.float32, 16, 32, patch=(32, 16)), 16, 256),
    "`sblu`, 32 rows, float32, S = 16": (unit(torch.float32, 16, patch=(32, 16)), 16, 256),
    "stem, 15 frames, float32, S = 32, H = 64": (stem(torch.float32, 32, 64, patch=(16, 15)), 32, 512),
    "`sblu`, 15 frames, float32, S = 32": (unit(torch.float32, 32, patch=(16, 15)), 32, 512),
}


@dataclass
class Row:
    """A launch of a training step, forward and backward; counts of the whole, from those of some of its blocks."""

    call: str
    kernel: str
    counts: Counts
    scale: float
    tokens: int
    states: int
    size: int | None

    @property
    def issued(self) -> float:
        return self.counts.issued * self.scale

    @property
    def each(self) -> float:
        """Warp instructions, about the machine's, for a token and a state."""
        return self.issued / (self.tokens * self.states)

    @property
    def divisions(self) -> float:
        """Of integers, by what is no constant, of warps, a token."""
        return self.counts.divisions * self.scale / self.tokens

    def cells(self) -> list[str]:
        counts = self.counts
        warps = [f"{self.issued / 1e6:.2f}", f"{self.each:.2f}", f"{self.divisions:.2f}"]
        memory = [f"{counts.conflicts:.2f}", f"{counts.loads_used:.0%}", f"{counts.stores_used:.0%}"]
        wavefronts = counts.wavefronts * self.scale
        products = counts.products * self.scale
        seconds = H100.issue_time(self.issued), H100.product_time(products), H100.shared_time(wavefronts)
        times = [f"{1e6 * one:.1f}" for one in seconds]
        times.append("–" if self.size is None else f"{1e6 * H100.memory_time(self.size):.1f}")
        return [self.call, f"`{self.kernel.partition('<')[0]}`", *warps, *memory, *times]


def measure(interpreter: Interpreter, call: str, batch: int = BATCH) -> list[Row]:
    """The rows of one call, whose launches are the H100's."""
    step, states, of_clip = CALLS[call]
    counted: list[Count] = []

    def observer(launch: Launch) -> Count:
        counted.append(Count())
        return counted[-1]

    def chosen(launch: Launch) -> Sequence[int]:
        x, y, z = launch.grid
        total = x * y * z
        return sorted({(2 * k + 1) * total // (2 * BLOCKS) for k in range(min(BLOCKS, total))})

    interpreter.recorder.set_multiprocessors(H100.multiprocessors)
    interpreter.observer, interpreter.chosen = observer, chosen
    first = len(interpreter.launches)
    try:
        step(batch)
    finally:
        interpreter.recorder.set_multiprocessors(2)
    rows = []
    for launch, count in zip(interpreter.launches[first:], counted, strict=True):
        x, y, z = launch.grid
        scale = x * y * z / len(chosen(launch))
        rows.append(Row(call, launch.kernel, count.counts, scale, batch * of_clip, states, launch.size))
    return rows


HEADS = ("call", "kernel", "10⁶ warp instructions", "a token and state", "divisions a token", "wavefronts / fewest",
         "sectors used, loads", "stores", "issued in µs", "products",
         "shared", "memory")  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    lines = [" | ".join(HEADS), "|".join(["---"] * len(HEADS)), *(" | ".join(row.cells()) for row in rows)]
    return "\n".join(f"| {line} |".replace("| ---|", "|---|").replace("--- |", "---|") for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=BATCH, help="clips of 1024 frames (default %(default)s)")
    given = parser.parse_args()
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        interpreter = Interpreter(build_recorder(Path(folder)))
        use(patch, interpreter)
        print(table([row for call in CALLS for row in measure(interpreter, call, given.batch)]))


if __name__ == "__main__":
    main()
