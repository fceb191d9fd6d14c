"""The encoder over visible tokens and the cross-attention predictor."""

import math

import pytest
import torch

from aape_kernels import AaPE
from aape_ssl.method.masks import MaskSampler
from aape_ssl.method.model import SIZES, ConvMLPStem, Encoder, FixedAaPE, Predictor, make_stem, sincos_positions

TINY = (16, 2, 2)
GRID = (4, 6)
SMALL_BRANCH = {"num_states": 3, "encoder_dim": 5}
STEMS = ["aape", "aape-fixed", "conv", "conv+mlp"]


def tiny(stem: str = "aape", **options) -> Encoder:
    return Encoder(TINY, stem, patch_size=4, **options)


def clips(batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, 1, 4 * GRID[0], 4 * GRID[1])


def masks(batch: int = 3):
    return MaskSampler(num_masks=2, kind="random")(torch.arange(batch), GRID, 0)


def test_positions_are_the_formula():
    got = sincos_positions((3, 5), 8)
    for i in range(3):
        for j in range(5):
            rates = [10_000 ** (-4 * k / 8) for k in range(2)]
            angles = [i * rate for rate in rates], [j * rate for rate in rates]
            expected = [f(angle) for axis in angles for f in (math.sin, math.cos) for angle in axis]
            torch.testing.assert_close(got[i * 5 + j], torch.tensor(expected))


@pytest.mark.parametrize("stem", STEMS)
def test_visible_tokens_are_encoded_each_mask_by_itself(stem):
    """Those of one mask as if it were alone; all of them, in any order, as the whole clip."""
    encoder, x = tiny(stem), clips()
    visible = masks().visible
    tokens = encoder(x, visible)
    assert tokens.shape == (3, 2, visible.shape[-1], 16)
    for b in range(3):
        for m in range(2):
            torch.testing.assert_close(tokens[b, m], encoder(x[b : b + 1], visible[b : b + 1, m : m + 1])[0, 0])
    order = torch.stack([torch.randperm(24) for _ in range(3)])[:, None]
    shuffled = encoder(x, order)[:, 0]
    torch.testing.assert_close(shuffled, encoder(x).gather(1, order[:, 0, :, None].expand(-1, -1, 16)))


@pytest.mark.parametrize("stem", STEMS)
def test_no_masked_pixel_influences_the_visible_tokens(stem):
    """The gradient is exactly zero, mask by mask, and a masked pixel that is no number changes no bit."""
    encoder, x = tiny(stem), clips().requires_grad_()
    visible, masked = masks()
    for m in range(2):
        tokens = encoder(x, visible[:, m : m + 1])
        (gradient,) = torch.autograd.grad(tokens.square().sum(), x)
        patches = gradient.unfold(2, 4, 4).unfold(3, 4, 4).flatten(4).flatten(1, 3)  # [B, N, P_f·P_t]
        for b in range(3):
            assert (patches[b, masked[b, m]] == 0).all()
            assert (patches[b, visible[b, m]] != 0).any(-1).all()
    spoilt = x.detach().clone()
    i, j = divmod(int(masked[0, 0, 0]), GRID[1])
    spoilt[0, 0, 4 * i + 1, 4 * j + 2] = math.nan
    assert torch.equal(encoder(spoilt, visible)[0, 0], encoder(x, visible)[0, 0])


@pytest.mark.parametrize("wide", [{"window": 8}, {"stride": 2}, {"stride": 8}])
def test_stems_that_see_other_patches_are_refused(wide):
    with pytest.raises(ValueError, match="stem: expected tokens that see their own patch only"):
        tiny(stem_options={**wide, "band": (0.1, 3.0)})


def test_top_layers_end_in_the_encoders_own_output():
    encoder, x = tiny(), clips()
    hidden = encoder.hidden(x, 2)
    assert len(hidden) == 2
    torch.testing.assert_close(encoder.norm(hidden[-1]), encoder(x))
    torch.testing.assert_close(encoder.layers[1](hidden[0]), hidden[1])


