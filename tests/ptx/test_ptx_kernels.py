"""nvcc's PTX of the CUDA kernels through the backend that a user names, with every access to memory checked.

Golden cases, whole stems and odd geometries, forward and every gradient, at the bounds of every backend.
"""

import functools
from dataclasses import replace

import on_tensor_cores
import pytest
import torch
from cases import AWKWARD, GOLDEN, GOLDEN_STEMS, SQUARE, Case, cases, golden, golden_stem
from checks import check_strides, compare, far_apart, poisoned_memory, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import bound, relative_error
from ptx_backend import NVCC, SOURCE
from test_sblu import check as check_sblu
from test_sblu import check_golden
from test_sblu import run as run_sblu
from test_stem import OPTIONS, small
from test_stem import check as check_stem
from test_stem import check_golden as check_golden_stem

from aape_kernels import AaPE, embed
from aape_kernels.reference import PLANES

SOME_STEMS = on_tensor_cores.SOME
pytestmark = [pytest.mark.skipif(NVCC is None, reason="no nvcc was found"), pytest.mark.usefixtures("interpreter")]


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden(path):
    check_golden(path, torch.float32)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_in_bfloat16(path):
    """Against float64 at the inputs as bfloat16 has them."""
    inputs, cotangent, options, _ = golden(path, torch.bfloat16)
    wide = [value.double() for value in inputs]
    want = run_sblu(options | {"backend": "reference"}, wide, cotangent.double())
    compare(run_sblu(options, inputs, cotangent), want, inputs, torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("path", GOLDEN_STEMS, ids=lambda path: path.stem)
def test_golden_stem(path):
    check_golden_stem(path, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("path", GOLDEN_STEMS, ids=lambda path: path.stem)
def test_golden_stem_in_bfloat16(path):
    inputs, cotangent, options, _ = golden_stem(path, torch.bfloat16)

    def run(leaves, **more):
        leaves = {name: value.detach().requires_grad_() for name, value in leaves.items()}
        tokens = embed(**{"proj_b": None} | leaves, **options | more)
        return [tokens, *torch.autograd.grad(tokens, list(leaves.values()), cotangent.to(tokens.dtype))]

    want = run({name: value.double() for name, value in inputs.items()}, backend="reference")
    compare(run(inputs), want, inputs.values(), torch.bfloat16, tuple(inputs), whole_stem=True)


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_stem(options):
    with poisoned_memory():
        check_stem(small(torch.float32, **options), torch.randn(2, 2, 14, 19), torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize(("types", "options", "features"), SOME_STEMS.values(), ids=SOME_STEMS.keys())
def test_stem_on_tensor_cores(interpreter, types, options, features):
    """More tiles of tokens than blocks, and one that is not whole."""
    on_tensor_cores.check(types, (3, 32, 72), features=features, **options)
    kernels = {launch.kernel.partition("<")[0] for launch in interpreter.launches}
    assert {"warp_stem_kernel", "warp_stem_backward_kernel", "gradients_kernel"} <= kernels


@pytest.mark.slow
@pytest.mark.parametrize(
    ("types", "options", "features"), on_tensor_cores.SOME_TOKENS.values(), ids=on_tensor_cores.SOME_TOKENS.keys()
)
def test_tokens_by_one_kernel(interpreter, types, options, features):
    on_tensor_cores.check(types, (3, 32, 72), features=features, embed_dim=96, **options)
    kernels = [launch.kernel.partition("<")[0] for launch in interpreter.launches[:3]]
    assert kernels == ["token_weights_kernel", "warp_tokens_kernel", "warp_stem_backward_kernel"]


@pytest.mark.slow
@pytest.mark.parametrize("types", ["bfloat16", "float32"])
def test_tokens_of_several_rounds(interpreter, types):
    on_tensor_cores.check(on_tensor_cores.TYPES[types], (1, 32, 16 * 290), embed_dim=32)
    (launch,) = [each for each in interpreter.launches if each.kernel.startswith("warp_tokens")]
    assert launch.grid[0] * launch.block // 32 * 16 < 2 * 290


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", on_tensor_cores.UNITS.values(), ids=on_tensor_cores.UNITS.keys())
def test_sblu_on_tensor_cores(interpreter, case, dtype):
    with poisoned_memory():
        check_sblu(case, dtype)
    kernels = {launch.kernel.partition("<")[0] for launch in interpreter.launches}
    assert {"warp_sblu_kernel", "warp_sblu_backward_kernel"} <= kernels


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 33])
def test_tiles_of_tokens(tokens, dtype):
    """One lane's, a whole tile, one more: each at the end of the tensors that it is bounded by."""
    for width in (8, 32):  # by a product, and by one kernel
        on_tensor_cores.check((dtype, dtype), (1, 16, 16 * tokens), embed_dim=width)


ODD = {
    "awkward": AWKWARD,
    "one-row": Case(1, 1, 33, (1, 3), (1, 2), 3, (3, 9), (0, 1), "quadrature"),
    "many-rows": Case(1, 1, 5, (80, 4), (80, 4), 4, (1, 9), (0, 1), "bilateral"),
    "longer-than-a-tile": Case(1, 1, 5, (3, 200), (3, 200), 200, (1, 3), (0, 0), "quadrature"),
    "states-of-three-blocks": Case(1, 1, 70, (5, 15), (5, 15), 15, (1, 9), (0, 1), "bilateral"),
    "overlap": Case(2, 2, 8, (20, 16), (20, 8), 16, (2, 30), (0, 5), "quadrature"),
    "odd-frames": Case(2, 1, 8, (16, 16), (16, 16), 16, (2, 9), (3, 7), "quadrature"),
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("case", ODD.values(), ids=ODD.keys())
def test_odd_geometries(case, dtype):
    with poisoned_memory():
        check_sblu(case, dtype)


@pytest.mark.slow
def test_64_bit_offsets_give_the_same_bits():
    """Of the same kernel compiled once more, whatever nvcc makes of it."""
    case = Case(2, 1, 3, (4, 8), (4, 8), 8, (2, 3), (0, 0), "bilateral")
    (x, *rest), cotangent = case.inputs(torch.float32)
    want, got = (run_sblu(case.options, (value, *rest), cotangent) for value in (x, *far_apart(x)))
    assert same_bits(got, want)
    (x, *rest), cotangent = SQUARE.inputs(torch.float32)
    want, got = (run_sblu(SQUARE.options, (value, *rest), cotangent) for value in (x, *far_apart(x)))
    assert same_bits(got, want)


def shifted(value: torch.Tensor) -> torch.Tensor:
    """The same numbers from one element behind an aligned address on, in lines of an odd length."""
    big = torch.randn(*value.shape[:-1], value.shape[-1] + 3, dtype=value.dtype)
    return big[..., 1 : value.shape[-1] + 1].copy_(value)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_addresses_that_are_not_aligned(dtype):
    case = Case(2, 1, 8, (16, 16), (16, 16), 16, (2, 9), (0, 0), "quadrature")
    inputs, cotangent = case.inputs(dtype)
    want = run_sblu(case.options, inputs, cotangent)
    got = run_sblu(case.options, [shifted(value) for value in inputs], shifted(cotangent))
    assert same_bits(got, want)
    stem = AaPE(embed_dim=8).to(dtype)
    x = torch.randn(2, 1, 32, 80).to(dtype)
    with torch.no_grad():
        assert relative_error(stem(shifted(x)), stem(x)) <= bound(dtype, whole_stem=True)
        for parameter in stem.parameters():
            parameter.data = shifted(parameter.data)
    check_stem(stem, shifted(x), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"patch_size": (10, 4)}], ids=["usual", "general"])
