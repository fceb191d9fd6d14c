"""What a stem hears in a clip, as a picture: over the spectrogram, the strongest state of every patch, in Hz and ms.

Needs matplotlib, which importing `aape_kernels` does not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .ranges import check_hop
from .stem import AaPE

try:
    from matplotlib import colormaps
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.collections import LineCollection
    from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.ticker import NullLocator
except ImportError as error:
    raise ImportError("aape_kernels.plot needs matplotlib: pip install matplotlib") from error

__all__ = ["FAINT", "INK", "MARGINS", "Heard", "Strongest", "band_hz", "draw", "hear", "responses", "width_inches"]

RANGE = 30.0  # dB below the clip's strongest patch at which a dot vanishes
INK, FAINT = "#222222", "#6b6b6b"
GREYS = LinearSegmentedColormap.from_list("pale greys", ["#ffffff", "#8c8c8c"])
# plasma without its palest end, which is lost on white; it reads in order for the colour-blind and in grey
MODULATION = LinearSegmentedColormap.from_list("modulation", colormaps["plasma"](np.linspace(0.0, 0.86, 256)))
MARGINS = (0.85, 1.75)  # inches to the left of the spectrogram, and to its right, where the colour bar stands
LEGEND = {5: 9.0, 3: 6.3}  # inches that the legend takes in so many columns


class Strongest(NamedTuple):
    """The state with the most energy in each patch, (N_f, N_t) each; where nothing responds, the first.

    Attributes:
        hz: its frequency, ω/(2π · hop).
        ms: its decay as the time in which the window falls to 1/e, to either side: 1000 · hop/α.
        energy: |y|².
    """

    hz: Tensor
    ms: Tensor
    energy: Tensor


@dataclass(frozen=True)
class Heard:
    """How each state of each patch responded to a clip, in Hz and seconds, (N_f, N_t, S) each.

    Attributes:
        energy: |y_s|².
        hz: the state's frequency, ω/(2π · hop).
        decay: α in 1/s; 1/α is the time in which the window falls to 1/e, to either side.
    """

    energy: Tensor
    hz: Tensor
    decay: Tensor

    def between(self, first: int, last: int) -> Heard:
        """The part for the patches of time steps `first` to `last`, exclusive."""
        return Heard(*(plane[:, first:last] for plane in (self.energy, self.hz, self.decay)))

    def strongest(self) -> Strongest:
        """The state with the most energy in each patch."""
        energy, state = self.energy.max(-1, keepdim=True)
        hz, decay = (plane.gather(-1, state).squeeze(-1) for plane in (self.hz, self.decay))
        return Strongest(hz, 1e3 / decay, energy.squeeze(-1))


def hear(stem: AaPE, x: Tensor, hop: float = 0.01) -> Heard:
    """`stem.responses` of one clip in Hz and seconds, on the CPU: what `responses` draws, as numbers.

    Args:
        stem: the stem.
        x: its input, (C, F, T) or (1, C, F, T); (C, T, F) or (1, C, T, F) for layout "TF".
        hop: seconds from one frame to the next.

    Returns:
        energy, hz and decay (N_f, N_t, S), whatever the layout.

    Errors: as `responses`. Source: ours.

    Examples:
        >>> hear(AaPE(embed_dim=8), torch.randn(1, 128, 96)).strongest().hz.shape
        torch.Size([8, 6])
    """
    x, hop = _one_clip(stem, x), check_hop(hop)
    heard = stem.responses(x)
    energy, frequency, decay = (plane[0].cpu() for plane in (heard.y.square().sum(-2), heard.frequency, heard.decay))
    return Heard(energy, frequency / (2 * math.pi * hop), decay / hop)


def responses(
    stem: AaPE,
    x: Tensor,
    hop: float = 0.01,
    *,
    background: Tensor | None = None,
    mel_hz: Sequence[float] | Tensor | None = None,
    start: float = 0.0,
    axes: Axes | None = None,
) -> Axes:
    """Draw what a stem hears in one clip: the spectrogram, and in each patch the state with the most energy.

        s = argmax |y_s|²,   ω_s/(2π · hop) in Hz,   1000 · hop/α_s in ms

    The dot in each patch shows the frequency by its colour and the energy in dB, down to 30 below the clip's strongest,
    by its area; the bar under it is ±1/α on the time axis, no longer than the filter's window. Frames at the end that
    are too few for a patch are hatched. `hear` returns the numbers.

    A freshly made stem listens with random weights, and its slowest states respond most to an unprepared log-mel, since
    a clip's level changes slowly. `aape-ssl demo` therefore uses `aape_ssl.demo.stems.untrained_stem` and
    `aape_ssl.sound.audio.remove_level` to look at sound before there is a trained stem.

    Args:
        stem: the stem; for a model that `replace_stem` changed, the module that took the convolution's place.
        x: its input, (C, F, T) or (1, C, F, T); (C, T, F) or (1, C, T, F) for layout "TF".
        hop: seconds from one frame to the next.
        background: drawn in grey: (F, T), or (T, F) for layout "TF"; x's mean over channels unless given.
        mel_hz: centres of the F mel bins in Hz, for the axis, which counts mel bins unless given.
        start: seconds at which the clip begins, for the axis.
        axes: to draw into; the colour bar takes a part of them. Unless given, those of a new pyplot figure, wider for
            longer clips.

    Returns:
        The axes of the spectrogram; `.figure.savefig(...)` writes them.

    Errors: `TypeError` or `ValueError` naming the argument, what was expected and what came. Source: ours.

    Examples:
        >>> axes = responses(AaPE(embed_dim=8), torch.randn(1, 128, 96), hop=0.01)
        >>> axes.get_xlabel()
        'time (s)'
    """
    heard = hear(stem, x, hop)
    shown = x.detach().flatten(0, -3).float().mean(0) if background is None else _background(background, x)
    shown = (shown if stem.layout == "FT" else shown.mT).cpu()
    if mel_hz is not None:
        mel_hz = _centres(mel_hz, len(shown))
    if isinstance(start, bool) or not isinstance(start, int | float) or not math.isfinite(start):
        raise ValueError(f"start: expected a finite number of seconds, got {start!r}")
    if axes is not None and not isinstance(axes, Axes):
        raise TypeError(f"axes: expected matplotlib's Axes or None, got {type(axes).__name__}")

    bar = None
    if axes is None:
        axes, bar = _figure(heard.energy.shape[1])
    draw(axes, stem, shown, heard, hop, mel_hz, start, bar)
    return axes


def draw(
    axes: Axes,
    stem: AaPE,
    log_mel: Tensor,
    heard: Heard,
    hop: float,
    mel_hz: Tensor | None = None,
    start: float = 0.0,
    bar: Axes | None = None,
) -> ScalarMappable:
    """Draw what `responses` draws, from arguments that are computed already and not checked.

    Args:
        axes: for the spectrogram, already at their final place and size.
        stem: for its grid, window and band.
        log_mel: (F, T), the background.
        heard: the stem's responses to the clip, or to a part of it.
        hop, mel_hz, start: as in `responses`.
        bar: axes for the colour bar, which takes a part of `axes` unless given.

    Returns: the mapping from frequencies in Hz to colours.
    """
    band = band_hz(stem, hop)
    # a band that reaches 0 Hz has no place on a logarithmic scale
    scale = ScalarMappable(LogNorm(*band) if band[0] > 0 else Normalize(*band), MODULATION)
    _spectrogram(axes, log_mel, hop, mel_hz, start)
    # with padding, the last patches reach beyond the clip
    height, width = stem._grid.extent(*heard.energy.shape[:2])
    axes.set_xlim(start, start + max(log_mel.shape[1], width) * hop)
    axes.set_ylim(0, max(log_mel.shape[0], height))
    _mel_bins(axes if mel_hz is None else axes.twinx(), axes.get_ylim(), stem, heard.energy.shape[0])
    _colour_bar(axes, bar, scale, band, 0.15 if mel_hz is None else 0.75)
    if isinstance(axes.figure, Figure) and axes.figure.get_layout_engine() is not None:
        axes.figure.draw_without_rendering()  # dots and legend follow from the size that the axes now get
    _strongest_states(axes, stem, heard, hop, scale, start)
    _left_over(axes, log_mel.shape[1], stem, hop, start)
    return scale


def band_hz(stem: AaPE, hop: float) -> tuple[float, float]:
    """The stem's frequency band in Hz, for frames `hop` seconds apart."""
    return stem.band[0] / (2 * math.pi * hop), stem.band[1] / (2 * math.pi * hop)


