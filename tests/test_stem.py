"""The stem as a module: what it computes, in every layout and dtype, and how it behaves as an `nn.Module`."""

import copy
import io
import math
import pickle

import oracle
import pytest
import torch
from cases import GOLDEN_STEMS, STEM_NAMES, Case, cases, golden_stem
from checks import compare
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import bound, relative_error
from torch import nn

from aape_kernels import AaPE, embed, replace_stem, sblu
from aape_kernels.reference import PLANES

pytestmark = pytest.mark.usefixtures("backend")

STATE = {
    "proj.weight": (24, 2, 6, 4),
    "proj.bias": (24,),
    "encoder.w1": (5, 2, 6, 4),
    "encoder.b1": (5,),
    "encoder.w2": (14, 5),
    "encoder.b2": (14,),
    "sblu.weight": (7, 2, 6),
    "fusion.weight": (24, 3, 7),
}
OPTIONS = {
    "plain": {},
    "overlap": {"stride": (4, 3)},
    "gapped": {"stride": (7, 5)},
    "short-window": {"window": 2},
    "long-window": {"window": 8, "kernel": "bilateral"},
    "complex": {"features": "complex"},
    "magnitude": {"features": "magnitude"},
    "magnitude-overlap": {"features": "magnitude", "stride": (4, 3), "window": 8, "kernel": "bilateral"},
    "few-states": {"num_states": 4},
    "many-states": {"num_states": 70},
    "ranges": {"band": (0.0, 1.0), "decay": (0.5, 9.0)},
    "no-bias": {"bias": False},
}


def small(dtype=torch.float64, **options) -> AaPE:
    """Six mel bins by four frames, two channels; every parameter moved off its special initial value."""
    layout = options.get("layout", "FT")
    patch = (6, 4) if layout == "FT" else (4, 6)
    sizes = {"patch_size": patch, "in_chans": 2, "embed_dim": 24, "num_states": 7, "encoder_dim": 5}
    stem = AaPE(**sizes | options, dtype=dtype)
    with torch.no_grad():
        for parameter in stem.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return stem


def oracle_tokens(stem: AaPE, x: torch.Tensor, parameters: dict[str, torch.Tensor]) -> torch.Tensor:
    """Tokens of mel-first input by the second writing, frequency-major."""
    p = {"proj.bias": None} | parameters
    proj_w, stride = p["proj.weight"], stem.stride
    if stem.layout == "TF":
        proj_w, stride = proj_w.transpose(2, 3), stride[::-1]
    names = ("proj.bias", "encoder.w1", "encoder.b1", "encoder.w2", "encoder.b2", "sblu.weight", "fusion.weight")
    rest = [p[name] for name in names]
    return oracle.embed(x, proj_w, *rest, stride, stem.window, stem.kernel, stem.decay, stem.band)


def check(stem: AaPE, x: torch.Tensor, dtype: torch.dtype) -> None:
    """Tokens and the gradients of x and every parameter, x mel-first whatever the layout."""
    leaf = x.detach().requires_grad_()
    tokens = stem(leaf if stem.layout == "FT" else leaf.transpose(2, 3))
    cotangent = torch.randn(tokens.shape).to(tokens.dtype)
    names, values = zip(*stem.named_parameters(), strict=True)
    got = torch.autograd.grad(tokens, (leaf, *values), cotangent)

    wide = [value.detach().double().requires_grad_() for value in (leaf, *values)]
    want = oracle_tokens(stem, wide[0], dict(zip(names, wide[1:], strict=True)))
    if stem.layout == "TF":
        n_f = (x.shape[2] - stem.proj.weight.shape[3]) // stem.stride[1] + 1
        want = want.unflatten(1, (n_f, -1)).transpose(1, 2).flatten(1, 2)
    wanted = torch.autograd.grad(want, wide, cotangent.double())

    compare([tokens, *got], [want, *wanted], (leaf, *values), dtype, ("x", *names), whole_stem=True)


