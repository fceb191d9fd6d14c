"""Log-magnitudes in Triton's interpreter: their accuracy, and the kernels that standardise them over the states.

The stem with every kind of features is in tests/test_gpu_kernels_on_cpu.py.
"""

import math

import pytest
import torch
from oracle import relative_error

from aape_kernels import reference
from aape_kernels.geometry import PatchGrid

triton = pytest.importorskip("triton", reason="Triton is not installed")
tl = pytest.importorskip("triton.language")

from aape_kernels.backends.triton.launch import TritonKernels  # noqa: E402  # it imports triton
from aape_kernels.backends.triton.magnitudes import log_magnitude, log_magnitude_slope  # noqa: E402

EPSILON, VARIANCE_FLOOR = reference.EPSILON, reference.VARIANCE_FLOOR


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("Triton's kernels are compiled in this process: there is a GPU")
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@triton.jit
def magnitude_kernel(p_re, p_im, p_e, p_slope_re, p_slope_im, N: tl.constexpr):  # noqa: N803  # as constants are named in kernels
    o_n = tl.arange(0, N)
    re, im = tl.load(p_re + o_n), tl.load(p_im + o_n)
    slope_re, slope_im = log_magnitude_slope(re, im)
    tl.store(p_e + o_n, log_magnitude(re, im))
    tl.store(p_slope_re + o_n, slope_re)
    tl.store(p_slope_im + o_n, slope_im)


def magnitude(re, im):
    """e and its slopes, by the kernels' arithmetic."""
    outputs = [torch.empty_like(re) for _ in range(3)]
    magnitude_kernel[(1,)](re, im, *outputs, N=re.numel())
    return outputs


@pytest.mark.parametrize(
    ("low", "high"), [(-12, -6), (-6, -2), (-2, -0.5), (-0.5, 0.5), (0.5, 17.5), (17.5, 18), (18, 30)], ids=str
)
def test_log_magnitude_and_slope_of_any_size(low, high):
    """From quiet states, where 1 + |y|²/ε² would round to 1, to loud ones, whose square would overflow."""
    count = 1 << 16
    size = 10 ** (low + (high - low) * torch.rand(count, dtype=torch.float64))
    angle = 2 * math.pi * torch.rand(count, dtype=torch.float64)
    re, im = (size * angle.cos()).float(), (size * angle.sin()).float()
    e, *slopes = magnitude(re, im)
    wide = re.double(), im.double()
    square = wide[0].square() + wide[1].square()
    want = 0.5 * torch.log1p(square / EPSILON**2)
    assert ((e - want).abs() / want).max() <= 4e-7
    for slope, y in zip(slopes, wide, strict=True):
        want = y / (square + EPSILON**2)
        assert ((slope - want).abs() / want.abs()).max() <= 4e-7


def test_zero_and_what_is_not_finite():
    values = torch.tensor([0.0, math.nan, math.inf, -math.inf])
    grid = torch.cartesian_prod(values, values).t().contiguous()
    with pytest.warns(RuntimeWarning, match="invalid value"):  # NumPy's
        e, *slopes = magnitude(*grid)
    assert torch.equal(e.isfinite(), grid.isfinite().all(0))
    assert e[0] == slopes[0][0] == slopes[1][0] == 0


GRID = PatchGrid((2, 4), (2, 4), 4)


def kernels(states, rows=17):
    """Of a clip of `rows` tokens: a block's worth and one more."""
    return TritonKernels(torch.randn(1, 1, 2, 4 * rows), states, GRID, quadrature=True, time_major=False)


def rows_apart(rows, width):
    """Rows with numbers between them that no kernel is to touch."""
    return torch.full((rows, width + 3), 7.0)[:, 1 : 1 + width]


def untouched(view):
    whole = view._base
    return (whole[:, 0] == 7).all() and (whole[:, 1 + view.shape[1] :] == 7).all()


def features(y, planes):
    """Rows of features of y (tokens, 2S), in y's dtype."""
    n = reference.magnitudes(y.unflatten(1, (2, -1)))
    return n if planes == 1 else torch.cat([y, n], 1)


