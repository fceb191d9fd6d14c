"""One table: every wrong call raises, and names the argument, what was expected and what came."""

import math
from collections import UserList

import pytest
import torch
from torch import nn

from aape_kernels import AaPE, decay_from_hz, embed, sblu

X = torch.randn(2, 1, 32, 64)
DECAY = torch.rand(2, 2, 4, 3)
WEIGHT = torch.randn(3, 1, 16)
STEM = AaPE(embed_dim=8, num_states=32, encoder_dim=64)


def call_sblu(**changes):
    arguments = {"x": X, "decay": DECAY, "frequency": DECAY, "weight": WEIGHT} | changes
    return lambda: sblu(**arguments)


def call_embed(**changes):
    p = STEM.state_dict()
    names = ("proj_w", "proj_b", "w1", "b1", "w2", "b2", "sblu_w", "fusion_w")
    arguments = {"x": X} | dict(zip(names, p.values(), strict=True)) | changes
    return lambda: embed(**arguments)


def call_stem(x, dtype=torch.float32, **options):
    return lambda: AaPE(embed_dim=8, dtype=dtype, **options)(x)


def make(**options):
    return lambda: AaPE(**{"embed_dim": 8} | options)


def convert(*arguments, **options):
    return lambda: AaPE.from_conv(nn.Conv2d(*arguments, **options))


