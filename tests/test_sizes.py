"""Sizes, padding and output formats: the surface that timm's models ask a stem for."""

import pytest
import torch
from cases import cases
from hypothesis import given
from oracle import relative_error
from torch import nn

from aape_kernels import AaPE
from aape_kernels.geometry import PatchGrid

GRIDS = {"grid": (8, 4), "overlap": (5, 3), "gapped": (9, 7)}


def small(**options) -> AaPE:
    return AaPE(**{"patch_size": (8, 4), "embed_dim": 6, "num_states": 2, "encoder_dim": 3} | options).double()


def noise(*size) -> torch.Tensor:
    return torch.randn(2, 1, *size, dtype=torch.float64)


@given(case=cases())
def test_covering_grid(case):
    """Padding leaves nothing over but gaps, and adds no patch of padding alone."""
    grid = PatchGrid.make(case.patch, case.stride, case.window)
    counts = grid.covering(*case.size)
    axes = zip(case.size, case.patch, case.stride, counts, grid.extent(*counts), strict=True)
    for size, patch, stride, count, end in axes:
        assert end == (count - 1) * stride + patch
        covered = {frame for i in range(count) for frame in range(i * stride, i * stride + patch)}
        gaps = {frame for i in range(count) for frame in range(i * stride + patch, (i + 1) * stride)}
        assert set(range(size)) <= covered | gaps
        assert (count - 1) * stride < size


