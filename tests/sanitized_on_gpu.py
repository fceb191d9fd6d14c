"""Every CUDA kernel on a GPU under compute-sanitizer: memcheck, racecheck and initcheck over the golden cases.

    python tests/sanitized_on_gpu.py                 each tool in turn, a summary line for each
    python tests/sanitized_on_gpu.py --run           the kernels alone: what the tools run

`make gpu` runs it. Status 1 if a tool found something, or ended in a way that it should not; where compute-sanitizer is
missing or cannot work on this machine, a line says so.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import torch
from cases import GOLDEN, golden

from aape_kernels import ops
from aape_kernels.backends.cuda import CudaKernels
from aape_kernels.geometry import PatchGrid

TOOLS = ("memcheck", "racecheck", "initcheck")
# What it says where the machine's runtime does not let it in.
REFUSED = ("Device not supported", "not supported on this", "Failed to initialize")
SECONDS = 25


def run(device: torch.device) -> None:
    """No library's kernels but copies and fills among them: SBLU, then what the stem has besides."""
    for path in GOLDEN:
        inputs, cotangent, options, want = golden(path, torch.float32)
        *inputs, cotangent = (value.to(device) for value in (*inputs, cotangent))
        sizes = (options["patch_size"], options["stride"], options["window"], options["kernel"] == "quadrature")
        y = ops.sblu(*inputs, *sizes, "cuda")
        ops.sblu_backward(cotangent, *inputs, *sizes, [True] * 4, "cuda")
        assert torch.allclose(y.cpu().double(), want[0], rtol=1e-3, atol=1e-4), path

        x, _, _, weight = inputs
        states, grid = weight.shape[0], PatchGrid(*sizes[:3])
        call = CudaKernels(x, states, grid, sizes[3], time_major=False)
        units = 40
        encoder = [
            torch.rand(*shape, device=device) * 0.1
            for shape in ((units, call.patch), (units,), (2 * states, units), (2 * states,))
        ]
        operand = x.new_empty(call.rows, call.patch + 2 * states)
        hidden, r = x.new_empty(call.rows, units), x.new_empty(call.rows, 2 * states)
        ranges = (0.1, 3.0, 0.2, 2.9)
        call.prologue(*encoder, weight.flatten(1).contiguous(), operand, hidden, r, ranges)
        patches = x.new_empty(call.rows, call.patch)
        call.gather(patches)
        grad_x = torch.empty_like(x)
        call.overlap_add(patches, grad_x)
        assert torch.equal(operand[:, : call.patch], patches)
        assert all(value.isfinite().all() for value in (operand, hidden, r, grad_x))
    print(f"{len(GOLDEN)} golden cases")


def check(tool: str, sanitizer: str) -> bool:
    """Whether `tool` has nothing to say."""
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, __file__, "--run"]
    # an allocation of its own for every tensor, so that what lies beyond one is seen
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=environment)
    except subprocess.TimeoutExpired:
        print(f"{tool}: not done in {SECONDS} s")
        return False
    said = done.stdout + done.stderr
    if any(words in said for words in REFUSED):
        print(f"{tool}: compute-sanitizer cannot work on this machine: {said.strip().splitlines()[-1]}")
        return True
    clean = done.returncode == 0 and "golden cases" in said
    print(f"{tool}: {'clean' if clean else 'FAILED'}; {said.strip().splitlines()[-1] if said.strip() else 'no output'}")
    if not clean:
        print(said[-6000:])
    return clean


def main() -> int:
    """Status of the whole."""
    if "--run" in sys.argv:
        run(torch.device("cuda"))
        torch.cuda.synchronize()
        return 0
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        print("compute-sanitizer was not found: the kernels have not run under it")
        return 0
    clean = [check(tool, sanitizer) for tool in TOOLS]  # every one, whatever the others say
    return 0 if all(clean) else 1


if __name__ == "__main__":
    sys.exit(main())