def amplified(y):
    """By how much n's rounding exceeds e's: e/σ, which few states that happen to be alike make large; over tokens."""
    e = 0.5 * torch.log1p(y.double().unflatten(1, (2, -1)).square().sum(1) / EPSILON**2)
    sigma = (e.var(1, correction=0) + VARIANCE_FLOOR).sqrt()
    return (e.amax(1) / sigma).square().mean().sqrt().item()


def check_features(compute, y, planes):
    """Features and the cotangent of y against float64, in every combination that a kernel is asked for.

    Args:
        compute: from rows of features to fill, or None, and their cotangent, or None, to the cotangent of y.
    """
    rows, states = y.shape[0], y.shape[1] // 2
    cotangent = torch.randn(rows, planes * states)
    wide = y.double().requires_grad_()
    want = features(wide, planes)
    (want_grad,) = torch.autograd.grad(want, wide, cotangent.double(), retain_graph=True)

    out, grad = (rows_apart(rows, planes * states) for _ in range(2))
    grad.copy_(cotangent)
    got = compute(out, grad)
    # docs/maths.md §4.1: what is left of the gradient of two or three states is a difference that cancels
    gradient = 2e-5 if states < 4 else max(3e-6, 3e-7 * amplified(y))
    assert relative_error(out[:, -states:], want[:, -states:]) <= max(1e-6, 2e-7 * amplified(y))
    assert torch.equal(out[:, :-states], y if planes == 3 else y[:, :0])
    assert relative_error(got, want_grad) <= gradient
    assert torch.equal(grad, cotangent)
    assert untouched(out)

    alone = rows_apart(rows, planes * states)
    compute(alone, None)
    assert torch.equal(alone, out)
    assert torch.equal(compute(None, cotangent), got)
    rounded = out.to(torch.float16)
    narrow = torch.empty_like(rounded)
    compute(narrow, None)
    assert torch.equal(narrow, rounded)
    # against the gradient of what the kernel was given: where it cancels, rounding the cotangent moves it by more
    narrow = cotangent.to(torch.float16)
    (want_grad,) = torch.autograd.grad(want, wide, narrow.double())
    assert relative_error(compute(None, narrow), want_grad) <= gradient


# of two states n is ±1 unless they are quiet: there its gradient is a difference that cancels
@pytest.mark.parametrize(("states", "scale"), [(2, 0.02), (3, 1), (33, 1), (65, 1), (70, 1), (300, 1), (70, 1e-3)])
@pytest.mark.parametrize("planes", [1, 3])
def test_standardise(states, scale, planes):
    y = scale * torch.randn(17, 2 * states)
    call = kernels(states)

    def compute(out, grad):
        rows = y.clone()
        call.standardise(rows, out, grad)
        if grad is None:
            assert torch.equal(rows, y)
        return rows

    check_features(compute, y, planes)


@pytest.mark.parametrize(("states", "scale"), [(2, 0.02), (3, 1), (16, 1), (33, 1), (64, 1), (33, 1e-3), (65, 1)])
@pytest.mark.parametrize("planes", [1, 3])
def test_features(states, scale, planes):
    """In the kernel that makes y where a program has all states; lanes beyond them count for nothing."""
    call = kernels(states)
    r = torch.randn(call.rows, 2 * states)
    logits = call.by_token(r).chunk(2, dim=-1)
    weight = scale * torch.randn(states, 2)
    ranges = (0.25, math.log(8), 0.8, 2.3)
    y = torch.empty(call.rows, 2 * states)
    call.features(*logits, weight, y, ranges)
    assert (call.states <= call.most_states) == (call.state_blocks == 1)

    def compute(out, grad):
        return call.features(*logits, weight, out, ranges, grad)

    check_features(compute, y, planes)


@pytest.mark.parametrize(("states", "block"), [(8, 16), (16, 16), (17, 32), (32, 32), (33, 64), (64, 64), (65, 64)])
def test_blocks_of_states(states, block):
    call = TritonKernels(torch.randn(1, 1, 16, 16), states, PatchGrid((16, 16), (16, 16), 16), True, False)
    assert call.block_states == block