def width_inches(patches: int) -> float:
    """Wide enough for 0.17 inch per patch along time, up to 36 inches."""
    return min(36.0, max(12.0, 2.3 + 0.17 * patches))


def _one_clip(stem: AaPE, x: Tensor) -> Tensor:
    """x as a batch of one."""
    if not isinstance(stem, AaPE):
        raise TypeError(
            f"stem: expected an AaPE, got {type(stem).__name__}; of a model pass the stem in it, such as "
            "model.patch_embed.proj after replace_stem(model)"
        )
    order = "F, T" if stem.layout == "FT" else "T, F"
    expected = f"one clip, ({stem.in_chans}, {order}) or (1, {stem.in_chans}, {order})"
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor, {expected}, got {type(x).__name__}")
    if x.dim() not in (3, 4) or (x.dim() == 4 and len(x) != 1) or x.shape[-3] != stem.in_chans:
        raise ValueError(f"x: expected {expected}, got shape {tuple(x.shape)}")
    if not bool(x.isfinite().all()):
        raise ValueError(f"x: expected finite values, got {int((~x.isfinite()).sum())} that are not")
    return x if x.dim() == 4 else x.unsqueeze(0)


def _background(background: object, x: Tensor) -> Tensor:
    if not isinstance(background, Tensor):
        raise TypeError(f"background: expected a tensor or None, got {type(background).__name__}")
    if background.shape != x.shape[-2:]:
        raise ValueError(f"background: expected shape {tuple(x.shape[-2:])}, as x, got {tuple(background.shape)}")
    return background.detach().float()