@pytest.mark.parametrize("layout", ["FT", "TF"])
@pytest.mark.parametrize("stride", GRIDS.values(), ids=GRIDS.keys())
def test_formats(stride, layout):
    plain = small(stride=stride, layout=layout)
    x = noise(30, 22)
    tokens = plain(x)
    grid = plain.dynamic_feat_size((30, 22))
    assert grid == ((30 - 8) // stride[0] + 1, (22 - 4) // stride[1] + 1)
    wanted = {
        "NLC": tokens,
        "NCL": tokens.transpose(1, 2),
        "NHWC": tokens.unflatten(1, grid),
        "NCHW": tokens.transpose(1, 2).unflatten(2, grid),
    }
    assert wanted["NCHW"].shape == plain.proj(x).shape
    for name, want in wanted.items():
        stem = small(stride=stride, layout=layout, output_fmt=name)
        stem.load_state_dict(plain.state_dict())
        assert torch.equal(stem(x), want)
        assert (stem.flatten, stem.output_fmt) == (False, name)
    stem = small(stride=stride, layout=layout, flatten=False)
    stem.load_state_dict(plain.state_dict())
    assert torch.equal(stem(x), wanted["NCHW"])
    assert stem(x).flatten(2).transpose(1, 2).is_contiguous()
    assert stem(x[:0]).shape == (0, *wanted["NCHW"].shape[1:])


@pytest.mark.parametrize("layout", ["FT", "TF"])
@pytest.mark.parametrize("stride", GRIDS.values(), ids=GRIDS.keys())
@pytest.mark.parametrize("size", [(30, 22), (24, 32), (3, 2), (26, 19)], ids=str)
def test_padding_appends_zeros(size, stride, layout):
    plain = small(stride=stride, layout=layout)
    stem = small(stride=stride, layout=layout, dynamic_img_pad=True, output_fmt="NHWC")
    stem.load_state_dict(plain.state_dict())
    x = noise(*size)
    grid = stem.dynamic_feat_size(size)
    ends = [(count - 1) * step + patch for count, step, patch in zip(grid, stride, (8, 4), strict=True)]
    longer = x.new_zeros(2, 1, *map(max, size, ends))
    longer[:, :, : size[0], : size[1]] = x
    assert torch.equal(stem(x), plain(longer).unflatten(1, grid))
    assert torch.equal(stem.analyse(x)[1], plain.analyse(longer)[1])
    fixed = small(img_size=size, stride=stride, layout=layout, dynamic_img_pad=True)
    assert (fixed.grid_size, fixed.num_patches) == (grid, grid[0] * grid[1])
    assert fixed(x).shape == (2, fixed.num_patches, 6)


def test_padding_without_need_is_none():
    plain, stem = small(), small(dynamic_img_pad=True)
    stem.load_state_dict(plain.state_dict())
    x = noise(16, 12)
    assert torch.equal(stem(x), plain(x))


def test_strict_image_size():
    stem = small(img_size=(16, 12), strict_img_size=False)
    assert (stem.img_size, stem.grid_size, stem.num_patches) == ((16, 12), (2, 3), 6)
    assert stem(noise(24, 8)).shape == (2, 6, 6)
    with pytest.raises(ValueError, match=r"x: expected img_size \(16, 12\) \(mel bins, frames\), got \(24, 8\)"):
        small(img_size=(16, 12))(noise(24, 8))


@pytest.mark.parametrize("layout", ["FT", "TF"])
def test_ratio_is_the_stride(layout):
    stem = small(stride=(5, 3), layout=layout)
    assert (stem.feat_ratio(), stem.feat_ratio(as_scalar=False)) == (5, (5, 3))


def test_set_input_size():
    stem = small(stride=(5, 3), layout="TF")
    stem.set_input_size((23, 16))
    assert (stem.img_size, stem.grid_size, stem.num_patches) == ((23, 16), (4, 5), 20)
    assert stem(noise(23, 16)).shape == (2, 20, 6)
    stem.set_input_size()
    stem.set_input_size(patch_size=(8, 4))
    assert stem.img_size == (23, 16)
    for arguments, words in (
        ({"patch_size": 8}, r"patch_size: expected \(8, 4\), which the stem's encoder.*got 8"),
        ({"img_size": (7, 16)}, r"img_size: expected at least one patch, \(8, 4\), got \(7, 16\)"),
    ):
        with pytest.raises(ValueError, match=words):
            stem.set_input_size(**arguments)
        assert (stem.img_size, stem.grid_size, stem.num_patches) == ((23, 16), (4, 5), 20)


def test_norm():
    stem = small(norm_layer=nn.LayerNorm, dtype=torch.float64)
    stem.norm.weight.data.fill_(3.0)
    x = noise(16, 12)
    norm, stem.norm = stem.norm, nn.Identity()
    tokens = stem(x)
    stem.norm = norm
    assert relative_error(stem(x), 3 * nn.functional.layer_norm(tokens, (6,))) <= 1e-12
    stem.reset_parameters()
    assert stem.norm.weight.eq(1).all()
    with torch.device("meta"):
        assert small(norm_layer=nn.LayerNorm).norm.weight.is_meta
    assert small(norm_layer=nn.LayerNorm, device="meta").norm.weight.is_meta


def test_one_graph_for_padded_lengths():
    stem = small(dynamic_img_pad=True, output_fmt="NHWC")
    compiled = torch.compile(stem, fullgraph=True, dynamic=True, backend="aot_eager")
    for frames in (13, 17, 22, 40):
        x = noise(20, frames)
        assert relative_error(compiled(x), stem(x)) <= 1e-12


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("layout", ["FT", "TF"])
@pytest.mark.parametrize("stride", GRIDS.values(), ids=GRIDS.keys())
def test_token_mask(stride, layout, pad):
    """What the mask keeps of a padded batch is what each clip gives by itself."""
    stem = small(stride=stride, layout=layout, dynamic_img_pad=pad)
    time = 2 if layout == "FT" else 1
    lengths = [33, 20, 9, 40]
    x = torch.randn(4, 1, 40, 40, dtype=torch.float64)
    clips = [one.narrow(time, 0, length) for one, length in zip(x, lengths, strict=True)]
    for one, length in zip(x, lengths, strict=True):
        one.narrow(time, length, 40 - length).zero_()
    mask = stem.token_mask(lengths, x.shape[2:])
    tokens = stem(x)
    assert mask.shape == tokens.shape[:2]
    for clip, kept, own in zip(clips, tokens, mask, strict=True):
        want = stem(clip[None])[0]
        assert own.sum() == len(want)
        assert relative_error(kept[own], want) <= 1e-12
    assert torch.equal(stem.token_mask(torch.tensor(lengths), (40, 40)), mask)
    assert stem.token_mask([0, 99], (40, 40)).sum(1).tolist() == [0, mask.shape[1]]


@pytest.mark.parametrize(
    ("lengths", "error", "words"),
    [
        ([1.5], TypeError, r"lengths: expected integers \(frames\), got torch\.float32"),
        ([True], TypeError, r"lengths: expected integers \(frames\), got torch\.bool"),
        (16, ValueError, r"lengths: expected shape \(batch\), got \(\)"),
        (None, TypeError, r"lengths: expected a tensor or a sequence of integers \(frames\), got None"),
    ],
)
def test_bad_lengths(lengths, error, words):
    with pytest.raises(error, match=words):
        small().token_mask(lengths, (40, 40))


@pytest.mark.parametrize(
    ("size", "error", "words"),
    [
        (None, TypeError, "img_size: expected an int or two of them, got None"),
        ((40, 40, 40), TypeError, r"img_size: expected an int or two of them, got \(40, 40, 40\)"),
        ((40, 1), ValueError, r"img_size: expected at least one patch, .*got \(40, 1\)"),
    ],
)
def test_bad_sizes_of_a_mask(size, error, words):
    with pytest.raises(error, match=words):
        small().token_mask([40], size)
