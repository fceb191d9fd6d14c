"""On a GPU: what every backend that runs there computes, against the reference in float64, at sizes that fill the chip
and beyond 2³¹ elements. `make gpu` runs these; without a CUDA device they are skipped.
"""

import copy

import pytest
import torch
from cases import AWKWARD, GOLDEN, GOLDEN_STEMS, SQUARE, Case, golden, golden_stem
from checks import BEYOND, check_strides, compare, far_apart, same_bits
from on_gpu import (
    DEVICE,
    FULL,
    MODEST,
    a_lost_device_ends_the_process,  # noqa: F401  # a fixture
    check,
    check_stem,
    filling,
    needs,
    run,
    run_embed,
    run_stem,
    running,
    stem_and_input,
)
from oracle import relative_error
from test_stem import OPTIONS, small

from aape_kernels.backends import Call, reasons

pytestmark = pytest.mark.gpu

FLOAT_DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def on_device(values) -> list[torch.Tensor]:
    return [value.to(DEVICE) for value in values]


def test_a_backend_runs_here():
    assert running(), reasons(Call("sblu", DEVICE, torch.float32))
    assert running() == [name for name in running() if reasons(Call("embed", DEVICE, torch.bfloat16))[name] is None]


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden(path, dtype, gpu):
    inputs, cotangent, options, want = golden(path, dtype)
    *inputs, cotangent = on_device([*inputs, cotangent])
    if dtype == torch.float32:
        compare(run(inputs, cotangent, options, gpu), on_device(want), inputs, dtype)
    else:
        check(inputs, cotangent, options, gpu)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_in_float64(path, gpu):
    if reasons(Call("sblu", DEVICE, torch.float64))[gpu] is not None:
        pytest.skip(f"{gpu} does not compute in float64")
    inputs, cotangent, options, want = golden(path, torch.float64)
    *inputs, cotangent = on_device([*inputs, cotangent])
    compare(run(inputs, cotangent, options, gpu), on_device(want), inputs, torch.float64)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("path", GOLDEN_STEMS, ids=lambda path: path.stem)
def test_golden_stem(path, dtype, gpu):
    inputs, cotangent, options, want = golden_stem(path, dtype)
    inputs, cotangent = {name: value.to(DEVICE) for name, value in inputs.items()}, cotangent.to(DEVICE)
    if dtype == torch.float32:
        expected = on_device(want.values())
    else:
        wide = {name: value.double() for name, value in inputs.items()}
        expected = run_embed(wide, cotangent.double(), options, "reference")
    got = run_embed(inputs, cotangent, options, gpu)
    compare(got, expected, inputs.values(), dtype, tuple(inputs), whole_stem=True)


@pytest.mark.parametrize("path", GOLDEN_STEMS, ids=lambda path: path.stem)
def test_golden_stem_in_float64(path, gpu):
    if reasons(Call("embed", DEVICE, torch.float64))[gpu] is not None:
        pytest.skip(f"{gpu} does not compute in float64")
    inputs, cotangent, options, want = golden_stem(path, torch.float64)
    inputs = {name: value.to(DEVICE) for name, value in inputs.items()}
    got = run_embed(inputs, cotangent.to(DEVICE), options, gpu)
    compare(got, on_device(want.values()), inputs.values(), torch.float64, tuple(inputs), whole_stem=True)


@pytest.mark.parametrize("kernel", ["bilateral", "quadrature"])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_sblu_at_a_size_that_fills_the_chip(dtype, kernel, gpu):
    check(*filling(FULL, dtype, kernel), gpu)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_overlapping_windows_at_a_size_that_fills_the_chip(dtype, gpu):
    check(*filling(FULL | {"batch": 16}, dtype, stride=(10, 10), window=20), gpu)