TABLE = {
    # rank, channels, sizes
    "rank-3": (call_stem(X[0]), ValueError, r"x: expected shape \(batch, 1, mel bins, frames\).*got \(1, 32, 64\)"),
    "rank-3-sblu": (call_sblu(x=X[0]), ValueError, r"x: expected shape .*got \(1, 32, 64\)"),
    "rank-5": (call_stem(X[None]), ValueError, r"x: expected shape .*got \(1, 2, 1, 32, 64\)"),
    "rank-tf": (call_stem(X[0], layout="TF"), ValueError, r"x: expected shape \(batch, 1, frames, mel bins\).*TF"),
    "channels": (call_stem(X, in_chans=2), ValueError, r"x: expected shape \(batch, 2, .*got \(2, 1, 32, 64\)"),
    "channels-sblu": (
        call_sblu(weight=torch.randn(3, 2, 16)),
        ValueError,
        r"weight: expected shape \(states, 1, 16\).*got \(3, 2, 16\)",
    ),
    "no-channels": (
        call_sblu(x=X[:, :0], weight=WEIGHT[:, :0]),
        ValueError,
        r"x: expected at least one channel, got shape \(2, 0, 32, 64\)",
    ),
    "no-states": (
        call_sblu(weight=WEIGHT[:0], decay=DECAY[..., :0], frequency=DECAY[..., :0]),
        ValueError,
        r"weight: expected at least one state, got shape \(0, 1, 16\)",
    ),
    "few-mel-bins": (call_stem(X[:, :, :15]), ValueError, "x: expected at least one patch, 16 mel bins, got 15"),
    "few-frames": (call_stem(X[..., :15]), ValueError, "x: expected at least one patch, 16 frames, got 15"),
    "few-frames-tf": (
        call_stem(X[:, :, :15], layout="TF"),
        ValueError,
        "x: expected at least one patch, 16 frames, got 15",
    ),
    "few-frames-sblu": (call_sblu(x=X[..., :9]), ValueError, "x: expected at least one patch, 16 frames, got 9"),
    "no-frames": (call_stem(X[..., :0]), ValueError, "x: expected at least one patch, 16 frames, got 0"),
    "img-size": (
        call_stem(X, img_size=(32, 80)),
        ValueError,
        r"x: expected img_size \(32, 80\) \(mel bins, frames\), got \(32, 64\)",
    ),
    "img-size-analyse": (
        lambda: AaPE((32, 80), embed_dim=8).analyse(X),
        ValueError,
        r"x: expected img_size \(32, 80\)",
    ),
    "img-size-tf": (
        call_stem(X, img_size=(64, 32), layout="TF"),
        ValueError,
        r"img_size \(64, 32\) \(frames, mel bins\), got \(32, 64\)",
    ),
    "img-below-patch": (make(img_size=(8, 64)), ValueError, r"img_size: expected at least one patch.*got \(8, 64\)"),
    # token grid
    "decay-grid": (
        call_sblu(decay=DECAY[:, :, :3]),
        ValueError,
        r"decay: expected shape \(2, 2, 4, 3\): \(batch, N_f, N_t, states\), got \(2, 2, 3, 3\)",
    ),
    "frequency-grid": (call_sblu(frequency=DECAY[:1]), ValueError, r"frequency: expected shape \(2, 2, 4, 3\)"),
    "decay-states": (call_sblu(decay=DECAY[..., :2]), ValueError, r"decay: expected shape .*got \(2, 2, 4, 2\)"),
    "grid-of-stride": (call_sblu(stride=8), ValueError, r"decay: expected shape \(2, 3, 7, 3\)"),
    # types
    "not-a-tensor": (call_stem([1.0]), TypeError, "x: expected a tensor, got list"),
    "not-a-tensor-sblu": (call_sblu(decay=0.5), TypeError, "decay: expected a tensor, got float"),
    "integer": (call_stem(X.long()), TypeError, r"x: expected one of torch\.float32.*got torch\.int64"),
    "complex": (call_stem(X.cfloat()), TypeError, r"x: expected one of .*got torch\.complex64"),
    "bool-sblu": (call_sblu(x=X > 0), TypeError, r"x: expected one of .*got torch\.bool"),
    "complex-decay": (call_sblu(decay=DECAY.cfloat()), TypeError, r"decay: expected one of .*got torch\.complex64"),
    "x-and-proj": (
        call_stem(X.double()),
        TypeError,
        r"x: expected torch\.float32, that of proj\.weight \(or autocast\), got torch\.float64",
    ),
    "x-half-proj-float": (call_stem(X.half()), TypeError, r"x: expected torch\.float32, .*got torch\.float16"),
    "decay-dtype": (call_sblu(decay=DECAY.double()), TypeError, r"decay: expected torch\.float32, got torch\.float64"),
    "weight-dtype": (
        call_sblu(x=X.bfloat16(), weight=WEIGHT.half()),
        TypeError,
        r"weight: expected torch\.bfloat16 \(that of x\) or torch\.float32, got torch\.float16",
    ),
    "b2-dtype": (
        call_embed(b2=torch.zeros(64).double()),
        TypeError,
        r"b2 \(AaPE's encoder\.b2\): expected torch\.float32, got torch\.float64",
    ),
    "stem-dtype": (
        make(dtype=torch.int32),
        TypeError,
        r"dtype: expected one of torch\.float32.* or None, got torch\.int32",
    ),
    "stem-dtype-type": (make(dtype="float32"), TypeError, r"dtype: expected one of .* or None, got 'float32'"),
    # devices
    "device": (
        call_sblu(weight=WEIGHT.to("meta")),
        ValueError,
        "weight: expected a tensor on cpu, where x is, got one on meta",
    ),
    "device-analyse": (
        lambda: STEM.analyse(X.to("meta")),
        ValueError,
        r"w1 \(AaPE's encoder\.w1\): expected a tensor on meta, where x is, got one on cpu",
    ),
    "device-stem": (
        call_stem(X.to("meta")),
        ValueError,
        r"sblu_w \(AaPE's sblu\.weight\): expected a tensor on meta, where x is, got one on cpu",
    ),
    "device-name": (make(device="foo"), ValueError, "device: expected one such as \"cpu\".*got 'foo'"),
    "device-type": (make(device=1.5), ValueError, r"device: expected one such as .*got 1\.5"),
    # parameters of embed
    "proj-rank": (call_embed(proj_w=torch.randn(8, 256)), ValueError, r"proj_w .*: expected .*got \(8, 256\)"),
    "w1-shape": (
        call_embed(w1=torch.randn(64, 1, 16, 8)),
        ValueError,
        r"w1 .*: expected shape \(64, 1, 16, 16\): \(hidden, channels, P_f, P_t\), got \(64, 1, 16, 8\)",
    ),
    "b1-shape": (call_embed(b1=torch.zeros(63)), ValueError, r"b1 .*: expected shape \(64\).*got \(63,\)"),
    "w2-shape": (
        call_embed(w2=torch.randn(63, 64)),
        ValueError,
        r"w2 .*: expected shape \(64, hidden\).*got \(63, 64\)",
    ),
    "no-hidden-units": (
        call_embed(w1=torch.randn(0, 1, 16, 16), b1=torch.zeros(0), w2=torch.randn(64, 0)),
        ValueError,
        r"w2 .*: expected at least one hidden unit, got shape \(64, 0\)",
    ),
    "b2-shape": (
        call_embed(b2=torch.zeros(32)),
        ValueError,
        r"b2 .*: expected shape \(64\): \(2 \* states\), got \(32,\)",
    ),
    "sblu-shape": (
        call_embed(sblu_w=torch.randn(32, 1, 8)),
        ValueError,
        r"sblu_w .*: expected shape \(states, 1, 16\)",
    ),
    "fusion-planes": (
        call_embed(fusion_w=torch.randn(8, 4, 32)),
        ValueError,
        r"fusion_w .*: expected planes 3 \(both\), 2 \(complex\), 1 \(magnitude\), got shape \(8, 4, 32\)",
    ),
    "one-state-embed": (
        call_embed(
            sblu_w=torch.randn(1, 1, 16), w2=torch.randn(2, 64), b2=torch.randn(2), fusion_w=torch.randn(8, 1, 1)
        ),
        ValueError,
        r"sblu_w \(AaPE's sblu\.weight\): expected at least 2 states for features 'magnitude', .*got 1",
    ),
    "one-state": (
        make(num_states=1),
        ValueError,
        "num_states: expected at least 2 states for features 'both', .*got 1",
    ),
    "features": (make(features="all"), ValueError, "features: expected one of both, complex, magnitude, got 'all'"),
    "fusion-shape": (
        call_embed(fusion_w=torch.randn(8, 64)),
        ValueError,
        r"fusion_w \(AaPE's fusion\.weight\): expected shape \(8, planes, 32\)",
    ),
    "bias-shape": (call_embed(proj_b=torch.zeros(9)), ValueError, r"proj_b .*: expected shape \(8\).*got \(9,\)"),
    # windows, kernels, backends, layouts
    "window-parity": (make(window=15), ValueError, "window: expected a positive even number of frames.*got 15"),
    "window-parity-sblu": (call_sblu(window=3), ValueError, "window: expected a positive even number of frames"),
    "window-zero": (make(window=0), ValueError, "window: expected a positive even number of frames.*got 0"),
    "window-type": (make(window="16"), TypeError, "window: expected an int"),
    "kernel": (make(kernel="gabor"), ValueError, "kernel: expected one of bilateral, quadrature, got 'gabor'"),
    "kernel-sblu": (call_sblu(kernel=None), ValueError, "kernel: expected one of bilateral, quadrature, got None"),
    "backend": (
        make(backend="cudnn"),
        ValueError,
        "backend: expected one of auto, cuda, triton, cpu, reference, got 'cudnn'",
    ),
    "backend-sblu": (call_sblu(backend="mps"), ValueError, "backend: expected one of auto, .*got 'mps'"),
    "layout": (make(layout="FTC"), ValueError, "layout: expected one of FT, TF, got 'FTC'"),
    "layout-embed": (call_embed(layout="tf"), ValueError, "layout: expected one of FT, TF, got 'tf'"),
    # ranges
    "band-nan": (make(band=(0.1, math.nan)), ValueError, r"band: expected finite numbers .*got \(0\.1, nan\)"),
    "band-above": (make(band=(0.1, 3.2)), ValueError, r"band: expected 0 <= low < high <= pi.*got \(0\.1, 3\.2\)"),
    "band-below": (make(band=(-0.1, 3.0)), ValueError, r"band: expected 0 <= low < high <= pi"),
    "band-order": (make(band=(3.0, 0.1)), ValueError, r"band: expected 0 <= low < high <= pi.*got \(3\.0, 0\.1\)"),
    "band-type": (make(band=1.0), TypeError, r"band: expected two numbers \(low, high\), got 1\.0"),
    "band-needed": (make(stride=(16, 1)), ValueError, "band: expected .*stride of 1 frame.*got None"),
    "band-embed": (call_embed(band=(0, 9)), ValueError, "band: expected 0 <= low < high <= pi"),
    "decay-inf": (make(decay=(0.1, math.inf)), ValueError, r"decay: expected finite numbers"),
    "decay-zero": (make(decay=(0.0, 2.0)), ValueError, r"decay: expected 0 < low < high .*got \(0\.0, 2\.0\)"),
    "decay-order": (make(decay=(2.0, 0.1)), ValueError, r"decay: expected 0 < low < high"),
    "decay-below-float32": (make(decay=(1e-300, 1.0)), ValueError, "decay: expected numbers from 1e-18 to 1e[+]18"),
    "decay-beyond-float32": (make(decay=(1.0, 1e300)), ValueError, "decay: expected numbers from 1e-18 to 1e[+]18"),
    "decay-type": (make(decay=("a", "b")), TypeError, r"decay: expected two numbers"),
    # sizes of the module
    "patch": (make(patch_size=0), ValueError, "patch_size: expected sizes of at least 1, got 0"),
    "patch-type": (make(patch_size=(16, 16, 1)), TypeError, "patch_size: expected an int or two of them"),
    "stride": (make(stride=(16, 0)), ValueError, r"stride: expected sizes of at least 1, got \(16, 0\)"),
    "states": (make(num_states=0), ValueError, "num_states: expected at least 1, got 0"),
    "states-type": (make(num_states=1.5), TypeError, r"num_states: expected an int, got 1\.5"),
    "hidden": (make(encoder_dim=-3), ValueError, "encoder_dim: expected at least 1, got -3"),
    "embed-dim": (make(embed_dim=0), ValueError, "embed_dim: expected at least 1, got 0"),
    "in-chans": (make(in_chans="1"), TypeError, "in_chans: expected an int, got '1'"),
    # timm's keywords
    "output-fmt": (make(output_fmt="BCHW"), ValueError, "output_fmt: expected one of NCHW, NHWC.*got 'BCHW'"),
    "flatten": (make(flatten=1), TypeError, "flatten: expected True or False, got 1"),
    "strict": (make(strict_img_size=None), TypeError, "strict_img_size: expected True or False, got None"),
    "pad": (make(dynamic_img_pad="yes"), TypeError, "dynamic_img_pad: expected True or False, got 'yes'"),
    "norm": (make(norm_layer="ln"), TypeError, "norm_layer: expected a module's class .*got 'ln'"),
    "padded-rank": (call_stem(X[0], dynamic_img_pad=True), ValueError, r"x: expected shape .*got \(1, 32, 64\)"),
    # from_conv
    "conv-padding": (convert(1, 8, 16, 16, padding=1), ValueError, r"conv: expected padding \(0, 0\), got \(1, 1\)"),
    "conv-same": (convert(1, 8, 3, padding="same"), ValueError, r"conv: expected padding \(0, 0\), got same"),
    "conv-dilation": (convert(1, 8, 16, dilation=2), ValueError, r"conv: expected dilation \(1, 1\), got \(2, 2\)"),
    "conv-groups": (convert(2, 8, 16, 16, groups=2), ValueError, "conv: expected groups 1, got 2"),
    "conv-type": (
        lambda: AaPE.from_conv(nn.Linear(256, 8)),
        TypeError,
        r"conv: expected an nn\.Conv2d, got Linear",
    ),
    "conv-hooks": (
        lambda: AaPE.from_conv(nn.utils.spectral_norm(nn.Conv2d(1, 8, 16, 16))),
        ValueError,
        r"conv: expected one without forward hooks.*remove_weight_norm",
    ),
    "sparse": (call_stem(X.to_sparse()), TypeError, r"x: expected a tensor with strides \(to_dense\(\)\), got layout"),
    "mkldnn": (call_stem(X.to_mkldnn()), TypeError, r"x: expected a tensor with strides .*got layout torch\._mkldnn"),
    "bias": (make(bias="x"), TypeError, "bias: expected True or False, got 'x'"),
    "norm-layer-made": (
        make(norm_layer=nn.LayerNorm(8)),
        TypeError,
        "norm_layer: expected a module.*got LayerNorm",
    ),
    "backend-list": (make(backend=["cpu"]), ValueError, r"backend: expected one of auto.*got \['cpu'\]"),
    "patch-bytes": (make(patch_size=b"ab"), TypeError, "patch_size: expected an int or two of them, got b'ab'"),
    "hop-bool": (lambda: decay_from_hz((1, 2), hop=True), ValueError, "hop: expected a positive number .*got True"),
    "conv-settles": (
        lambda: AaPE.from_conv(nn.Conv2d(1, 8, 16, 16), patch_size=8),
        TypeError,
        "patch_size: expected to be left out, as conv settles it",
    ),
}