def _centres(mel_hz: Sequence[float] | Tensor, bins: int) -> Tensor:
    if not isinstance(mel_hz, Tensor | Sequence) or isinstance(mel_hz, str | bytes):
        raise TypeError(f"mel_hz: expected a tensor or a sequence of frequencies in Hz, got {mel_hz!r}")
    centres = torch.as_tensor(mel_hz, dtype=torch.float64).detach().cpu()
    if centres.shape != (bins,) or not bool((centres.diff() > 0).all()):
        got = f"shape {tuple(centres.shape)}" if centres.shape != (bins,) else "ones that do not rise"
        raise ValueError(f"mel_hz: expected {bins} rising frequencies in Hz, one a mel bin, got {got}")
    return centres


def _figure(patches: int) -> tuple[Axes, Axes]:
    """A new figure's axes, for the spectrogram and for the colour bar."""
    from matplotlib import pyplot

    width, height = width_inches(patches), 5.0
    figure = pyplot.figure(figsize=(width, height))
    left, right, bottom, tall = MARGINS[0] / width, 1 - MARGINS[1] / width, 0.6 / height, 3.8 / height
    axes = figure.add_axes((left, bottom, right - left, tall))
    bar = figure.add_axes((1 - 0.95 / width, bottom, 0.2 / width, tall))
    pyplot.sca(axes)
    return axes, bar


def _spectrogram(axes: Axes, log_mel: Tensor, hop: float, mel_hz: Tensor | None, start: float) -> None:
    bins, frames = log_mel.shape
    values = log_mel.numpy()
    low, high = np.quantile(values, [0.02, 0.998])
    axes.imshow(
        values,
        cmap=GREYS,
        vmin=low,
        vmax=max(high, low + 1e-3),
        origin="lower",
        aspect="auto",
        extent=(start, start + frames * hop, 0, bins),
    )
    axes.set_xlabel("time (s)")
    if mel_hz is not None:
        centres = mel_hz.numpy()
        hz = [hz for hz in (100, 200, 500, 1000, 2000, 4000, 8000, 16000) if centres[0] < hz < centres[-1]]
        axes.set_yticks(np.interp(hz, centres, np.arange(bins) + 0.5), [f"{value:,}" for value in hz])
        axes.set_ylabel("frequency (Hz), centre of mel bin")


def _mel_bins(axes: Axes, limits: tuple[float, float], stem: AaPE, rows: int) -> None:
    """Mark where the rows of patches begin, on the y axis."""
    axes.set_ylim(limits)
    axes.set_yticks([edge * stem._grid.stride[0] for edge in range(rows + 1)])
    axes.set_ylabel("mel bin")


def _left_over(axes: Axes, frames: int, stem: AaPE, hop: float, start: float) -> None:
    """Mark the frames at the end that are too few for a patch."""
    patch, stride = stem._grid.patch[1], stem._grid.stride[1]
    end = (frames - patch) // stride * stride + patch
    if end < frames and not stem.dynamic_img_pad:
        axes.axvspan(
            start + end * hop, start + frames * hop, facecolor="none", edgecolor=FAINT, hatch="////", linewidth=0
        )
        axes.text(
            start + (end + frames) / 2 * hop, 0.5, "in no patch", transform=axes.get_xaxis_transform(), fontsize=8,
            rotation=90, ha="center", va="center", bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )  # fmt: skip


