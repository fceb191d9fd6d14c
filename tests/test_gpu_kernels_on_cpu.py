"""The GPU backends on CPU tensors: Triton's kernels in its interpreter, the CUDA kernels in tests/emulator.

The interpreter's products of 16 bits go wrong: Triton's kernels take float32 there.
"""

import functools
import math
from dataclasses import replace

import emulated
import pytest
import test_stem as stem_tests
import torch
import triton_interpreter
from cases import AWKWARD, GOLDEN, GOLDEN_STEMS, SQUARE, Case, cases
from checks import check_gain_and_z, check_strides, far_apart, poisoned_memory, same_bits
from hypothesis import given, settings
from oracle import bound, relative_error
from test_sblu import check as check_sblu
from test_sblu import check_golden, check_range
from test_sblu import run as run_sblu
from test_stem import OPTIONS, check_16_bit_forward_and_gradients, small
from test_stem import check as check_stem
from test_stem import check_golden as check_golden_stem

from aape_kernels import AaPE, ops, sblu
from aape_kernels.reference import PLANES


@pytest.fixture(autouse=True, params=["triton", "cuda"])
def simulated(request, monkeypatch):
    """The backend that AAPE_BACKEND names for the test."""
    if request.param == "triton":
        pytest.importorskip("triton", reason="Triton is not installed")
        if torch.cuda.is_available():
            pytest.skip("Triton's kernels are compiled in this process: there is a GPU")
        triton_interpreter.use(monkeypatch)
    else:
        emulated.use(monkeypatch, request.getfixturevalue("emulated_module"))
    return request.param


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden(path):
    check_golden(path, torch.float32)


def test_any_geometry():
    """In float32, at the bounds for float32: of enough numbers, as one alone may be a sum that cancels."""
    seen = []

    @settings(max_examples=12)
    @given(case=cases())
    def every(case):
        grid = (max(2, case.grid[0]), max(2, case.grid[1]))
        seen.append(case)
        check_sblu(replace(case, batch=2, grid=grid, states=case.states + 4), torch.float32)

    every()
    assert len(seen) >= 12


