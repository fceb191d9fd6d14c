"""The Triton kernels compiled for targets that are not here: they fit, and sizes that vary compile nothing anew."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
REPORTS = HERE.parents[1] / "build"
TRITON = ".".join(triton.__version__.split(".")[:2])
STACK_LIMIT = 64
# (major and minor version of Triton, target) -> bytes that a launch may spill, of those that may at all. 3.6 orders the
# instructions of these otherwise than 3.7 does, and every ptxas from 12.8 to 13.1 then lacks one register, or two.
KNOWN_SPILLS = {
    ("3.6", "sm_90"): {
        f"sblu_bwd_state_kernel S32 R16 K16 BN16 quadrature warps4 stages1 {'-'.join(['fp32'] * 8)}": 8,
        f"stem_fwd_kernel S16 R16 K16 H64 BN16 planes3 quadrature warps2 stages1 {'-'.join(['fp32'] * 9)}": 16,
    },
}
KERNELS = {
    "sblu_fwd_kernel",
    "sblu_bwd_state_kernel",
    "sblu_bwd_weight_kernel",
    "sblu_bwd_window_kernel",
    "overlap_add_kernel",
    "stem_fwd_kernel",
    "gather_kernel",
    "standardise_kernel",
}
MINUTES = 12


def run(*arguments: str) -> str:
    """A process of its own: kernels that this one may have loaded for the interpreter do not compile."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=HERE,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60 * MINUTES,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def compiled(name: str, *arguments: str) -> list[dict[str, Any]]:
    """What every launch takes, which goes to build/triton-`name`.txt, too."""
    launches = [json.loads(line) for line in run("ahead_of_time.py", *arguments).splitlines()]
    lines = ["registers  shared  stack  spills  warps  replication  loads by bytes            launch"]
    for one in launches:
        figures = f"{one['registers']:9}  {one['shared']:6}  {one['stack']:5}  {one['spills']:6}"
        if one["loads"] is not None:
            widths = sorted(map(int, one["loads"]), reverse=True)
            loads = ", ".join(f"{one['loads'][str(width)]} × {width}" for width in widths)
            figures += f"  {one['warps']:5}  {one['replication']:11}  {loads:24}"
        lines.append(f"{figures}  {one['launch']}")
    REPORTS.mkdir(exist_ok=True)
    (REPORTS / f"triton-{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert {one["launch"].split()[0] for one in launches} >= KERNELS - {"standardise_kernel"}
    return launches


@pytest.mark.parametrize(
    ("target", "sizes"),
    [
        ("sm_90", "the usual"),
        ("gfx942", "the usual"),
        *(pytest.param(name, "the usual", marks=pytest.mark.exhaustive) for name in ("sm_80", "sm_100", "sm_120")),
        pytest.param("sm_90", "all", marks=pytest.mark.exhaustive),
    ],
)
def test_every_launch_fits(target, sizes):
    """And no warp computes what another one does."""
    launches = compiled(f"resources-{target}", target, *(["--all-sizes"] if sizes == "all" else []))
    assert {one["launch"].split()[0] for one in launches} == KERNELS
    known = KNOWN_SPILLS.get((TRITON, target), {})
    if sizes == "all":
        assert known.keys() <= {one["launch"] for one in launches}
    for one in launches:
        assert one["spills"] <= known.get(one["launch"], 0), one
        assert one["stack"] <= STACK_LIMIT, one
        assert one["shared"] <= one["shared_limit"], one
        assert 0 < one["registers"] <= 512, one
        assert one["replication"] in (None, 1), one


@pytest.mark.exhaustive
def test_every_candidate_of_a_search_fits():
    """They may spill, which the search finds out: build/triton-candidates-sm_90.txt says which do."""
    launches = compiled("candidates-sm_90", "sm_90", "--candidates")
    assert len(launches) >= 100
    for one in launches:
        assert one["shared"] <= one["shared_limit"], one
        assert one["warps"] >= 4, one


SAME_LAUNCHES = """
import torch
from ahead_of_time import calls, record

def keys(**sizes):
    return {one.key for one in record(calls(torch.float32, **sizes), "sm_90")}

usual = keys(batch=2, frames=1024)
for sizes in ({"batch": 3}, {"batch": 1, "frames": 996}, {"batch": 5, "frames": 16}, {"mel_bins": 80, "frames": 208}):
    assert keys(**{"batch": 2, "frames": 1024} | sizes) == usual, sizes
# rows of x that do not begin at multiples of 16 bytes: patches cannot be loaded by as many
other = keys(batch=1, frames=998)
assert {key.split()[0] for key in other - usual} == {"stem_fwd_kernel", "gather_kernel"}
assert keys(batch=2, frames=1021) == other
assert keys(states=8) != usual
print(len(usual))
"""

WARPS = """
import torch
from ahead_of_time import calls, record

def warps(states):
    launches = record(calls(torch.bfloat16, states=states, stem_only=True), "sm_90")
    return {one.kernel.__name__: one.options["num_warps"] for one in launches}

few, many = warps(16), warps(32)
print(*(name for name in many if few[name] < many[name]))
"""


LOADS = """
import torch
from ahead_of_time import calls, compile_for, record

for dtype in (torch.float32, torch.bfloat16):
    for frames in (1024, 998):
        for one in record(calls(dtype, frames=frames, stem_only=True), "sm_90"):
            if one.kernel.__name__ == "gather_kernel":
                print(frames, *compile_for(one, "sm_90").loads)
"""


def test_patches_are_loaded_by_16_bytes():
    """Where rows of x begin at multiples of these; element by element elsewhere."""
    found = {tuple(map(int, line.split())) for line in run("-c", LOADS).splitlines()}
    assert found == {(1024, 16), (998, 4), (998, 2)}


def test_batch_and_clip_length_compile_nothing_anew():
    assert int(run("-c", SAME_LAUNCHES)) >= len(KERNELS)


def test_few_states_take_fewer_warps():
    """Each tile of the tensor cores is one warp's, not two's that compute the same."""
    fewer = set(run("-c", WARPS).split())
    assert fewer == {name for name in KERNELS if name.startswith(("sblu", "stem"))}
