"""The CUDA kernels run on the CPU: against the formula written a second time, in every order of a block's threads."""

import math
import shutil

import numpy as np
import oracle
import pytest
import torch
from cases import AWKWARD, SQUARE, Case, cases
from emulated import ORDERS, ROOT, Emulated, build, compiler
from hypothesis import given, settings
from oracle import bound, relative_error

from aape_kernels.geometry import PatchGrid

pytestmark = pytest.mark.skipif(compiler() is None, reason="no host compiler was found")

GOLDEN = sorted((ROOT / "tests" / "data").glob("case-*.npz"))


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    return build(tmp_path_factory.mktemp("emulated") / "emulated.so")


NAMES = ("x", "decay", "frequency", "weight")


def check(kernels: Emulated, case: Case, dtype: torch.dtype) -> None:
    """Responses and every gradient."""
    inputs, cotangent = case.inputs(dtype)
    options = (PatchGrid(case.patch, case.stride, case.window), case.kernel == "quadrature")
    wide = [value.double().requires_grad_() for value in inputs]
    want = oracle.sblu(*wide, case.patch, case.stride, case.window, case.kernel)
    wanted = torch.autograd.grad(want, wide, cotangent.double())
    y = kernels.sblu(*inputs, *options)
    assert y.dtype == dtype
    assert relative_error(y, want) <= bound(dtype)
    *gradients, again = kernels.sblu_backward(cotangent, *inputs, *options)
    assert torch.equal(again, y)
    for name, got, expected in zip(NAMES, gradients, wanted, strict=True):
        assert relative_error(got, expected) <= bound(dtype, gradient=True), name


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden(library, path, order):
    data = np.load(path)
    inputs = [torch.tensor(data[name]) for name in NAMES]
    grid = PatchGrid(tuple(data["patch_size"].tolist()), tuple(data["stride"].tolist()), int(data["window"]))
    kernels, quadrature = Emulated(library, order, seed=1), str(data["kernel"]) == "quadrature"
    y = kernels.sblu(*inputs, grid, quadrature)
    assert relative_error(y, torch.tensor(data["y"])) <= bound(torch.float64)
    gradients = kernels.sblu_backward(torch.tensor(data["cotangent"]), *inputs, grid, quadrature)
    for name, got in zip(NAMES, gradients, strict=False):
        assert relative_error(got, torch.tensor(data[f"grad_{name}"])) <= bound(torch.float64, gradient=True), name


def test_any_geometry(library):
    seen = []

    @settings(max_examples=100)
    @given(case=cases())
    def every(case):
        seen.append(case)
        check(Emulated(library, ORDERS[len(seen) % 3], seed=len(seen)), case, torch.float64)

    every()
    assert len(seen) >= 100