@pytest.mark.parametrize("kernel", ["bilateral", "quadrature"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("patch", "states"), [((16, 16), 32), ((16, 15), 3), ((80, 4), 32), ((16, 4), 70), ((3, 8), 70)], ids=str
)
def test_dtype_and_blocks(dtype, patch, states, kernel):
    """With products and without, one block of states and two; 70 states and 3 rows leave blocks half empty."""
    batch = 8 if states == 3 else 2  # one number alone may be a sum that cancels
    check_sblu(Case(batch, 1, states, patch, patch, patch[1], (1, 5), (0, 0), kernel), dtype)


@pytest.mark.parametrize("odd", [False, True], ids=["even", "odd"])
def test_gain_and_z_hold_everywhere_in_the_range(odd):
    window = 3 if odd else 4
    check_gain_and_z(window, points=24, frames=window // 2 + 1)


@pytest.mark.parametrize("window", [8, 7])
@pytest.mark.parametrize(("low", "high"), [(5.0, 10.0), (0.0, 0.3), (0.0, 1e-3)], ids=["fast", "slow", "still"])
def test_gradients_at_the_ends_of_the_range(window, low, high):
    check_range(Case(1, 1, 16, (4, window), (4, window), window, (2, 4), (0, 0), "quadrature"), low, high)


@pytest.mark.parametrize("path", GOLDEN_STEMS, ids=lambda path: path.stem)
def test_golden_stem(path):
    check_golden_stem(path, torch.float32)


TIME_MAJOR = {"time-major": {"layout": "TF"}, "time-major-overlap": {"layout": "TF", "stride": (3, 4)}}


@pytest.mark.parametrize("options", [*OPTIONS, *TIME_MAJOR])
def test_stem(options):
    stem = small(torch.float32, **(OPTIONS | TIME_MAJOR)[options])
    check_stem(stem, torch.randn(2, 2, 14, 19), torch.float32)


@pytest.mark.parametrize("features", ["magnitude", "complex"])
@pytest.mark.parametrize("options", ["overlap", "short-window", *TIME_MAJOR])
def test_features_of_every_layout(options, features):
    """What `test_stem` has of the default features, of the others."""
    stem = small(torch.float32, **(OPTIONS | TIME_MAJOR)[options], features=features)
    check_stem(stem, torch.randn(2, 2, 10, 13), torch.float32)


@pytest.mark.parametrize("features", PLANES)
@pytest.mark.parametrize("states", [7, 32, 33, 70])
def test_features_of_any_number_of_states(states, features):
    """A part of a warp, a whole one, and more states than one program has at once, on either backend or on both."""
    check_stem(small(torch.float32, num_states=states, features=features), torch.randn(2, 2, 14, 19), torch.float32)


@pytest.mark.parametrize("features", PLANES)
def test_two_states(features):
    stem_tests.test_two_and_three_states(2, features)


def test_loud_and_quiet_responses():
    stem_tests.test_loud_and_quiet_responses()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy's, of inf − inf
@pytest.mark.parametrize("states", [4, 70])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_pixel_makes_its_own_token_non_finite(value, states):
    stem, x = AaPE(embed_dim=8, num_states=states, features="magnitude"), torch.randn(1, 1, 32, 48)
    x[0, 0, 20, 20] = value
    with torch.no_grad():
        stem.proj.weight.zero_()
        assert stem(x).isfinite().all(-1).tolist() == [[True, True, True, True, False, True]]


@pytest.mark.parametrize("features", PLANES)
def test_float16_projection_and_tokens(features):
    """Forward and every gradient. bfloat16 is the emulator's alone."""
    stem = AaPE(embed_dim=64, num_states=8, features=features)
    stem.proj.half()
    check_16_bit_forward_and_gradients(stem, torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_stem_of_usual_sizes(dtype):
    stem = AaPE(embed_dim=48)
    stem.proj.to(dtype)
    x = torch.randn(1, 1, 32, 64).to(dtype)
    tokens = stem(x)
    assert tokens.dtype == dtype
    wide = AaPE(embed_dim=48, backend="reference").double()
    wide.load_state_dict(stem.state_dict())
    assert relative_error(tokens, wide(x.double())) <= bound(dtype, whole_stem=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, simulated):
    """Encoder and SBLU in float32 on the float32 input; product and tokens in autocast's dtype."""
    stem, x = AaPE(embed_dim=24, num_states=8), torch.randn(1, 1, 32, 32)
    options = ((16, 16), (16, 16), 16, True, stem.decay, stem.band, False, simulated)
    values = [value.detach() for value in stem.parameters()]
    _, r, hidden = ops.embed(x, *values, *options)
    with torch.autocast("cpu", dtype=dtype):
        tokens = stem(x)
        narrow = [v.to(dtype) if k in (0, 1, 7) else v for k, v in enumerate(values)]
        _, r_under, hidden_under = ops.embed(x, *narrow, *options)
    assert tokens.dtype == dtype
    assert torch.equal(r, r_under)
    assert torch.equal(hidden, hidden_under)


@pytest.mark.parametrize("case", [SQUARE, AWKWARD], ids=["square", "awkward"])
def test_strided_and_expanded(case):
    inputs, cotangent = case.inputs(torch.float32)
    check_strides(functools.partial(run_sblu, case.options), inputs, cotangent, output=1e-6, gradient=1e-6)


def test_only_the_gradients_asked_for():
    inputs, cotangent = AWKWARD.inputs(torch.float32)
    _, *wanted = run_sblu(AWKWARD.options, inputs, cotangent)
    for index, want in enumerate(wanted):
        leaves = [value.detach().requires_grad_(k == index) for k, value in enumerate(inputs)]
        (got,) = torch.autograd.grad(sblu(*leaves, **AWKWARD.options), leaves[index], cotangent)
        assert torch.equal(got, want)


@pytest.mark.parametrize(("features", "states"), [*((features, 7) for features in PLANES), ("both", 70)])
def test_only_the_gradients_of_the_stem_asked_for(features, states):
    stem, x = small(torch.float32, features=features, num_states=states), torch.randn(1, 2, 7, 9)
    names, values = zip(*stem.named_parameters(), strict=True)
    every = dict(zip(names, torch.autograd.grad(stem(x).square().sum(), values), strict=True))
    for name in names:
        for other, value in zip(names, values, strict=True):
            value.requires_grad_(other == name)
        (got,) = torch.autograd.grad(stem(x).square().sum(), dict(stem.named_parameters())[name])
        # by other kernels than all of them at once, in another order
        assert relative_error(got, every[name]) <= bound(torch.float32, whole_stem=True, gradient=True)


@pytest.mark.parametrize(("features", "states"), [("both", 7), ("complex", 70), ("magnitude", 70), ("magnitude", 2)])
def test_every_output_is_written(features, states):
    inputs, cotangent = AWKWARD.inputs(torch.float32)
    stem, x = small(torch.float32, features=features, num_states=states), torch.randn(1, 2, 13, 14)

    def everything():
        tokens = stem(x)
        values = run_sblu(AWKWARD.options, inputs, cotangent)
        return [*values, tokens, *torch.autograd.grad(tokens.square().sum(), list(stem.parameters()))]

    want = everything()
    with poisoned_memory():
        got = everything()
    assert same_bits(got, want)


def test_inputs_are_not_written_to():
    inputs, cotangent = AWKWARD.inputs(torch.float32)
    before = [value.clone() for value in (*inputs, cotangent)]
    run_sblu(AWKWARD.options, inputs, cotangent)
    assert all(torch.equal(a, b) for a, b in zip(before, (*inputs, cotangent), strict=True))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy's, of inf − inf
@pytest.mark.parametrize("window", [8, 5])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_pixel_makes_exactly_its_own_tokens_non_finite(value, window):
    patch = (3, window)
    case = Case(1, 1, 4, patch, (2, 3), window, (3, 5), (0, 0), "quadrature")
    (x, decay, frequency, weight), _ = case.inputs(torch.float32)
    x[0, 0, 4, 7] = value
    y = sblu(x, decay, frequency, weight, **case.options)
    hit = torch.zeros(3, 5, dtype=torch.bool)
    for i in range(3):
        for j in range(5):
            hit[i, j] = 2 * i <= 4 < 2 * i + 3 and 3 * j <= 7 < 3 * j + window
    assert torch.equal(~y.isfinite().flatten(3).any(-1)[0] | ~y.isfinite().flatten(3).all(-1)[0], hit)


def test_elements_beyond_2_to_the_31():
    case = Case(2, 1, 3, (4, 8), (4, 8), 8, (2, 3), (0, 0), "quadrature")
    (x, *rest), cotangent = case.inputs(torch.float32)
    want, got = (run_sblu(case.options, (value, *rest), cotangent) for value in (x, *far_apart(x)))
    assert same_bits(got, want)
    stem, near = small(torch.float32), torch.randn(2, 2, 13, 14)

    def gradients(x):
        leaf = x.detach().requires_grad_()
        tokens = stem(leaf)
        return [tokens, *torch.autograd.grad(tokens.square().sum(), [leaf, *stem.parameters()])]

    assert same_bits(gradients(*far_apart(near)), gradients(near))


def test_empty_batch():
    (x, decay, frequency, weight), _ = SQUARE.inputs(torch.float32)
    leaves = [x[:0].requires_grad_(), decay[:0], frequency[:0], weight.requires_grad_()]
    y = sblu(*leaves, **SQUARE.options)
    assert y.shape == (0, 2, 3, 2, 4)
    y.sum().backward()
    assert torch.equal(leaves[3].grad, torch.zeros_like(weight))
    stem = AaPE(embed_dim=8)
    tokens = stem(torch.randn(0, 1, 32, 64))
    assert tokens.shape == (0, 8, 8)
    tokens.sum().backward()
    assert all(not parameter.grad.any() for parameter in stem.parameters())


def test_opcheck(simulated):
    inputs, cotangent = SQUARE.inputs(torch.float32)
    sizes = (SQUARE.patch, SQUARE.stride, SQUARE.window, True)
    torch.library.opcheck(ops.sblu, (*inputs, *sizes, simulated))
    torch.library.opcheck(ops.sblu_backward, (cotangent, *inputs, *sizes, (True, False, True, True), simulated))


def test_opcheck_of_the_stem(simulated):
    stem, x = small(torch.float32), torch.randn(1, 2, 7, 9)
    values = [value.detach() for value in stem.parameters()]
    options = ((6, 4), (6, 4), 4, True, stem.decay, stem.band, False)
    tokens, r, hidden = ops.embed(x, *values, *options, simulated)
    torch.library.opcheck(ops.embed, (x, *values, *options, simulated))
    need = (True, True, False, *[True] * 6)
    torch.library.opcheck(
        ops.embed_backward, (torch.ones_like(tokens), x, *values, r, hidden, *options, need, simulated)
    )


def test_compiles_in_one_graph_forward_and_backward():
    stem, x = small(torch.float32), torch.randn(1, 2, 12, 12)
    want = torch.autograd.grad(stem(x).square().sum(), list(stem.parameters()))
    compiled = torch.compile(stem, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(x).square().sum(), list(stem.parameters()))
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) <= 1e-6


def test_same_bits_on_every_run():
    inputs, cotangent = AWKWARD.inputs(torch.float32)
    first, second = (run_sblu(AWKWARD.options, inputs, cotangent) for _ in range(2))
    assert same_bits(second, first)
