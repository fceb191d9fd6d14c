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
from dataclasses import asdict, dataclass
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
        return " ".join(
            [self.kernel.__name__, *sizes, *flags, f"warps{self.options['num_warps']}",
             f"stages{self.options['num_stages']}", types]
        )  # fmt: skip


@dataclass(frozen=True)
class Resources:
    """Registers a thread, and bytes of shared memory, of stack, and of registers spilled to memory; and for NVIDIA how
    many loads from global memory there are of so many bytes a thread."""

    registers: int
    shared: int
    stack: int
    spills: int
    loads: dict[int, int]


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
        return Resources(number("vgpr_count"), shared, number("private_segment_fixed_size"), spills, {})
    said = _assemble(compiled.asm["ptx"], target)
    stack, stores, loads = map(
        int, re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said).groups()
    )
    found = re.findall(r"\bld\.global(?:\.\w+)*?(?:\.v(\d))?\.[bfsu](\d+)\b", compiled.asm["ptx"])
    widths = Counter(int(count or 1) * int(bits) // 8 for count, bits in found)
    return Resources(int(re.search(r"Used (\d+) registers", said)[1]), shared, stack, stores + loads, dict(widths))


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--all-sizes", action="store_true", help="other dtypes, kernels, layouts and geometries, too")
    given = parser.parse_args()
    if knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: kernels are interpreted, not compiled")
    for one in every_launch(given.target, given.all_sizes):
        print(json.dumps({"launch": str(one), **asdict(compile_for(one, given.target))}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
