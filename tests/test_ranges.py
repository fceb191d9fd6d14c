import math

import pytest
import torch

from aape_kernels import AaPE, band_from_hz, decay_from_hz


def test_band_of_the_default_patch_in_hz():
    assert AaPE(embed_dim=4).band == pytest.approx(band_from_hz((3.125, 50.0)), rel=1e-15)
    assert AaPE(embed_dim=4, stride=(16, 4)).band == pytest.approx(band_from_hz((12.5, 50.0)), rel=1e-15)
    assert band_from_hz((0, 25.0), hop=0.02) == (0.0, math.pi)


@pytest.mark.parametrize("hop", [0.01, 0.0116, 1 / 62.5, 256 / 22050])
def test_nyquist_itself_is_allowed(hop):
    assert AaPE(embed_dim=4, band=band_from_hz((3, 0.5 / hop), hop)).band[1] == pytest.approx(math.pi, rel=1e-15)


def test_decay_halves_the_spectrum_at_its_bandwidth():
    frames = torch.arange(-40000, 40001, dtype=torch.float64) / 10  # ten to a frame: close to the integral
    for alpha, hz in zip(decay_from_hz((1.0, 20.0)), (1.0, 20.0), strict=True):
        window = torch.exp(-alpha * frames.abs())
        at_bandwidth = (window * torch.cos(2 * math.pi * hz * 0.01 * frames)).sum()
        assert (at_bandwidth / window.sum()).item() == pytest.approx(0.5, abs=2e-3)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: band_from_hz((3, 51)), ValueError, r"hz: expected 0 <= low < high <= 50 Hz .*got \(3, 51\)"),
        (lambda: band_from_hz((5, 5)), ValueError, "hz: expected 0 <= low < high"),
        (lambda: band_from_hz((-1, 5)), ValueError, "hz: expected 0 <= low < high"),
        (lambda: band_from_hz((1, math.nan)), ValueError, "hz: expected finite numbers"),
        (lambda: band_from_hz(5), TypeError, r"hz: expected two numbers \(low, high\), got 5"),
        (lambda: band_from_hz((1, 5), hop=0), ValueError, "hop: expected a positive number of seconds, got 0"),
        (lambda: band_from_hz((1, 5), hop="1"), ValueError, "hop: expected a positive number of seconds, got '1'"),
        (lambda: decay_from_hz((0, 5)), ValueError, "hz: expected 0 < low < high Hz"),
        (lambda: decay_from_hz((5, 1)), ValueError, "hz: expected 0 < low < high Hz"),
    ],
)
def test_bad_values(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_decay_beyond_what_the_gain_of_an_odd_window_holds():
    """2 sinh(α/2)/α is the value of the kernel's middle frame; an even window has none."""
    with pytest.raises(ValueError, match=r"decay: expected at most 160 for the odd window 15, .* got \(1.0, 170.0\)"):
        AaPE(patch_size=15, embed_dim=4, decay=(1.0, 170.0))
    x = torch.randn(1, 1, 15, 30, requires_grad=True)
    stem = AaPE(patch_size=15, embed_dim=4, decay=(159.0, 160.0))
    stem(x).sum().backward()
    assert x.grad.isfinite().all()
    even = AaPE(patch_size=16, embed_dim=4, decay=(1.0, 1e4))
    assert even(torch.randn(1, 1, 16, 32)).isfinite().all()


def test_a_stride_of_one_frame_says_what_band_would_do():
    with pytest.raises(
        ValueError, match=r"band=\(math.pi / 16, math.pi\) is what a stride of .* 16 frames would alias"
    ):
        AaPE(stride=(16, 1))