@pytest.mark.parametrize(
    ("patch", "states"), [((16, 15), 3), ((80, 4), 32), ((16, 4), 70), ((3, 8), 70), ((24, 8), 33)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocks_that_are_half_empty(dtype, patch, states, gpu):
    case = Case(2, 2, states, patch, patch, patch[1], (2, 19), (0, 0), "quadrature")
    inputs, cotangent = case.inputs(dtype)
    check(on_device(inputs), cotangent.to(DEVICE), case.options, gpu)


@pytest.mark.parametrize("layout", ["FT", "TF"])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_stem_at_a_size_that_fills_the_chip(dtype, layout, gpu):
    stem, x = stem_and_input(FULL, gpu, dtype, layout=layout)
    check_stem(stem, x, dtype)


@pytest.mark.parametrize("features", ["complex", "magnitude"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_stem_of_fewer_features_at_a_size_that_fills_the_chip(dtype, features, gpu):
    stem, x = stem_and_input(FULL, gpu, dtype, features=features)
    check_stem(stem, x, dtype)


@pytest.mark.parametrize("features", ["both", "complex", "magnitude"])
@pytest.mark.parametrize("states", [16, 40, 70])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_stem_of_any_number_of_states(dtype, states, features, gpu):
    """Fewer than a program has at once, a part of a block over, and more than one block."""
    stem, x = stem_and_input(MODEST | {"states": states}, gpu, dtype, features=features)
    check_stem(stem, x, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_narrow_stem_of_few_states_at_a_size_that_fills_the_chip(dtype, gpu):
    stem, x = stem_and_input(FULL | {"dim": 192, "states": 16}, gpu, dtype)
    check_stem(stem, x, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stem_under_autocast_at_a_size_that_fills_the_chip(dtype, gpu):
    stem, x = stem_and_input(FULL, gpu)
    check_stem(stem, x, dtype, autocast=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_projection_with_the_rest_in_float32(dtype, gpu):
    stem, x = stem_and_input(MODEST, gpu)
    stem.proj.to(dtype)
    check_stem(stem, x.to(dtype), dtype)


@pytest.mark.parametrize("layout", ["FT", "TF"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_stem_of_any_geometry(options, layout, gpu):
    if layout == "TF" and "stride" in options:
        options = options | {"stride": options["stride"][::-1]}
    stem = small(torch.float32, layout=layout, backend=gpu, **options).to(DEVICE)
    x = torch.randn(2, 2, *((21, 19) if layout == "FT" else (19, 21)), device=DEVICE)
    check_stem(stem, x, torch.float32)


@pytest.mark.parametrize("case", [SQUARE, AWKWARD], ids=["square", "awkward"])
def test_strided_and_expanded(case, gpu):
    inputs, cotangent = case.inputs(torch.float32)
    *inputs, cotangent = on_device([*inputs, cotangent])

    def results(inputs, cotangent):
        return run(inputs, cotangent, case.options, gpu)

    check_strides(results, inputs, cotangent, output=1e-6, gradient=1e-6)


def test_a_non_finite_pixel_reaches_its_own_token_only(gpu):
    inputs, cotangent, options = filling(MODEST, torch.float32)
    inputs[0][1, 0, 20, 37] = torch.nan
    y = run(inputs, cotangent, options, gpu)[0]
    hit = torch.zeros(y.shape[:3], dtype=torch.bool, device=DEVICE)
    hit[1, 1, 2] = True
    assert torch.equal(y.isnan().flatten(3).any(-1), hit)


def test_tf32_only_where_it_is_allowed(gpu):
    inputs, cotangent, options = filling(MODEST, torch.float32)
    want = run([value.double() for value in inputs], cotangent.double(), options, "reference")
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        allowed = run(inputs, cotangent, options, gpu)
    finally:
        torch.set_float32_matmul_precision(before)
    for got, expected in zip(allowed, want, strict=True):
        assert relative_error(got, expected) <= 3e-3
    compare(run(inputs, cotangent, options, gpu), want, inputs, torch.float32)


def test_strides_beyond_2_to_the_31(gpu, much_memory):
    """The 64-bit index path on few tokens."""
    needs(12)
    inputs, cotangent, options = filling(MODEST | {"batch": 2}, torch.float32)
    stem, x = stem_and_input(MODEST | {"batch": 2}, gpu)
    *far, far_cotangent, far_x = far_apart(*inputs[:3], cotangent, x)
    got = run([*far, inputs[3]], far_cotangent, options, gpu)
    assert same_bits(got, run(inputs, cotangent, options, gpu))
    cotangent = torch.randn_like(stem(x))
    assert same_bits(run_stem(stem, far_x, cotangent), run_stem(stem, x, cotangent))


def giant_clips() -> torch.Tensor:
    """Random clips (B, 1, 128, 1024) of bfloat16, just more than 2³¹ elements together."""
    clip = FULL["mel_bins"] * FULL["frames"]
    x = torch.empty(BEYOND // clip + 1, 1, FULL["mel_bins"], FULL["frames"], dtype=torch.bfloat16, device=DEVICE)
    assert x.numel() > BEYOND
    return x.normal_()


def first_and_last(value: torch.Tensor) -> torch.Tensor:
    return torch.stack([value[0], value[-1]])


def test_sblu_of_more_than_2_to_the_31_elements(gpu, much_memory):
    """Only the first and the last clip have a cotangent, so the gradients are those of these two."""
    needs(40)
    x, states = giant_clips(), 4
    tokens = (len(x), FULL["mel_bins"] // 16, FULL["frames"] // 16, states)
    decay = torch.rand(tokens, device=DEVICE) * 2 + 0.06
    frequency = torch.rand(tokens, device=DEVICE) * 2.9 + 0.2
    weight = (torch.randn(states, 1, 16, device=DEVICE) / 4).bfloat16()
    cotangent = torch.zeros(*tokens[:3], 2, states, dtype=torch.bfloat16, device=DEVICE)
    for index in (0, -1):
        cotangent[index].normal_()
    options = {"patch_size": (16, 16)}
    y, grad_x, grad_decay, grad_frequency, grad_weight = run([x, decay, frequency, weight], cotangent, options, gpu)
    assert not grad_x[1:-1].any()
    got = [*map(first_and_last, (y, grad_x, grad_decay, grad_frequency)), grad_weight]
    inputs = [*map(first_and_last, (x, decay, frequency)), weight]
    wide = [value.double() for value in inputs]
    want = run(wide, first_and_last(cotangent).double(), options, "reference")
    compare(got, want, inputs, torch.bfloat16)


def test_stem_of_more_than_2_to_the_31_elements(gpu, much_memory):
    needs(60)
    stem, _ = stem_and_input(MODEST | {"dim": 16, "states": 4, "batch": 1}, gpu, torch.bfloat16, encoder_dim=16)
    x = giant_clips()
    wide = copy.deepcopy(stem).double()
    wide.backend = "reference"
    leaf = x.requires_grad_()
    tokens = stem(leaf)
    cotangent = torch.zeros_like(tokens)
    for index in (0, -1):
        cotangent[index].normal_()
    grad_x, *gradients = torch.autograd.grad(tokens, [leaf, *stem.parameters()], cotangent)
    want = run_stem(wide, first_and_last(x.detach()).double(), first_and_last(cotangent).double())
    assert not grad_x[1:-1].any()
    got = [*map(first_and_last, (tokens, grad_x)), *gradients]
    names = ("x", *dict(stem.named_parameters()))
    compare(got, want, (x, *stem.parameters()), torch.bfloat16, names, whole_stem=True)