@pytest.mark.parametrize("layout", ["FT", "TF"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_tokens_and_gradients(options, dtype, layout):
    if layout == "TF" and "stride" in options:
        options = options | {"stride": options["stride"][::-1]}
    stem = small(dtype, layout=layout, **options)
    check(stem, torch.randn(2, 2, 21, 19).to(dtype), dtype)


def check_golden(path, dtype: torch.dtype) -> None:
    inputs, cotangent, options, want = golden_stem(path, dtype)
    leaves = {name: value.requires_grad_() for name, value in inputs.items()}
    tokens = embed(**{"proj_b": None} | leaves, **options)
    got = torch.autograd.grad(tokens, list(leaves.values()), cotangent)
    compare([tokens, *got], list(want.values()), leaves.values(), dtype, tuple(leaves), whole_stem=True)


def test_golden_cases_are_there():
    assert len(GOLDEN_STEMS) == 6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("path", GOLDEN_STEMS, ids=lambda path: path.stem)
def test_golden(path, dtype):
    check_golden(path, dtype)


def check_geometry(case: Case, planes: int, dtype: torch.dtype) -> None:
    """`embed` of any geometry against the second writing, forward and every gradient."""
    channels, states, hidden, dim = case.channels, case.states + 3, 3, 5
    shapes = [
        (case.batch, channels, *case.size), (dim, channels, *case.patch), (dim,), (hidden, channels, *case.patch),
        (hidden,), (2 * states, hidden), (2 * states,), (states, channels, case.patch[0]), (dim, planes, states),
    ]  # fmt: skip
    inputs = {name: torch.randn(shape).to(dtype) for name, shape in zip(STEM_NAMES, shapes, strict=True)}
    inputs["w1"] /= inputs["w1"][0].numel() ** 0.5  # logits of a few units: 1 − σ of 20 has half of σ's digits left
    leaves = [value.requires_grad_() for value in inputs.values()]
    decay, band = (0.1, 2.1), (0.2, 3.0)
    options = {"stride": case.stride, "window": case.window, "kernel": case.kernel, "decay": decay, "band": band}
    tokens = embed(*leaves, **options)
    cotangent = torch.randn_like(tokens)
    got = torch.autograd.grad(tokens, leaves, cotangent)
    wide = [value.detach().double().requires_grad_() for value in leaves]
    want = oracle.embed(*wide, *options.values())
    wanted = torch.autograd.grad(want, wide, cotangent.double())
    compare([tokens, *got], [want, *wanted], leaves, dtype, STEM_NAMES, whole_stem=True)


def test_any_geometry_and_features():
    seen = []

    @settings(max_examples=120)
    @given(case=cases(), planes=st.sampled_from([1, 2, 3]))
    def every(case, planes):
        seen.append((planes, case.hard))
        check_geometry(case, planes, torch.float64)

    every()
    assert {planes for planes, _ in seen} == {1, 2, 3}
    assert sum(hard for _, hard in seen) >= len(seen) / 2


@pytest.mark.parametrize("features", PLANES)
@pytest.mark.parametrize("states", [2, 3])
def test_two_and_three_states(states, features):
    """The tokens. What is left of a cotangent of n, without its mean and what lies along n, has S − 2 dimensions: with
    so few states its gradient is mostly rounding (docs/maths.md §4)."""
    stem = small(torch.float32, num_states=states, features=features)
    x = torch.randn(2, 2, 21, 19)
    want = oracle_tokens(stem, x.double(), {name: value.double() for name, value in stem.named_parameters()})
    assert relative_error(stem(x), want) <= bound(torch.float32, whole_stem=True)


def test_loud_and_quiet_responses():
    """|y|² neither overflows nor vanishes: in float32, for responses from 1e-12 to 1e30, within one token too."""
    x = torch.randn(1, 1, 16, 64)
    x *= torch.logspace(-12, 30, 4).repeat_interleave(16)
    stem = AaPE(embed_dim=24, num_states=8, features="magnitude")
    with torch.no_grad():
        stem.proj.weight.zero_()  # its products drown n
        stem.encoder.w1.zero_()  # logits of 1e30 have one end of the range only
        stem.sblu.weight *= torch.logspace(-6, 6, 8)[:, None, None]
    wide = copy.deepcopy(stem).double()
    wide.backend = "reference"  # not every backend computes in float64
    assert relative_error(stem(x), wide(x.double())) <= bound(torch.float32, whole_stem=True)
    tokens = stem(x)
    (grad,) = torch.autograd.grad(tokens.sum(), stem.sblu.weight)
    (want,) = torch.autograd.grad(wide(x.double()).sum(), wide.sblu.weight)
    assert relative_error(grad, want) <= bound(torch.float32, whole_stem=True, gradient=True)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_pixel_makes_its_own_token_non_finite(value):
    stem, x = AaPE(embed_dim=8, num_states=4, features="magnitude"), torch.randn(1, 1, 32, 48)
    x[0, 0, 20, 20] = value
    with torch.no_grad():
        stem.proj.weight.zero_()
        assert stem(x).isfinite().all(-1).tolist() == [[True, True, True, True, False, True]]


@pytest.mark.parametrize("features", PLANES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_input_projection_and_tokens(dtype, features):
    """docs/maths.md §6, the rows of 16 bits: x, proj and tokens in 16 bits, the rest float32."""
    stem = AaPE(embed_dim=64, num_states=8, features=features)
    stem.proj.to(dtype)
    check_16_bit_forward_and_gradients(stem, dtype)


@pytest.mark.parametrize("features", PLANES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_whole_module_in_16_bits(dtype, features):
    check_16_bit_forward_and_gradients(AaPE(embed_dim=64, num_states=8, features=features).to(dtype), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_empty_batch(dtype):
    """Also under autocast: tokens of no clip, and gradients of zero."""
    stem, x = AaPE(embed_dim=8), torch.randn(0, 1, 32, 48, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        tokens = stem(x)
    assert tokens.shape == (0, 6, 8)
    gradients = torch.autograd.grad(tokens.sum(), [x, *stem.parameters()])
    assert not any(value.any() for value in gradients)
    assert AaPE(embed_dim=8, dtype=dtype)(x.detach().to(dtype)).shape == (0, 6, 8)


def check_16_bit_forward_and_gradients(stem: AaPE, dtype: torch.dtype) -> None:
    x = torch.randn(2, 1, 32, 64).to(dtype).requires_grad_()
    tokens = stem(x)
    cotangent = torch.randn_like(tokens)
    names, values = zip(*{"x": x, **dict(stem.named_parameters())}.items(), strict=True)
    got = torch.autograd.grad(tokens, values, cotangent)
    wide = [value.detach().double().requires_grad_() for value in values]
    want = oracle_tokens(stem, wide[0], dict(zip(names[1:], wide[1:], strict=True)))
    wanted = torch.autograd.grad(want, wide, cotangent.double())
    assert tokens.dtype == dtype
    assert relative_error(tokens, want) <= bound(dtype, whole_stem=True)
    for name, value, gradient, expected in zip(names, values, got, wanted, strict=True):
        assert gradient.dtype == value.dtype, name
        assert relative_error(gradient, expected) <= bound(dtype, whole_stem=True, gradient=True), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    """Encoder and SBLU in float32 on the float32 input; product and tokens in autocast's dtype."""
    stem, x = AaPE(embed_dim=64, num_states=8), torch.randn(2, 1, 32, 64)
    with torch.autocast("cpu", dtype=dtype):
        tokens = stem(x)
        decay, frequency = stem.analyse(x)
    assert tokens.dtype == dtype
    assert relative_error(tokens, stem.double()(x.double())) <= bound(dtype, whole_stem=True)
    wide = stem.analyse(x.double())
    assert relative_error(decay, wide[0]) <= 1e-6
    assert relative_error(frequency, wide[1]) <= 1e-6


def test_embed_is_what_the_module_calls():
    stem, x = small(stride=(4, 3)), torch.randn(1, 2, 14, 10, dtype=torch.float64)
    p = dict(stem.named_parameters())
    assert torch.equal(stem(x), embed(x, *p.values(), stride=(4, 3)))


@pytest.mark.parametrize("layout", ["FT", "TF"])
def test_analyse_feeds_sblu(layout):
    """Tokens are the projected patches plus the fused features that `responses` reports, at the decays and frequencies
    of `analyse`."""
    stem = small(layout=layout)
    x = torch.randn(2, 2, 13, 17, dtype=torch.float64)
    given = x if layout == "FT" else x.transpose(2, 3)
    decay, frequency = stem.analyse(given)
    assert decay.shape == frequency.shape == (2, 2, 4, 7)
    assert not decay.requires_grad
    assert (decay.min() > 1 / 4) & (decay.max() < 2)
    assert (math.pi / 4 < frequency.min()) & (frequency.max() < math.pi)
    y = sblu(x, decay, frequency, stem.sblu.weight, (6, 4))
    heard = stem.responses(given)
    assert all(torch.equal(got, want) for got, want in zip(heard, (decay, frequency, y), strict=False))
    plain = stem.proj(given).flatten(2).transpose(1, 2)
    features = torch.cat([y, heard.magnitude.unsqueeze(3)], 3)
    fused = torch.einsum("bijks,dks->bijd", features, stem.fusion.weight)
    fused = fused.flatten(1, 2) if layout == "FT" else fused.transpose(1, 2).flatten(1, 2)
    assert relative_error(stem(given), plain + fused) <= 1e-13


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_responses_of_a_stem_in_16_bits(dtype):
    """Those of the same weights and the same input in float32, to float32."""
    stem, x = small().to(dtype), torch.randn(2, 2, 13, 17).to(dtype)
    heard = stem.responses(x)
    for got, want in zip(heard, stem.double().responses(x.double()), strict=True):
        assert got.dtype == torch.float32
        assert relative_error(got, want) <= 1e-5


def test_layouts_agree_on_a_non_square_patch():
    ft = small()
    tf = AaPE(patch_size=(4, 6), in_chans=2, embed_dim=24, num_states=7, encoder_dim=5, layout="TF").double()
    state = ft.state_dict()
    assert {name: tuple(value.shape) for name, value in tf.state_dict().items()} == STATE | {
        "proj.weight": (24, 2, 4, 6)
    }
    tf.load_state_dict(state | {"proj.weight": state["proj.weight"].transpose(2, 3)})
    x = torch.randn(2, 2, 18, 20, dtype=torch.float64)
    want = ft(x).unflatten(1, (3, 5)).transpose(1, 2).flatten(1, 2)
    assert relative_error(tf(x.transpose(2, 3)), want) <= 1e-14


def test_image_size():
    stem = AaPE((128, 1024), embed_dim=8)
    assert (stem.img_size, stem.grid_size, stem.num_patches) == ((128, 1024), (8, 64), 512)
    stem = AaPE((1024, 80), (4, 16), embed_dim=8, stride=(4, 8), layout="TF")
    assert (stem.img_size, stem.grid_size, stem.num_patches) == ((1024, 80), (256, 9), 2304)
    assert stem(torch.randn(1, 1, 1024, 80)).shape == (1, 2304, 8)
    assert AaPE(64, embed_dim=8).grid_size == (4, 4)
    stem = AaPE(embed_dim=8)
    assert (stem.img_size, stem.grid_size, stem.num_patches) == (None, None, None)
    for size in ((16, 16), (31, 47), (128, 998)):
        assert stem(torch.randn(1, 1, *size)).shape == (1, (size[0] // 16) * (size[1] // 16), 8)


def test_initial_values():
    stem = AaPE(in_chans=2)
    bound_w1 = 1 / math.sqrt(2 * 16 * 16)
    for weight, limit in (
        (stem.proj.weight, bound_w1),
        (stem.encoder.w1, bound_w1),
        (stem.sblu.weight, 1 / math.sqrt(2 * 16)),
        (stem.fusion.weight, 1 / math.sqrt(3 * 16)),
    ):
        assert weight.abs().max() <= limit
        assert weight.std().item() == pytest.approx(limit / math.sqrt(3), rel=0.1)
    assert not stem.encoder.b1.any()
    assert stem.encoder.w2.std().item() == pytest.approx(0.02, rel=0.1)
    share = torch.sigmoid(stem.encoder.b2)
    torch.testing.assert_close(share[:16], torch.full((16,), 0.5))
    torch.testing.assert_close(share[16:], (torch.arange(16) + 0.5) / 16)


def test_starts_as_a_fixed_bank_over_the_band():
    stem = AaPE(embed_dim=8)
    with torch.no_grad():
        stem.encoder.w2.zero_()
    decay, frequency = stem.analyse(torch.randn(1, 1, 16, 32))
    spacing = (math.pi - math.pi / 16) / 16
    torch.testing.assert_close(frequency[0, 0, 1], math.pi / 16 + spacing * (torch.arange(16) + 0.5))
    torch.testing.assert_close(decay, torch.full_like(decay, math.sqrt(2 / 16)))


def test_state_dict():
    stem = small()
    assert {name: tuple(value.shape) for name, value in stem.state_dict().items()} == STATE
    assert stem.state_dict()._metadata[""]["version"] == 2
    other = small()
    x = torch.randn(1, 2, 12, 12, dtype=torch.float64)
    assert not torch.equal(other(x), stem(x))
    other.load_state_dict(stem.state_dict())
    assert torch.equal(other(x), stem(x))


def test_copies():
    stem, x = small(layout="TF", backend="reference"), torch.randn(1, 2, 12, 12, dtype=torch.float64)
    file = io.BytesIO()
    torch.save(stem, file)
    file.seek(0)
    for other in (copy.deepcopy(stem), pickle.loads(pickle.dumps(stem)), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), stem(x))
        assert repr(other) == repr(stem)
        assert other.proj.weight is not stem.proj.weight


def test_meta_device():
    with torch.device("meta"):
        stem = AaPE(embed_dim=8, backend="reference")
    assert all(parameter.is_meta for parameter in stem.parameters())
    assert AaPE(embed_dim=8, device="meta").proj.weight.is_meta
    assert stem(torch.randn(3, 1, 32, 64, device="meta")).shape == (3, 8, 8)
    stem.to_empty(device="cpu")
    for parameter in stem.parameters():
        parameter.data.fill_(math.nan)
    stem.reset_parameters()
    assert all(parameter.isfinite().all() for parameter in stem.parameters())
    assert not stem.encoder.b1.any()


def test_repr_says_what_is_computed():
    words = repr(AaPE((128, 1024), embed_dim=192, num_states=8, window=8, layout="FT"))
    for part in (
        "1, 192, patch_size=(16, 16), stride=(16, 16)",
        "img_size=(128, 1024), grid_size=(8, 64)",
        "num_states=8",
        "window=8",
        "kernel='quadrature'",
        "features='both'",
        "band=(0.1963, 3.142) rad/frame",
        "decay=(0.125, 2) /frame",
    ):
        assert part in words


def test_no_weight_decay():
    names = dict(AaPE(embed_dim=8).named_parameters()).keys()
    assert AaPE(embed_dim=8).no_weight_decay() == {"proj.bias", "encoder.b1", "encoder.b2"} <= names
    assert AaPE(embed_dim=8, bias=False).no_weight_decay() == {"encoder.b1", "encoder.b2"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["FT", "TF"])
@pytest.mark.parametrize("stride", [(8, 4), (5, 3)], ids=["grid", "overlap"])
def test_from_conv_computes_what_the_conv_computes(stride, layout, dtype):
    conv = nn.Conv2d(2, 24, (8, 4), stride, bias=stride == (8, 4)).to(dtype).eval()
    conv.weight.requires_grad_(False)
    stem = AaPE.from_conv(conv, layout=layout, num_states=4)
    x = torch.randn(2, 2, 30, 21).to(dtype)
    want = conv.double()(x.double()).flatten(2).transpose(1, 2)
    epsilon = torch.finfo(dtype).eps
    assert relative_error(stem(x), want) <= 4 * epsilon
    assert (stem.patch_size, stem.stride, stem.layout) == ((8, 4), stride, layout)
    assert stem.proj.weight.dtype == dtype
    assert torch.equal(stem.proj.weight.double(), conv.weight)
    assert stem.proj.weight.data_ptr() != conv.weight.data_ptr()
    assert not stem.training
    assert not stem.proj.weight.requires_grad
    assert stem.fusion.weight.requires_grad


@pytest.mark.parametrize("features", PLANES)
def test_from_conv_is_silent_at_first_whatever_the_features(features):
    conv, x = nn.Conv2d(1, 24, 16, 16), torch.randn(2, 1, 32, 64)
    stem = AaPE.from_conv(conv, features=features)
    assert stem.fusion.weight.shape == (24, PLANES[features], 16)
    assert relative_error(stem(x), conv(x).flatten(2).transpose(1, 2)) <= 1e-6
    stem(x).square().sum().backward()
    assert (stem.fusion.weight.grad.abs().amax((0, 2)) > 0).all()


@pytest.mark.parametrize("shape", [(8, 1, 16, 16), (8, 3, 8, 8), (1, 3, 16, 16), (8, 1, 1, 16)], ids=str)
def test_from_conv_takes_sizes_from_the_weight(shape):
    """As where three colours were summed to one channel, which leaves the convolution's attributes as they were."""
    conv = nn.Conv2d(3, 8, 16, 16)
    conv.weight, conv.bias = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(shape[0]))
    x = torch.randn(2, shape[1], 48, 64)
    stem = AaPE.from_conv(conv)
    assert relative_error(stem(x), conv(x).flatten(2).mT) <= bound(torch.float32, whole_stem=True)
    model = replace_stem(nn.Sequential(conv), path="0", layout="FT")
    assert relative_error(model(x), conv(x)) <= bound(torch.float32, whole_stem=True)


def test_from_conv_whatever_the_default_device_is():
    conv = nn.Conv2d(1, 16, 8, 8)
    with torch.device("meta"):
        stem = AaPE.from_conv(conv)
    assert all(bool(parameter.isfinite().all()) for parameter in stem.parameters())


def test_from_conv_moves_with_the_first_step():
    stem = AaPE.from_conv(nn.Conv2d(1, 16, 16, 16))
    stem(torch.randn(1, 1, 32, 32)).square().sum().backward()
    assert stem.fusion.weight.grad.abs().max() > 0


def test_from_conv_starts_at_zero_again():
    stem = AaPE.from_conv(nn.Conv2d(1, 16, 16, 16))
    nn.init.ones_(stem.fusion.weight)
    copy.deepcopy(stem).reset_parameters()
    assert stem.fusion.weight.all()
    stem.reset_parameters()
    assert not stem.fusion.weight.any()
    assert stem.sblu.weight.any()


def test_from_conv_on_the_meta_device():
    stem = AaPE.from_conv(nn.Conv2d(1, 16, 16, 16, device="meta"))
    assert all(parameter.is_meta for parameter in stem.parameters())