def test_any_grid_with_the_same_weights():
    """Frames behind the last whole patch are not used."""
    encoder = tiny()
    x = torch.randn(1, 1, 17, 43)
    assert encoder.grid(x) == (4, 10)
    assert encoder(x).shape == (1, 40, 16)
    assert torch.equal(encoder(x), encoder(x[..., :16, :40].clone()))


@pytest.mark.parametrize(("features", "planes"), [("both", 3), ("complex", 2), ("magnitude", 1)])
@pytest.mark.parametrize("states", [8, 16, 32])
@pytest.mark.parametrize("size", SIZES)
def test_the_control_is_of_aapes_size(size, states, features, planes):
    dim, options = SIZES[size].dim, {"num_states": states, "features": features}
    aape, control = (
        sum(p.numel() for p in make_stem(name, 16, dim, options).parameters()) for name in ("aape", "conv+mlp")
    )
    unit = 256 + 1 + planes * states  # parameters of one hidden unit: its row of W1, its bias, its column of W2
    assert abs(aape - control) <= unit / 2


def test_the_default_control_is_of_the_default_aapes_size():
    aape, control = (sum(p.numel() for p in make_stem(name, 16, 192).parameters()) for name in ("aape", "conv+mlp"))
    assert abs(aape - control) <= (256 + 1 + 96) / 2


def test_the_controls_branch_is_a_plain_mlp():
    stem, x = make_stem("conv+mlp", 4, 16, SMALL_BRANCH), clips()
    assert isinstance(stem, ConvMLPStem)
    patches = x.unfold(2, 4, 4).unfold(3, 4, 4).flatten(4).flatten(1, 3)  # [B, N, 16]
    first, _, second, _, last = stem.branch
    silu = torch.nn.functional.silu
    y = silu(silu(patches @ first.weight.flatten(1).T + first.bias) @ second.weight.flatten(1).T + second.bias)
    expected = patches @ stem.proj.weight.flatten(1).T + stem.proj.bias + y @ last.weight.flatten(1).T
    torch.testing.assert_close(stem(x), expected)


def test_fixed_filters_are_those_of_every_patch():
    """AaPE with its encoder's last weight at 0: the same tokens, filters that no patch moves, and no others learn."""
    torch.manual_seed(0)
    fixed = make_stem("aape-fixed", 4, 16, SMALL_BRANCH)
    torch.manual_seed(0)
    aape, x = make_stem("aape", 4, 16, SMALL_BRANCH), clips()
    assert isinstance(fixed, FixedAaPE)
    assert (aape.analyse(x)[1] - fixed.analyse(x)[1]).abs().max() > 1e-4
    torch.nn.init.zeros_(aape.encoder.w2)
    assert torch.equal(fixed(x), aape(x))
    decay, frequency = fixed.analyse(x)
    low, high = fixed.band
    torch.testing.assert_close(frequency, (low + (high - low) * (torch.arange(3) + 0.5) / 3).expand_as(frequency))
    assert (decay == decay[0, 0, 0]).all()
    learning = {name for name, parameter in fixed.named_parameters() if parameter.requires_grad}
    assert learning == {"proj.weight", "proj.bias", "sblu.weight", "fusion.weight"}
    fixed(x).square().sum().backward()
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in fixed.parameters())
    fixed.reset_parameters()
    assert not fixed.encoder.w2.any()
    assert not fixed.encoder.w1.requires_grad


def test_stem_options_reach_aape():
    stem = tiny(stem_options={**SMALL_BRANCH, "kernel": "bilateral"}).stem
    assert isinstance(stem, AaPE)
    assert (stem.num_states, stem.encoder_dim, stem.kernel) == (3, 5, "bilateral")


