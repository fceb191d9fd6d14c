"""Every CUDA kernel on a GPU under compute-sanitizer's tools, all at once, over the golden cases and a few stems.

    python tests/sanitized_on_gpu.py                 each tool, a summary line for each
    python tests/sanitized_on_gpu.py memcheck        that one alone
    python tests/sanitized_on_gpu.py --run           the kernels alone: what the tools run

`make gpu-sanitize` runs it. Status 1 if a tool found something in a kernel of this package, or ended in a way that it
should not; where compute-sanitizer is missing or cannot work on this machine, a line says so.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from unittest import mock

import torch
from cases import GOLDEN, GOLDEN_STEMS, golden, golden_stem
from torch import Tensor

from aape_kernels import AaPE, embed, sblu

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# What it says where the machine's runtime does not let it in.
REFUSED = ("Device not supported", "not supported on this", "Failed to initialize")
# How the kernels' names are said: those of libraries, which run among them, are another matter.
OURS = "aape::"
SECONDS = 110
DONE = "golden cases and stems have run"


def plain_matmul(left: Tensor, right: Tensor) -> Tensor:
    """A product of 16 bits by float32's and a conversion: on Hopper cuBLAS stores its own in bulk, which initcheck does
    not see, so that whoever reads it seems to read what was never written."""
    product = torch.matmul(left.float(), right.float())
    return product.to(left.dtype)


def run(device: torch.device, backend: str = "cuda") -> None:
    """SBLU and the stem with their gradients."""
    for path in GOLDEN:
        inputs, cotangent, options, want = golden(path, torch.float32)
        leaves = [value.to(device).requires_grad_() for value in inputs]
        y = sblu(*leaves, **options, backend=backend)
        torch.autograd.grad(y, leaves, cotangent.to(device))
        assert torch.allclose(y.cpu().double(), want[0], rtol=1e-3, atol=1e-4), path
    for path in GOLDEN_STEMS:
        inputs, cotangent, options, want = golden_stem(path, torch.float32)
        leaves = {name: value.to(device).requires_grad_() for name, value in inputs.items()}
        tokens = embed(**{"proj_b": None} | leaves, **options, backend=backend)
        torch.autograd.grad(tokens, list(leaves.values()), cotangent.to(device))
        assert torch.allclose(tokens.cpu().double(), want["tokens"], rtol=1e-3, atol=1e-3), path
    # the default patch, where kernels take their shortest way, and more states than a block has
    float32, bfloat16 = torch.float32, torch.bfloat16
    for states, rows, dtype in (
        (32, 16, float32), (16, 16, float32), (32, 16, bfloat16), (16, 16, bfloat16), (70, 16, float32),
        (32, 32, float32), (16, 32, float32),
    ):  # fmt: skip
        sizes = {"patch_size": (rows, 16), "num_states": states}
        stem = AaPE(embed_dim=32, backend=backend, device=device, dtype=dtype, **sizes)
        x = torch.randn(2, 1, 32, 160, device=device).to(dtype).requires_grad_()
        with torch.autocast(device.type, dtype=bfloat16, enabled=states == 16 and rows == 16):
            tokens = stem(x)
        gradients = torch.autograd.grad(tokens, [x, *stem.parameters()], torch.randn_like(tokens))
        decay, frequency = stem.analyse(x)
        leaves = [value.detach().requires_grad_() for value in (x, decay, frequency, stem.sblu.weight)]
        y = sblu(*leaves, patch_size=(rows, 16), backend=backend)
        gradients += torch.autograd.grad(y, leaves, torch.randn_like(y))
        assert all(value.isfinite().all() for value in (tokens, y, *gradients)), (sizes, dtype)
    print(DONE)


@dataclass
class Check:
    """One tool at work."""

    tool: str
    sanitizer: str
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        command = [self.sanitizer, "--tool", self.tool, "--error-exitcode", "9", sys.executable, __file__, "--run"]
        # an allocation of its own for every tensor, so that what lies beyond one is seen
        environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, errors="replace",
            start_new_session=True,
        )  # fmt: skip

    def stop(self) -> None:
        """End it with what it runs."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)

    def clean(self, seconds: float) -> bool:
        """Whether the tool has nothing to say of this package's kernels; its line is printed."""
        try:
            said, _ = self.process.communicate(timeout=max(0.0, seconds))
        except subprocess.TimeoutExpired:
            self.stop()
            said, _ = self.process.communicate()
            print(f"{self.tool}: FAILED: not done in {time.monotonic() - self.started:.0f} s")
            print(said[-2000:])
            return False
        good, line = verdict(said, self.process.returncode)
        print(f"{self.tool}: {line}")
        if not good:
            print(said[:4000])
        return good


def verdict(said: str, status: int) -> tuple[bool, str]:
    """Whether a tool's output and status are as they should be, and why in one line."""
    last = said.strip().splitlines()[-1] if said.strip() else "no output"
    if any(words in said for words in REFUSED):
        return True, f"compute-sanitizer cannot work on this machine: {last}"
    if DONE not in said:
        return False, f"FAILED: the program did not end well (status {status}): {last}"
    ours = re.findall(rf"[^\n]*{OURS}[^\n]*", said)
    if ours:
        return False, f"FAILED: {len(ours)} lines about this package's kernels; the first: {ours[0].strip()}"
    return True, "clean" if status == 0 else f"clean but for kernels of other libraries: {last}"


def main(arguments: list[str]) -> int:
    """Status of the whole."""
    if arguments == ["--run"]:
        with mock.patch.object(torch.Tensor, "__matmul__", plain_matmul):
            run(torch.device("cuda"))
        torch.cuda.synchronize()
        return 0
    unknown = [name for name in arguments if name not in TOOLS]
    if unknown:
        print(f"expected some of {', '.join(TOOLS)}, got {unknown[0]!r}", file=sys.stderr)
        return 2
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None:
        print("compute-sanitizer was not found: the kernels have not run under it")
        return 0
    checks = [Check(tool, sanitizer) for tool in arguments or TOOLS]
    until = time.monotonic() + SECONDS
    try:
        clean = [check.clean(until - time.monotonic()) for check in checks]  # every one, whatever the others say
    finally:
        for check in checks:
            check.stop()
    return 0 if all(clean) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