def test_weights_whose_pairs_are_not_aligned(interpreter, options, dtype):
    """Contiguous ones, as of a flat buffer, which nobody copies."""
    for width in (8, 32):  # by a product, and by one kernel
        stem = AaPE(embed_dim=width, **options).to(dtype)
        for parameter in stem.parameters():
            flat = torch.empty(parameter.numel() + 1, dtype=dtype)
            parameter.data = flat[1:].view(parameter.shape).copy_(parameter.detach())
        check_stem(stem, torch.randn(2, 1, 32, 80).to(dtype), dtype)
    assert any(launch.kernel.startswith("warp_") for launch in interpreter.launches)


@pytest.mark.slow
@pytest.mark.parametrize("case", [SQUARE, AWKWARD], ids=["square", "awkward"])
def test_strided_and_expanded(case):
    inputs, cotangent = case.inputs(torch.float32)
    check_strides(functools.partial(run_sblu, case.options), inputs, cotangent, output=1e-6, gradient=1e-6)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_any_geometry():
    seen = []

    @settings(max_examples=100)
    @given(case=cases(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
    def every(case, dtype):
        grid = (max(2, case.grid[0]), max(2, case.grid[1]))  # one number alone may be a sum that cancels
        seen.append(case)
        check_sblu(replace(case, batch=2, grid=grid, states=case.states + 4), dtype)

    every()
    assert len(seen) >= 100


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("features", PLANES)
def test_any_geometry_on_tensor_cores(interpreter, features):
    seen = []

    @settings(max_examples=30)
    @given(case=cases())
    def every(case):
        seen.append(case)
        hidden, window = 8 + 5 * len(seen) % 56, 2 * (case.window // 2 + 1)
        patch = (case.patch[0], 2 * case.patch[1])
        sizes = {
            "in_chans": case.channels,
            "num_states": 4 + len(seen) % 29,
            "encoder_dim": hidden,
            "features": features,
        }
        stem = AaPE(
            patch_size=patch, stride=case.stride, window=window, embed_dim=8, decay=(0.1, 2.0), band=(0.1, 3.0), **sizes
        )
        torch.nn.init.normal_(stem.fusion.weight, std=0.1)
        stem.proj.bfloat16()
        x = torch.randn(2, case.channels, case.size[0] + patch[0], case.size[1] + 3 * patch[1])
        check_stem(stem, x.bfloat16(), torch.bfloat16)

    every()
    assert len(seen) >= 30
    assert {"warp_stem_kernel", "warp_stem_backward_kernel"} <= {
        each.kernel.partition("<")[0] for each in interpreter.launches
    }


@pytest.mark.slow
def test_every_source_is_run(interpreter):
    """A kernel that is launched by nothing here would be tested by nothing here."""
    check_sblu(AWKWARD, torch.float32)
    for options in ({}, {"num_states": 70}):
        check_stem(small(torch.float32, **options), torch.randn(2, 2, 14, 19), torch.float32)
    for width in (8, 32):
        check_stem(AaPE(embed_dim=width).bfloat16(), torch.randn(1, 1, 32, 32).bfloat16(), torch.bfloat16)
    assert {launch.kernel.partition("<")[0] for launch in interpreter.launches} == set(SOURCE)