def _strongest_states(axes: Axes, stem: AaPE, heard: Heard, hop: float, scale: ScalarMappable, start: float) -> None:
    (p_f, p_t), (s_f, s_t) = stem._grid.patch, stem._grid.stride
    hz, ms, energy = (plane.numpy() for plane in heard.strongest())  # [N_f, N_t]
    n_f, n_t = energy.shape
    hz, reach = hz.flatten(), ms.flatten() / 1e3
    level = 10 * np.log10(np.maximum(energy.flatten() / max(float(energy.max()), 1e-30), 1e-30))
    size = np.clip(1 + level / RANGE, 0, 1)

    i, j = np.divmod(np.arange(n_f * n_t), n_t)
    x = start + (j * s_t + p_t / 2) * hop
    y = i * s_f + 0.5 * p_f

    for edge in range(n_f + 1):
        axes.axhline(edge * s_f, color="white", linewidth=0.8)
    if n_t <= 80:
        for edge in range(n_t + 1):
            axes.axvline(start + edge * s_t * hop, color="white", linewidth=0.8)

    limits = axes.get_xlim()
    width, height = (side / axes.figure.dpi for side in (axes.bbox.width, axes.bbox.height))  # inches
    frame = width * 72 / ((limits[1] - start) / hop)  # points per frame
    mel_bin = height * 72 / axes.get_ylim()[1]  # points per mel bin
    largest = min(0.9 * s_t * frame, 0.58 * s_f * mel_bin)  # points across
    seen = size > 0
    colours = scale.to_rgba(hz)
    shown = np.minimum(reach, 0.47 * stem.window * hop)  # beyond the window there is no kernel
    bars = [[(a - r, b), (a + r, b)] for a, b, r in zip(x[seen], y[seen] - 0.36 * s_f, shown[seen], strict=True)]
    axes.add_collection(LineCollection(bars, colors=colours[seen], linewidths=1.8, capstyle="butt"))
    axes.scatter(
        x[seen],
        y[seen] + 0.08 * s_f,
        s=largest**2 * size[seen],
        c=colours[seen],
        edgecolors="white",
        linewidths=0.5,
        zorder=3,
    )
    axes.set_xlim(*limits)
    _legend(axes, largest, reach, width)


def _legend(axes: Axes, largest: float, reach: np.ndarray[Any, Any], width: float) -> None:
    """Say above the axes what dots of some energies, at most `largest` points across, bars and greys stand for."""
    dots = [
        Line2D([], [], marker="o", linestyle="none", color=FAINT, markersize=largest * math.sqrt(1 - below / RANGE))
        for below in (0, 10, 20)
    ]
    handles: list[Any] = [*dots, Line2D([], [], color=FAINT, linewidth=1.8), Patch(facecolor="#a0a0a0")]
    columns = next((columns for columns, inches in LEGEND.items() if inches <= width), min(LEGEND))
    axes.legend(
        handles,
        [
            "0 dB",
            "−10 dB",
            "−20 dB: energy |y|² of the patch's strongest state",
            f"its decay, ±1/α = {_range_ms(reach)}",
            "log-mel",
        ],
        loc="lower left",
        bbox_to_anchor=(-0.005, 1.0),
        ncols=columns,
        frameon=False,
        borderaxespad=0.3,
        handletextpad=0.6,
        columnspacing=1.4,
        fontsize=min(10.0, 10 * width / LEGEND[columns]),
    )


def _range_ms(seconds: np.ndarray[Any, Any]) -> str:
    low, high = (f"{1e3 * value:.0f}" for value in (seconds.min(), seconds.max()))
    return f"{low} ms" if low == high else f"{low} … {high} ms"


def _band_ticks(band: tuple[float, float]) -> list[float]:
    """The band's edges and the octaves of its lower edge, or round steps where it starts at 0 Hz."""
    low, high = band
    inside = [low * 2**n for n in range(1, 12)] if low > 0 else [high * n / 4 for n in range(1, 4)]
    return [low, *(hz for hz in inside if hz < 0.8 * high), high]


def _colour_bar(
    axes: Axes, bar_axes: Axes | None, scale: ScalarMappable, band: tuple[float, float], inches: float
) -> None:
    """Draw it in its own axes, or in a part of `axes`, so many inches from what is left of them."""
    if bar_axes is None:
        pad = min(inches * axes.figure.dpi / axes.bbox.width, 0.3)
        bar = axes.figure.colorbar(scale, ax=axes, pad=pad)
    else:
        bar = axes.figure.colorbar(scale, cax=bar_axes)
    ticks = _band_ticks(band)
    names = [f"{hz:.4g}" for hz in ticks]
    bar.set_ticks(ticks, labels=names)
    bar.ax.yaxis.set_minor_locator(NullLocator())
    for tick, hz in zip(bar.ax.get_yticklabels(), ticks, strict=True):
        if hz in band:
            tick.set_fontweight("bold")
    bar.set_label("state's frequency (Hz)")
    for height, va in ((-0.02, "top"), (1.02, "bottom")):
        bar.ax.text(0, height, "band edge", transform=bar.ax.transAxes, va=va, fontsize=9.5, color=INK)
