import pytest
from cases import cases
from hypothesis import given

from aape_kernels.geometry import PatchGrid


def test_defaults():
    assert PatchGrid.make(16) == PatchGrid((16, 16), (16, 16), 16)
    assert PatchGrid.make((16, 4), [8, 2], 6) == PatchGrid((16, 4), (8, 2), 6)


@given(case=cases())
def test_token_grid_is_all_patches_that_fit(case):
    grid = PatchGrid.make(case.patch, case.stride, case.window)
    for axis, count in enumerate(grid.tokens(*case.size)):
        starts = range(0, case.size[axis] - case.patch[axis] + 1, case.stride[axis])
        assert count == len(starts)


@given(case=cases())
def test_window_is_centred_on_the_patch(case):
    grid = PatchGrid.make(case.patch, case.stride, case.window)
    first, last = grid.offset, grid.offset + grid.window - 1
    assert first + last == 0 + (case.patch[1] - 1)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((0,), ValueError, "patch_size: expected sizes of at least 1, got 0"),
        (((16, -1),), ValueError, r"patch_size: expected sizes of at least 1, got \(16, -1\)"),
        (((16, 16, 16),), TypeError, r"patch_size: expected an int or two of them, got \(16, 16, 16\)"),
        ((16.0,), TypeError, r"patch_size: expected an int or two of them, got 16\.0"),
        (("16",), TypeError, "patch_size: expected an int or two of them, got '16'"),
        ((True,), TypeError, "patch_size: expected an int or two of them, got True"),
        ((16, 0), ValueError, "stride: expected sizes of at least 1, got 0"),
        ((16, None, 15), ValueError, "window: expected a positive even number of frames.*16 frames long, got 15"),
        (((16, 5), None, 4), ValueError, "window: expected a positive odd number of frames.*5 frames long, got 4"),
        ((16, None, 0), ValueError, "window: expected a positive even number of frames.*got 0"),
        ((16, None, 16.0), TypeError, r"window: expected an int \(frames\) or None, got 16\.0"),
    ],
)
def test_bad_sizes(arguments, error, words):
    with pytest.raises(error, match=words):
        PatchGrid.make(*arguments)
