"""Compiles every launch that the Triton backend makes for a target that need not be here, and reports what it takes.

    python ahead_of_time.py sm_90 --all-sizes

The launches are recorded from the backend's own functions, and their signatures are Triton's own: what is compiled is
what would run. Prints one JSON object a launch. Not to be run under TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from aape_kernels.backends.triton import configurations, launch
from aape_kernels.geometry import PatchGrid
from aape_kernels.weights import Weights

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

# What a program may have, in bytes of shared memory (LDS on gfx942).
SHARED_LIMIT = {
    "sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "sm_120": 99 * 1024, "gfx942": 64 * 1024,
}  # fmt: skip


# The kernels that may standardise log-magnitudes.
STANDARDISING = {"sblu_fwd_kernel", "stem_fwd_kernel", "standardise_kernel"}


@dataclass(frozen=True)
class Launch:
    """One recorded launch: everything that its compilation depends on."""

    kernel: JITFunction
    signature: dict[str, str]
    constants: dict[Any, Any]
    attributes: dict[Any, Any]
    options: dict[str, Any]

    @property
    def key(self) -> str:
        """Two launches of one key are compiled once."""
        return f"{self.kernel.__name__} {self.signature} {self.constants} {self.attributes} {self.options}"

    def __str__(self) -> str:
        names = self.kernel.arg_names
        given = {names[path[0]]: value for path, value in self.constants.items()}
        types = "-".join(t[1:] for t in self.signature.values() if t.startswith("*"))
        sizes = [f"{name}{given[name]}" for name in ("S", "R", "K", "H", "BN") if name in given]
        sizes += [f"planes{given['PLANES']}"] if "PLANES" in given else []
        flags = [
            k.lower() for k in ("QUADRATURE", "RANGES", "TIME_MAJOR", "ADD", "OUT", "GRAD", "NARROW") if given.get(k)
        ]
        flags += [given["PRECISION"]] if given.get("PRECISION", "ieee") != "ieee" else []
        return " ".join(
            [self.kernel.__name__, *sizes, *flags, f"warps{self.options['num_warps']}",
             f"stages{self.options['num_stages']}", types]
        )  # fmt: skip


@dataclass(frozen=True)
class Resources:
    """What one launch takes, and what it wastes.

    Attributes:
        registers: of a thread.
        shared: bytes of shared memory.
        stack: bytes of a thread's stack.
        spills: bytes that registers are spilled to.
        warps: that a multiprocessor can hold at once; None but for NVIDIA, as the rest.
        loads: how many loads from global memory there are of so many bytes a thread.
        replication: how many warps compute each part of a product, where most do.
    """

    registers: int
    shared: int
    stack: int
    spills: int
    warps: int | None = None
    loads: dict[int, int] | None = None
    replication: int | None = None


def record(call: Callable[[], object], target: str) -> list[Launch]:
    """The launches that `call` makes, each once; nothing runs."""
    backend = make_backend(TARGETS[target])
    launches: dict[str, Launch] = {}

    def run(self: JITFunction, *given: Any, grid: Any, warmup: bool, **named: Any) -> None:
        bind = create_function_from_signature(self.signature, self.params, backend)
        bound, specialization, options = bind(*given, **named)
        options, signature, constants, attributes = self._pack_args(backend, named, bound, specialization, options)
        one = Launch(self, signature, constants, attributes, options.__dict__)
        launches[one.key] = one

    one = TARGETS[target]
    capability = one.arch // 10 if one.backend == "cuda" else 0
    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(configurations, "_capability", return_value=capability),
    ):
        call()
    return list(launches.values())


def compile_for(one: Launch, target: str) -> Resources:
    """Compile a recorded launch and read what it takes."""
    source = ASTSource(one.kernel, one.signature, one.constants, one.attributes)
    compiled = triton.compile(source, target=TARGETS[target], options=one.options)
    shared = compiled.metadata.shared
    if target.startswith("gfx"):
        text = compiled.asm["amdgcn"]

        def number(name: str) -> int:
            return int(re.search(rf"\.{name}:\s+(\d+)", text)[1])

        spills = number("vgpr_spill_count") + number("sgpr_spill_count")
        return Resources(number("vgpr_count"), shared, number("private_segment_fixed_size"), spills)
    said = _assemble(compiled.asm["ptx"], target)
    stack, stores, loads = map(
        int, re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said).groups()
    )
    found = re.findall(r"\bld\.global(?:\.\w+)*?(?:\.v(\d))?\.[bfsu](\d+)\b", compiled.asm["ptx"])
    widths = Counter(int(count or 1) * int(bits) // 8 for count, bits in found)
    registers = int(re.search(r"Used (\d+) registers", said)[1])
    warps = resident(registers, shared, one.options["num_warps"], SHARED_LIMIT[target])
    return Resources(registers, shared, stack, stores + loads, warps, dict(widths), replication(compiled.asm["ttgir"]))


def resident(registers: int, shared: int, warps: int, limit: int) -> int:
    """The warps of a multiprocessor that registers, shared memory and its 32 programs and 64 warps have room for."""
    of_registers = 65536 // (32 * -(-registers // 8) * 8 * warps)
    return warps * min(of_registers, limit // max(1, shared), 32, 64 // warps)


def replication(text: str) -> int:
    """Of Triton's own representation: warps beyond what a product has rows and columns for compute all of it again."""
    layout = r"#(\w+) = #ttg\.nvidia_mma<\{[^}]*warpsPerCTA = \[(\d+), (\d+)\], instrShape = \[(\d+), (\d+)"
    tiles = {name: (int(w_m) * int(i_m), int(w_n) * int(i_n)) for name, w_m, w_n, i_m, i_n in re.findall(layout, text)}
    products = re.findall(r"tt\.dot\b.*-> tensor<(\d+)x(\d+)xf32, #(\w+)>", text)
    return max(
        (max(1, tiles[of][0] // int(m)) * max(1, tiles[of][1] // int(n)) for m, n, of in products if of in tiles),
        default=1,
    )


def _assemble(ptx: str, target: str) -> str:
    """What ptxas, of those that Triton brings, says of a kernel."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    blackwell = tools / "ptxas-blackwell"
    tool = blackwell if int(target[3:]) >= 100 and blackwell.exists() else tools / "ptxas"
    architecture = re.search(r"\.target (sm_\w+)", ptx)[1]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [tool, "-v", f"--gpu-name={architecture}", path, "-o", path.with_suffix(".cubin")]
        return subprocess.run(command, check=True, capture_output=True, text=True).stderr


def calls(
    dtype: torch.dtype, batch: int = 1, frames: int = 1024, mel_bins: int = 128, patch: tuple[int, int] = (16, 16),
    states: int = 32, channels: int = 1, kernel: str = "quadrature", time_major: bool = False, dim: int = 64,
    planes: int = 3, need: Sequence[bool] = (True,) * 9, stem_only: bool = False,
) -> Callable[[], None]:  # fmt: skip
    """Forward and backward of `sblu` and of the stem, on memory that is never read: nothing runs.

    Args:
        need: which gradients of the stem.
        stem_only: without `sblu`.
    """
    grid = PatchGrid(patch, patch, patch[1])
    n_f, n_t = grid.tokens(mel_bins, frames)

    def empty(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=of)

    x = empty(batch, channels, frames, mel_bins).transpose(2, 3) if time_major else empty(
        batch, channels, mel_bins, frames)  # fmt: skip
    state = empty(batch, n_f, n_t, states, of=torch.float32)
    weight = empty(states, channels, patch[0])
    weights = Weights(
        empty(dim, channels, *patch), empty(dim), empty(64, channels, *patch), empty(64), empty(2 * states, 64),
        empty(2 * states), weight, empty(dim, planes, states),
    )  # fmt: skip
    quadrature = kernel == "quadrature"
    options = (grid, quadrature, [1 / patch[1], 2.0], [0.2, 3.1], time_major)

    def call() -> None:
        if not stem_only:
            y = launch.sblu(x, state, state, weight, grid, quadrature)
            launch.sblu_backward(y, x, state, state, weight, grid, quadrature, [True] * 4)
        tokens, r, hidden = launch.embed(x, weights, *options)
        launch.embed_backward(tokens, x, weights, r, hidden, *options, list(need))

    return call


def features(dtype: torch.dtype, states: int, planes: int, only: str = "") -> Callable[[], None]:
    """The stem with other features and states; only the gradient of one input if named."""
    names = ("x", "proj_w", "proj_b", "w1", "b1", "w2", "b2", "sblu_w", "fusion_w")
    need = [not only or name == only for name in names]
    return calls(dtype, states=states, planes=planes, need=need, stem_only=True)


def every_launch(target: str, all_sizes: bool) -> Iterator[Launch]:
    """The default sizes in float32 and bfloat16, for each size class of the table; or other sizes, too.

    Of other features and numbers of states, the kernels that standardise over them.
    """
    usual = [calls(dtype, planes=planes) for dtype in (torch.float32, torch.bfloat16) for planes in (3, 2)]
    standardising = [
        features(torch.bfloat16, 16, 3),
        features(torch.bfloat16, 32, 1),
        features(torch.float32, 64, 3),
        features(torch.float32, 70, 3),
    ]
    more_standardising = [
        features(torch.float32, 16, 3),
        features(torch.float32, 32, 3, only="sblu_w"),
        features(torch.float32, 32, 3, only="fusion_w"),
        features(torch.bfloat16, 64, 3),
        features(torch.bfloat16, 64, 1),
        features(torch.bfloat16, 70, 1),
        features(torch.float32, 300, 3),
    ]
    more = [
        calls(torch.float16),
        calls(torch.float32, kernel="bilateral"),
        calls(torch.float32, time_major=True),
        calls(torch.float32, patch=(5, 3), mel_bins=20, frames=60, states=6),
        calls(torch.float32, patch=(80, 4), mel_bins=80),
    ]
    seen = set()
    for size in ("small", "large"):
        # no batch of that size is needed: the table's limit moves instead
        with mock.patch.object(configurations, "SMALL", 0 if size == "large" else 2**31):
            for call in usual + (more if all_sizes else []):
                for one in record(call, target):
                    if one.key not in seen:
                        seen.add(one.key)
                        yield one
            for call in standardising + (more_standardising if all_sizes else []):
                for one in record(call, target):
                    if one.key not in seen and one.kernel.__name__ in STANDARDISING:
                        seen.add(one.key)
                        yield one


def every_candidate(target: str) -> Iterator[Launch]:
    """The default sizes with all that `AAPE_AUTOTUNE=1` tries, float32's products exact and as three of TF32."""
    seen = set()
    for precision, dtype in (("ieee", torch.float32), ("tf32x3", torch.float32), ("ieee", torch.bfloat16)):
        for chosen in configurations.candidates(configurations.PIPELINED[0]):

            def choose(kernel: str, *given: object, chosen: configurations.Configuration = chosen, **named: object):
                return chosen if chosen in configurations.candidates(kernel) else replace(chosen, num_stages=1)

            with (
                mock.patch.object(launch, "configuration", choose),
                mock.patch.object(launch, "_precision", return_value=precision),
            ):
                for one in record(calls(dtype, states=16), target):
                    if one.key not in seen:
                        seen.add(one.key)
                        yield one


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--all-sizes", action="store_true", help="other dtypes, kernels, layouts and geometries, too")
    parser.add_argument("--candidates", action="store_true", help="all that a search tries, instead of the usual")
    given = parser.parse_args()
    if knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: kernels are interpreted, not compiled")
    chosen = every_candidate(given.target) if given.candidates else every_launch(given.target, given.all_sizes)
    for one in chosen:
        figures = asdict(compile_for(one, given.target))
        print(json.dumps({"launch": str(one), "shared_limit": SHARED_LIMIT[given.target], **figures}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