@pytest.mark.parametrize("kernel", ["bilateral", "quadrature"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("patch", "states"), [((16, 16), 32), ((5, 15), 33), ((80, 4), 70), ((3, 200), 5)], ids=str)
def test_dtype_and_blocks(library, dtype, patch, states, kernel):
    """One block of states and three, half of one, more rows than fit at once, windows longer than a tile."""
    check(Emulated(library), Case(1, 1, states, patch, patch, patch[1], (1, 9), (0, 1), kernel), dtype)


@pytest.mark.parametrize("case", [SQUARE, AWKWARD], ids=["square", "awkward"])
def test_strided_input(library, case):
    (x, *states), cotangent = case.inputs(torch.float64)
    options = (PatchGrid(case.patch, case.stride, case.window), True)
    kernels = Emulated(library)

    def spread(value):  # every second element of a bigger tensor, axes back to front
        big = torch.full([2 * n for n in reversed(value.shape)], torch.nan, dtype=value.dtype)
        view = big[tuple(slice(None, None, 2) for _ in value.shape)].permute(*reversed(range(value.dim())))
        return view.copy_(value)

    assert torch.equal(kernels.sblu(spread(x), *states, *options), kernels.sblu(x, *states, *options))
    got = kernels.sblu_backward(spread(cotangent), spread(x), *states, *options)
    want = kernels.sblu_backward(cotangent, x, *states, *options)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    expanded = torch.ones((), dtype=torch.float64).expand_as(cotangent)
    got = kernels.sblu_backward(expanded, x, *states, *options)
    want = kernels.sblu_backward(expanded.clone(), x, *states, *options)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("kernel", ["bilateral", "quadrature"])
def test_logits(library, kernel):
    """decay and frequency as the Lambda Encoder's logits, and the gradients of those."""
    case = Case(1, 1, 33, (4, 8), (4, 8), 8, (2, 3), (0, 0), kernel)
    (x, decay, frequency, weight), cotangent = case.inputs()
    options = (PatchGrid(case.patch, case.stride, case.window), kernel == "quadrature")
    low, high, band = 0.1, 2.0, (0.3, 3.0)
    leaves = [value.requires_grad_() for value in (x, torch.randn_like(decay), torch.randn_like(frequency), weight)]
    alpha = low * (high / low) ** torch.sigmoid(leaves[1])
    omega = band[0] + (band[1] - band[0]) * torch.sigmoid(leaves[2])
    want = oracle.sblu(x, alpha, omega, weight, case.patch, case.stride, case.window, kernel)
    wanted = torch.autograd.grad(want, leaves, cotangent)
    plain = [value.detach() for value in leaves]
    ranges = (low, math.log(high / low), band[0], band[1] - band[0])
    kernels = Emulated(library)
    assert relative_error(kernels.sblu(*plain, *options, ranges), want) <= bound(torch.float64)
    for name, got, expected in zip(
        NAMES, kernels.sblu_backward(cotangent, *plain, *options, ranges), wanted, strict=False
    ):
        assert relative_error(got, expected) <= bound(torch.float64, gradient=True), name


@pytest.mark.parametrize("programs", [1, 2, 50])
def test_partial_sums_of_any_number_of_programs(library, programs):
    inputs, cotangent = AWKWARD.inputs()
    options = (PatchGrid(AWKWARD.patch, AWKWARD.stride, AWKWARD.window), True)
    want = Emulated(library).sblu_backward(cotangent, *inputs, *options)[3]
    got = Emulated(library).sblu_backward(cotangent, *inputs, *options, programs=programs)[3]
    assert relative_error(got, want) <= 1e-13


# A copy of the sources with one thing wrong must be caught: else the emulator would be blind.
LOAD = "load_rows(p, t, r, xs, ws);"
BROKEN = {
    "no barrier before reading u": ("sblu.cuh", "  __syncthreads();\n}\n\n// A state's", "}\n\n// A state's"),
    "no barrier after loading rows": ("sblu.cuh", f"{LOAD}\n    __syncthreads();", LOAD),
    "no barrier before rows are overwritten": ("sblu.cuh", "if (r) __syncthreads();", ""),
    "no barrier after the turns of overlapping tokens": (
        "sblu_backward.cu",
        "        q = q * g.z;\n      }\n    }\n    __syncthreads();",
        "        q = q * g.z;\n      }\n    }",
    ),
    "no barrier before gu is written again": (
        "sblu_backward.cu",
        "    __syncthreads();  // before gu and xs are written again\n",
        "",
    ),
    "an index off by one": ("sblu_forward.cu", "left + (window - 1) * kLanes", "left + window * kLanes"),
}


@pytest.mark.parametrize("fault", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_kernel_is_caught(fault, tmp_path):
    name, right, wrong = fault
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    shutil.copytree(ROOT / "tests" / "emulator", tmp_path / "tests" / "emulator")
    source = tmp_path / "csrc" / "cuda" / name
    text = source.read_text()
    assert text.count(right) == 1
    source.write_text(text.replace(right, wrong))
    broken = build(tmp_path / "broken.so", root=tmp_path)
    case = Case(1, 2, 8, (20, 16), (20, 8), 16, (2, 30), (0, 0), "quadrature")
    caught = []
    for order in ORDERS:
        try:
            check(Emulated(broken, order, seed=3), case, torch.float32)
        except AssertionError:
            caught.append(order)
    assert caught
