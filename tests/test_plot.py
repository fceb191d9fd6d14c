"""What `aape_kernels.plot` draws is what the stem responds, in Hz and ms."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from aape_kernels import AaPE, replace_stem

pyplot = pytest.importorskip("matplotlib.pyplot")
plot = pytest.importorskip("aape_kernels.plot")

HOP = 0.008
STEMS = {
    "default": {},
    "overlap, time first": {"layout": "TF", "patch_size": (12, 16), "stride": (8, 10), "window": 24},
    "two channels, padded": {"in_chans": 2, "dynamic_img_pad": True, "patch_size": (16, 14)},
    "from 0 Hz": {"band": (0.0, 2.0), "kernel": "bilateral"},
    "one state": {"num_states": 1, "features": "complex"},
}


@pytest.fixture(autouse=True)
def _close():
    yield
    pyplot.close("all")


def make(**options) -> AaPE:
    """A stem whose encoder moves every state from patch to patch."""
    stem = AaPE(embed_dim=4, **options)
    nn.init.normal_(stem.encoder.w2, std=0.5)
    return stem


def clip(stem: AaPE, frames: int = 100) -> torch.Tensor:
    x = torch.randn(stem.in_chans, 64, frames)
    return x if stem.layout == "FT" else x.mT


def strongest(stem: AaPE, x: torch.Tensor) -> tuple[np.ndarray, ...]:
    """Of every patch, frequency-major: Hz, seconds and energy, patch by patch from `stem.responses`."""
    heard = stem.responses(x[None])
    rows = []
    for frequency, decay, y in zip(
        heard.frequency.flatten(0, 2), heard.decay.flatten(0, 2), heard.y.flatten(0, 2), strict=True
    ):
        energy = (y**2).sum(0)
        state = energy.argmax()
        rows.append((frequency[state] / (2 * math.pi * HOP), HOP / decay[state], energy[state]))
    return tuple(np.array(rows, dtype=np.float64).T)


def dots_and_bars(axes):
    bars, dots = axes.collections
    return dots, np.array(bars.get_segments())


@pytest.mark.parametrize("options", STEMS.values(), ids=STEMS.keys())
@pytest.mark.parametrize("given", [False, True], ids=["own figure", "given axes"])
def test_what_is_drawn_is_the_strongest_state(options, given):
    stem = make(**options)
    x = clip(stem)
    mine = pyplot.subplots(figsize=(8, 4))[1] if given else None
    axes = plot.responses(stem, x, HOP, start=1.5, axes=mine)
    assert mine is None or axes is mine
    hz, seconds, energy = strongest(stem, x)
    dots, bars = dots_and_bars(axes)
    size = 1 + 10 * np.log10(energy / energy.max()) / 30
    seen = size > 0
    assert seen.sum() > 0.5 * len(seen)

    (_, bar) = axes.figure.axes
    low, high = bar.get_ylim()
    assert (low, high) == pytest.approx([edge / (2 * math.pi * HOP) for edge in stem.band])
    assert bar.get_yscale() == ("log" if low > 0 else "linear")
    position = (np.log(hz / low) / np.log(high / low)) if low > 0 else (hz - low) / (high - low)
    np.testing.assert_allclose(dots.get_facecolor(), plot.MODULATION(position[seen]), atol=0.02)
    np.testing.assert_allclose(dots.get_sizes() / dots.get_sizes().max(), size[seen], atol=1e-3)

    (p_f, s_f), (p_t, s_t) = zip(stem.patch_size, stem.stride, strict=True)
    if stem.layout == "TF":
        p_f, s_f, p_t, s_t = p_t, s_t, p_f, s_f
    n_t = stem.responses(x[None]).decay.shape[2]
    row, column = np.divmod(np.arange(len(hz)), n_t)
    middle = 1.5 + HOP * (column * s_t + p_t / 2)
    np.testing.assert_allclose(dots.get_offsets()[:, 0], middle[seen])
    assert ((dots.get_offsets()[:, 1] - row[seen] * s_f - p_f / 2) / s_f == pytest.approx(0.08)).all()
    np.testing.assert_allclose(bars[..., 0].mean(1), middle[seen])
    reach = np.minimum(seconds, 0.47 * stem.window * HOP)[seen]
    np.testing.assert_allclose(bars[:, 1, 0] - bars[:, 0, 0], 2 * reach, rtol=1e-4)
    shortest, longest = (f"{1e3 * value:.0f}" for value in (seconds.min(), seconds.max()))
    wanted = f"{shortest} ms" if shortest == longest else f"{shortest} … {longest} ms"
    assert f"its decay, ±1/α = {wanted}" in [text.get_text() for text in axes.get_legend().get_texts()]
    # no dot lies outside
    assert axes.get_xlim()[0] <= dots.get_offsets()[:, 0].min()
    assert dots.get_offsets()[:, 0].max() <= axes.get_xlim()[1]
    assert dots.get_offsets()[:, 1].max() <= axes.get_ylim()[1]


@pytest.mark.parametrize("options", STEMS.values(), ids=STEMS.keys())
def test_numbers(options):
    stem = make(**options)
    x = clip(stem)
    found = plot.hear(stem, x, HOP).strongest()
    hz, seconds, energy = strongest(stem, x)
    assert found.hz.shape == stem.responses(x[None]).decay.shape[1:3]
    np.testing.assert_allclose(found.hz.flatten(), hz, rtol=1e-5)
    np.testing.assert_allclose(found.ms.flatten(), 1e3 * seconds, rtol=1e-5)
    np.testing.assert_allclose(found.energy.flatten(), energy, rtol=1e-5)
    slower = plot.hear(stem, x, 2 * HOP).strongest()  # the same frames, twice as far apart
    torch.testing.assert_close(slower.hz, found.hz / 2)
    torch.testing.assert_close(slower.ms, found.ms * 2)
    assert all(map(torch.equal, found, plot.hear(stem, x[None], HOP).strongest()))


@pytest.mark.parametrize("layout", ["FT", "TF"])
def test_background_and_axis(layout):
    stem = make(layout=layout, in_chans=2)
    x = clip(stem)
    log_mel = torch.randn(64, 100)
    (image,) = plot.responses(stem, x).images
    torch.testing.assert_close(torch.tensor(image.get_array()), (x if layout == "FT" else x.mT).mean(0))
    background = log_mel if layout == "FT" else log_mel.mT
    axes = plot.responses(stem, x, background=background, mel_hz=list(range(50, 6450, 100)))
    torch.testing.assert_close(torch.tensor(axes.images[0].get_array()), log_mel)
    # bin n is centred on 50 + 100 n Hz and on n + ½ of the axis
    assert [text.get_text() for text in axes.get_yticklabels()] == ["100", "200", "500", "1,000", "2,000", "4,000"]
    np.testing.assert_allclose(axes.get_yticks(), [1, 2, 5, 10, 20, 40])


def test_frames_in_no_patch_are_hatched():
    assert not plot.responses(make(), torch.randn(1, 64, 96), HOP).patches
    (over,) = plot.responses(make(), torch.randn(1, 64, 100), HOP).patches
    assert (over.get_x(), over.get_width()) == pytest.approx((96 * HOP, 4 * HOP))
    assert not plot.responses(make(dynamic_img_pad=True), torch.randn(1, 64, 100), HOP).patches


@pytest.mark.parametrize("layout", [None, "constrained"])
@pytest.mark.parametrize("inches", [5, 8, 12])
def test_it_fits_the_axes(inches, layout):
    """Neighbours' dots do not meet, and the legend is no wider than the figure."""
    figure, axes = pyplot.subplots(figsize=(inches, 4), layout=layout)
    plot.responses(make(), torch.randn(1, 64, 96), axes=axes)
    figure.draw_without_rendering()
    dots, _ = dots_and_bars(axes)
    across = np.sqrt(dots.get_sizes().max()) * figure.dpi / 72
    assert 0.3 * axes.bbox.height / 4 < across < min(axes.bbox.width / 6, axes.bbox.height / 4)
    assert axes.get_legend().get_window_extent().x1 <= figure.bbox.x1