def test_predictions_depend_on_visible_tokens_and_their_own_place():
    predictor = Predictor(16, dim=24, depth=2, heads=2)
    visible, masked = masks()
    tokens = torch.randn(3, 2, visible.shape[-1], 16, requires_grad=True)
    predictions = predictor(tokens, visible, masked, GRID)
    assert predictions.shape == (3, 2, masked.shape[-1], 16)
    # of fewer places, the same
    torch.testing.assert_close(predictor(tokens, visible, masked[..., 2:5], GRID), predictions[:, :, 2:5])
    # the visible tokens are a set: their order is nothing, their places are something
    order = torch.randperm(visible.shape[-1])
    torch.testing.assert_close(predictor(tokens[:, :, order], visible[..., order], masked, GRID), predictions)
    assert not torch.allclose(predictor(tokens, visible.roll(1, -1), masked, GRID), predictions)
    (gradient,) = torch.autograd.grad(predictions[0, 1].square().sum(), tokens)
    assert gradient[0, 1].any(-1).all()
    gradient[0, 1] = 0
    assert not gradient.any()


def test_attention_is_the_softmax():
    """Of each head's scaled products, mean over queries, heads and layers; 1 in all."""
    predictor, heads, dim = Predictor(16, dim=24, depth=2, heads=2), 2, 24
    visible, masked = masks()
    tokens = torch.randn(3, 2, visible.shape[-1], 16)
    positions = sincos_positions(GRID, dim)
    expected = torch.zeros(visible.shape)
    for b in range(3):
        for m in range(2):
            context = predictor.context(tokens[b, m]) + positions[visible[b, m]]
            queries = predictor.mask_token + positions[masked[b, m]]
            for layer in predictor.layers:
                w_q, w_k, w_v = layer.attention.in_proj_weight.chunk(3)
                b_q, b_k, b_v = layer.attention.in_proj_bias.chunk(3)
                q, k, v = (layer.norm1(queries) @ w_q.T + b_q, context @ w_k.T + b_k, context @ w_v.T + b_v)
                weights = [
                    (q[:, h] @ k[:, h].T / math.sqrt(dim / heads)).softmax(-1) for h in (slice(0, 12), slice(12, 24))
                ]
                expected[b, m] += sum(w.mean(0) for w in weights).detach() / (heads * 2)
                attended = torch.cat([w @ v[:, 12 * h : 12 * (h + 1)] for h, w in enumerate(weights)], -1)
                queries = queries + layer.attention.out_proj(attended)
                queries = queries + layer.mlp(layer.norm2(queries))
    got = predictor.attention(tokens, visible, masked, GRID)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(got.sum(-1), torch.ones(3, 2))
    assert got.std(-1).min() > 1e-3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Encoder("huge"), r"size: expected one of tiny, small, base or \(D, layers, heads\), got 'huge'"),
        (lambda: Encoder((32, 2, 0)), r"size: expected \(D, layers, heads\), each at least 1, got \(32, 2, 0\)"),
        (lambda: Encoder((32, 0, 4)), r"size: expected .* got \(32, 0, 4\)"),
        (lambda: Encoder((32, 2)), r"size: expected .* got \(32, 2\)"),
        (lambda: Encoder((18, 1, 3)), "size: expected a D divisible by 4 and by the heads"),
        (lambda: tiny("fft"), "stem: expected one of aape, aape-fixed, conv, conv[+]mlp, got 'fft'"),
        (lambda: tiny("conv", stem_options={"window": 4}), "stem_options: conv has no option window"),
        (lambda: tiny("aape", stem_options={"embed_dim": 8}), "stem_options: aape has no option embed_dim"),
        (
            lambda: tiny("conv+mlp", stem_options={"features": "phase"}),
            "features: expected one of both, complex, magnitude, got 'phase'",
        ),
        (
            lambda: tiny()(torch.zeros(2, 16, 16)),
            r"x: expected shape \(batch, 1, mel bins, frames\), got \(2, 16, 16\)",
        ),
        (lambda: tiny().grid(torch.zeros(2, 1, 16, 3)), r"x: expected at least one patch, \(4, 4\), got \(16, 3\)"),
        (lambda: Predictor(16, heads=-4), "heads: expected at least 1, got -4"),
        (lambda: Predictor(16, depth=0), "depth: expected at least 1, got 0"),
        (lambda: Predictor(16, dim=0), "dim: expected at least 1, got 0"),
        (lambda: Predictor(16, heads=3), "dim: expected a multiple of 4 and of the 3 heads, got 16"),
        (lambda: sincos_positions((2, 2), 6), "dim: expected a multiple of 4, got 6"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
