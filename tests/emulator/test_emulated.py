"""The CUDA kernels run on the CPU: against the formula written a second time, in every order of a block's threads."""

import shutil

import numpy as np
import oracle
import pytest
import torch
from cases import AWKWARD, SQUARE, Case, cases
from emulated import ORDERS, ROOT, build, compiler, sblu
from hypothesis import given, settings
from oracle import bound, relative_error

from aape_kernels.geometry import PatchGrid

pytestmark = pytest.mark.skipif(compiler() is None, reason="no host compiler was found")

GOLDEN = sorted((ROOT / "tests" / "data").glob("case-*.npz"))


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    return build(tmp_path_factory.mktemp("emulated") / "emulated.so")


def check(library, case: Case, dtype: torch.dtype, order: str = "forward", seed: int = 0) -> None:
    (x, decay, frequency, weight), _ = case.inputs(dtype)
    grid = PatchGrid(case.patch, case.stride, case.window)
    y = sblu(library, x, decay, frequency, weight, grid, case.kernel == "quadrature", order, seed)
    wide = [value.double() for value in (x, decay, frequency, weight)]
    want = oracle.sblu(*wide, case.patch, case.stride, case.window, case.kernel)
    assert y.dtype == dtype
    assert relative_error(y, want) <= bound(dtype)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden(library, path, order):
    data = np.load(path)
    inputs = [torch.tensor(data[name]) for name in ("x", "decay", "frequency", "weight")]
    grid = PatchGrid(tuple(data["patch_size"].tolist()), tuple(data["stride"].tolist()), int(data["window"]))
    y = sblu(library, *inputs, grid, str(data["kernel"]) == "quadrature", order, seed=1)
    assert relative_error(y, torch.tensor(data["y"])) <= bound(torch.float64)


def test_any_geometry(library):
    seen = []

    @settings(max_examples=100)
    @given(case=cases())
    def every(case):
        seen.append(case)
        check(library, case, torch.float64, ORDERS[len(seen) % 3], seed=len(seen))

    every()
    assert len(seen) >= 100


@pytest.mark.parametrize("kernel", ["bilateral", "quadrature"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("patch", "states"), [((16, 16), 32), ((5, 15), 33), ((80, 4), 70), ((3, 200), 5)], ids=str)
def test_dtype_and_blocks(library, dtype, patch, states, kernel):
    """One block of states and three, half of one, more rows than fit at once, windows longer than a tile."""
    check(library, Case(1, 1, states, patch, patch, patch[1], (1, 9), (0, 1), kernel), dtype)


@pytest.mark.parametrize("case", [SQUARE, AWKWARD], ids=["square", "awkward"])
def test_strided_input(library, case):
    (x, decay, frequency, weight), _ = case.inputs(torch.float64)
    grid = PatchGrid(case.patch, case.stride, case.window)
    big = torch.full((*(2 * n for n in reversed(x.shape)),), torch.nan, dtype=x.dtype)
    view = big[tuple(slice(None, None, 2) for _ in x.shape)].permute(3, 2, 1, 0)
    view.copy_(x)
    want = sblu(library, x, decay, frequency, weight, grid, True)
    assert torch.equal(sblu(library, view, decay, frequency, weight, grid, True), want)


# A copy of the sources with one thing wrong must be caught: else the emulator would be blind.
BROKEN = {
    "no barrier before reading u": ("sblu.cuh", "  __syncthreads();\n}\n\n// A state's", "}\n\n// A state's"),
    "no barrier after loading rows": ("sblu.cuh", "load_rows(p, t, r, xs, ws);\n    __syncthreads();", "load_rows(p, t, r, xs, ws);"),
    "no barrier before rows are overwritten": ("sblu.cuh", "if (r) __syncthreads();", ""),
    "an index off by one": ("sblu_forward.cu", "left + (window - 1) * kLanes", "left + window * kLanes"),
}  # fmt: skip


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
    case = Case(1, 2, 8, (20, 16), (20, 16), 16, (1, 9), (0, 0), "quadrature")
    caught = []
    for order in ORDERS:
        try:
            check(broken, case, torch.float32, order, seed=3)
        except AssertionError:
            caught.append(order)
    assert caught