def test_what_was_right_with_strides_is_checked_without_them():
    STEM(X)
    with pytest.raises(TypeError, match=r"x: expected a tensor with strides"):
        STEM(X.to_sparse())


@pytest.mark.parametrize(("call", "error", "words"), TABLE.values(), ids=TABLE.keys())
def test_bad_input(call, error, words):
    x, parameters = X.clone(), {name: value.clone() for name, value in STEM.state_dict().items()}
    with pytest.raises(error, match=words) as caught:
        call()
    assert caught.type is error
    assert torch.equal(X, x)
    assert all(torch.equal(STEM.state_dict()[name], value) for name, value in parameters.items())


def test_the_table_starts_from_calls_that_work():
    assert call_sblu()().shape == (2, 2, 4, 2, 3)
    assert call_embed()().shape == call_stem(X)().shape == (2, 8, 8)
    assert make()().num_states == 16
    assert convert(1, 8, 16, 16, padding="valid")().embed_dim == 8


# Each but for one thing like the call before it, of which sizes and options are not looked at twice.
AFTER_A_RIGHT_CALL = {
    "window": {"window": True},
    "stride": {"stride": (16.0, 16)},
    "decay": {"decay": (True, 2.0)},
    "kernel": {"kernel": "Quadrature"},
    "x, dtype": {"x": X.double()},
    "x, channels": {"x": X[:, [0, 0]]},
    "x, nothing": {"x": None},
    "weight, dtype": {"w1": STEM.encoder.w1.detach().half()},
    "weight, size": {"b1": STEM.encoder.b1.detach()[1:]},
    "weight, device": {"sblu_w": STEM.sblu.weight.detach().to("meta")},
    "weight, text": {"proj_b": "bias"},
}


@pytest.mark.parametrize("changes", AFTER_A_RIGHT_CALL.values(), ids=AFTER_A_RIGHT_CALL)
def test_a_right_call_before_it_makes_no_call_right(changes):
    right = {"window": 16, "stride": (16, 16), "decay": (1.0, 2.0), "kernel": "quadrature"}
    call_embed(**right)()
    with pytest.raises((TypeError, ValueError), match="expected"):
        call_embed(**right | changes)()


class Sizes(UserList[float]):
    """A sequence that hashes by what it is, not by what it holds."""

    __hash__ = object.__hash__


@pytest.mark.parametrize("sizes", [[16, 16], Sizes([16, 16])])
def test_an_option_that_changes_is_looked_at_again(sizes):
    call_embed(stride=sizes)()
    sizes[0] = 16.5
    with pytest.raises(TypeError, match=r"stride: expected an int or two of them, got \[16\.5, 16\]"):
        call_embed(stride=sizes)()


def test_right_under_autocast_only():
    with torch.autocast("cpu", torch.bfloat16):
        call_embed(x=X.bfloat16())()
    with pytest.raises(TypeError, match=r"x: expected torch\.float32"):
        call_embed(x=X.bfloat16())()
