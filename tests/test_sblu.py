"""`sblu` by every backend that runs here: golden cases, a second writing of the formula, finite differences."""

import functools

import oracle
import pytest
import torch
from cases import AWKWARD, GOLDEN, SQUARE, Case, cases, golden
from checks import check_strides, compare
from hypothesis import given, settings
from oracle import relative_error

from aape_kernels import sblu

pytestmark = pytest.mark.usefixtures("backend")


def run(options, inputs, cotangent):
    """y and the gradients of the four inputs."""
    leaves = [value.detach().requires_grad_() for value in inputs]
    y = sblu(*leaves, **options)
    return [y, *torch.autograd.grad(y, leaves, cotangent)]


def run_oracle(case: Case, inputs, cotangent):
    leaves = [value.detach().double().requires_grad_() for value in inputs]
    y = oracle.sblu(*leaves, case.patch, case.stride, case.window, case.kernel)
    return [y, *torch.autograd.grad(y, leaves, cotangent.double())]


def check(case: Case, dtype: torch.dtype) -> None:
    inputs, cotangent = case.inputs(dtype)
    compare(run(case.options, inputs, cotangent), run_oracle(case, inputs, cotangent), inputs, dtype)


def check_golden(path, dtype: torch.dtype) -> None:
    inputs, cotangent, options, want = golden(path, dtype)
    compare(run(options, inputs, cotangent), want, inputs, dtype)


def check_range(case: Case, low: float, high: float) -> None:
    """In float32, for decays from `low` to `high` and frequencies up to `high` of the band."""
    (x, decay, frequency, weight), cotangent = case.inputs(torch.float32)
    inputs = [x, low + (high - low) * (decay - 0.1) / 2, frequency * min(high, 1.0), weight]
    wide = [value.double() for value in inputs]
    want = run(case.options | {"backend": "reference"}, wide, cotangent.double())
    compare(run(case.options, inputs, cotangent), want, inputs, torch.float32)


def test_golden_cases_are_there():
    assert len(GOLDEN) == 15


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden(path, dtype):
    check_golden(path, dtype)


def test_any_geometry():
    seen = []

    @settings(max_examples=250)
    @given(case=cases())
    def every(case):
        seen.append(case.hard)
        check(case, torch.float64)

    every()
    assert len(seen) >= 200
    assert sum(seen) >= len(seen) / 2


@pytest.mark.parametrize("kernel", ["bilateral", "quadrature"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("patch", [(16, 16), (16, 15), (80, 4)], ids=str)
def test_dtype(dtype, patch, kernel):
    check(Case(2, 1, 8, patch, patch, patch[1], (2, 6), (0, 0), kernel), dtype)


@pytest.mark.parametrize("kernel", ["bilateral", "quadrature"])
@pytest.mark.parametrize("window", [8, 7])
@pytest.mark.parametrize(("low", "high"), [(5.0, 10.0), (0.0, 0.3), (0.0, 1e-3)], ids=["fast", "slow", "still"])
def test_float32_holds_at_the_ends_of_the_range(window, kernel, low, high):
    check_range(Case(2, 1, 16, (4, window), (4, window), window, (2, 6), (0, 0), kernel), low, high)


@pytest.mark.parametrize("window", [64, 65])
def test_float32_holds_for_long_windows(window):
    check(Case(1, 1, 16, (8, window), (8, window), window, (1, 4), (0, 0), "quadrature"), torch.float32)


@pytest.mark.parametrize("case", [SQUARE, AWKWARD], ids=["square", "awkward"])
@pytest.mark.parametrize("kernel", ["bilateral", "quadrature"])
@pytest.mark.parametrize("scale", [1.0, 0.05, 1e-4], ids=lambda scale: f"lambda-times-{scale:g}")
def test_first_and_second_derivatives(backend, case, kernel, scale):
    small = Case(1, case.channels, 2, case.patch, case.stride, case.window, (1, 2), case.rest, kernel)
    (x, decay, frequency, weight), _ = small.inputs()
    leaves = [value.requires_grad_() for value in (x, decay * scale, frequency * scale, weight)]

    def f(*values):
        return sblu(*values, **small.options)

    assert torch.autograd.gradcheck(f, leaves)
    # every backend's second derivatives are the reference's: elsewhere one random direction tells whether they arrive
    assert torch.autograd.gradgradcheck(f, leaves, fast_mode=backend != "reference")


@pytest.mark.parametrize("window", [8, 5])
def test_zero_decay_and_frequency_is_a_plain_sum(window):
    case = Case(1, 1, 2, (3, window), (3, window), window, (1, 3), (0, 0), "bilateral")
    (x, decay, frequency, weight), _ = case.inputs()
    y = sblu(x, decay * 0, frequency * 0, weight, **case.options)
    total = torch.einsum("bcpt,scp->bts", x, weight).unflatten(1, (3, window)).sum(2)
    assert relative_error(y[:, 0, :, 0], total) <= 1e-14
    assert not y[:, :, :, 1].any()


# 2 sinh(Λ/2)/Λ itself leaves float32 at α = 176: no bound is asked of odd windows there
@pytest.mark.parametrize(("window", "decay"), [(8, 50.0), (8, 2000.0), (7, 50.0)])
def test_decay_far_beyond_the_range_stays_finite(window, decay):
    case = Case(1, 1, 2, (3, window), (3, window), window, (1, 3), (0, 0), "quadrature")
    (x, alpha, frequency, weight), cotangent = case.inputs(torch.float32)
    values = run(case.options, [x, alpha * 0 + decay, frequency, weight], cotangent)
    assert all(value.isfinite().all() for value in values)


@pytest.mark.parametrize("case", [SQUARE, AWKWARD], ids=["square", "awkward"])
def test_strided_and_expanded(case):
    check_strides(functools.partial(run, case.options), *case.inputs(), output=1e-14, gradient=1e-13)


def test_inputs_are_not_written_to():
    inputs, cotangent = AWKWARD.inputs()
    before = [value.clone() for value in (*inputs, cotangent)]
    versions = [value._version for value in (*inputs, cotangent)]
    run(AWKWARD.options, inputs, cotangent)
    assert [value._version for value in (*inputs, cotangent)] == versions
    assert all(torch.equal(a, b) for a, b in zip(before, (*inputs, cotangent), strict=True))


def test_empty_batch():
    (x, decay, frequency, weight), _ = SQUARE.inputs()
    leaves = [x[:0].requires_grad_(), decay[:0], frequency[:0], weight.requires_grad_()]
    y = sblu(*leaves, **SQUARE.options)
    assert y.shape == (0, 2, 3, 2, 4)
    y.sum().backward()
    assert torch.equal(leaves[3].grad, torch.zeros_like(weight))


def test_autocast_keeps_float32():
    inputs, _ = SQUARE.inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = sblu(*inputs, **SQUARE.options)
    assert torch.equal(under, sblu(*inputs, **SQUARE.options))


def test_vmap():
    (x, decay, frequency, weight), _ = AWKWARD.inputs()
    stacked = [torch.stack([value, value.flip(0)]) for value in (x, decay, frequency)]
    got = torch.func.vmap(lambda *v: sblu(*v, weight, **AWKWARD.options))(*stacked)
    for index in range(2):
        want = sblu(*(value[index] for value in stacked), weight, **AWKWARD.options)
        assert relative_error(got[index], want) <= 1e-14