def test_a_replaced_stem_in_half_precision_and_a_file(tmp_path):
    model = nn.Module()
    model.patch_embed = nn.Conv2d(1, 8, 16, 16, dtype=torch.bfloat16)
    stem = replace_stem(model, layout="FT", num_states=4).patch_embed
    axes = plot.responses(stem, torch.randn(1, 1, 64, 96, dtype=torch.bfloat16, requires_grad=True))
    axes.figure.savefig(tmp_path / "heard.png", dpi=40)
    pixels = pyplot.imread(tmp_path / "heard.png")
    assert pixels.shape[:2] == (200, 480)
    assert pixels.std() > 0.05


def test_silence(tmp_path):
    axes = plot.responses(make(), torch.zeros(1, 64, 96))
    axes.figure.savefig(tmp_path / "heard.png", dpi=40)
    assert len(dots_and_bars(axes)[0].get_offsets()) == 0


X = torch.zeros(1, 64, 96)
BAD = {
    "a model": ({"stem": nn.Linear(2, 2)}, TypeError, "stem: expected an AaPE, got Linear; of a model pass the stem"),
    "an array": ({"x": X.numpy()}, TypeError, r"x: expected a tensor, one clip, \(1, F, T\) .*, got ndarray"),
    "two axes": ({"x": X[0]}, ValueError, r"x: expected one clip, .*, got shape \(64, 96\)"),
    "a batch": ({"x": torch.zeros(2, 1, 64, 96)}, ValueError, r"or \(1, 1, F, T\), got shape \(2, 1, 64, 96\)"),
    "channels": ({"x": torch.zeros(2, 64, 96)}, ValueError, r"x: expected one clip, .*, got shape \(2, 64, 96\)"),
    "too short": ({"x": torch.zeros(1, 64, 15)}, ValueError, "x: expected .*, got"),
    "no numbers": ({"x": X / 0}, ValueError, "x: expected finite values, got 6144 that are not"),
    "hop": ({"hop": 0}, ValueError, "hop: expected a positive number of seconds, got 0"),
    "background's type": ({"background": [[0.0]]}, TypeError, "background: expected a tensor or None, got list"),
    "background's shape": ({"background": X}, ValueError, r"background: expected shape \(64, 96\), as x, got \(1, 64"),
    "too few bins": ({"mel_hz": [1.0, 2.0]}, ValueError, r"mel_hz: expected 64 rising .*, got shape \(2,\)"),
    "falling": ({"mel_hz": range(64, 0, -1)}, ValueError, "mel_hz: expected 64 rising .*, got ones that do not"),
    "start": ({"start": math.nan}, ValueError, "start: expected a finite number of seconds, got nan"),
    "axes": ({"axes": [None]}, TypeError, "axes: expected matplotlib's Axes or None, got list"),
}


@pytest.mark.parametrize(("given", "kind", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input(given, kind, message):
    with pytest.raises(kind, match=message):
        plot.responses(**{"stem": make(), "x": X, **given})
    assert not pyplot.get_fignums()


def test_without_matplotlib():
    code = "import sys; sys.modules['matplotlib'] = None\nimport aape_kernels.plot"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ImportError: aape_kernels.plot needs matplotlib: pip install matplotlib" in run.stderr
