"""One picture a clip: what the stem's states found in every patch. Matplotlib's object interface, no global state."""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
import torch
from anyascii import anyascii
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Colormap, LinearSegmentedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import NullLocator

from aape_kernels import AaPE

from ..sound.audio import FrontEnd
from .stems import Responses, kernels, strongest_frequency

__all__ = ["DPI", "HEIGHT", "PATCHES", "distinct_states", "draw", "drawable", "save", "shortened", "width_inches"]

DPI = 120
HEIGHT = 9.0  # inches
PATCHES = 200  # along time, of one picture: as many as can be told apart in 36 inches
RANGE = 30.0  # dB below the clip's strongest patch at which a dot vanishes
GREYS = LinearSegmentedColormap.from_list("pale greys", ["#ffffff", "#8c8c8c"])
INK, FAINT = "#222222", "#6b6b6b"


def _colours() -> Colormap:
    """Plasma without its palest end, which is lost on white; it reads in order for the colour-blind and in grey."""
    from matplotlib import colormaps

    return LinearSegmentedColormap.from_list("modulation", colormaps["plasma"](np.linspace(0.0, 0.86, 256)))


def width_inches(patches: int) -> float:
    """Wide enough for 0.17 inch a patch along time, up to 36 inches."""
    return min(36.0, max(12.0, 2.3 + 0.17 * patches))


def draw(
    log_mel: torch.Tensor,
    front_end: FrontEnd,
    stem: AaPE,
    responses: Responses,
    name: str,
    label: str,
    start: float = 0.0,
) -> Figure:
    """The picture of a clip.

    Args:
        log_mel: (F, T), the background.
        front_end: what made it; for the axes.
        stem: for its grid, window, kernel and band.
        responses: of the stem to the clip.
        name, label: the clip's and the stem's, for the title.
        start: seconds at which the clip was begun to be looked at, for the time axis.

    Above, over the spectrogram, a dot in each patch for the state with the most energy |y_s|²: its colour is the
    state's frequency, its area the energy in dB, the bar under it ±1/α on the time axis. Below, left, the energy of
    all patches and states over frequency; right, the kernels of the strongest states.

    White rows low in the spectrogram are mel filters (nearly) without power: of 128 filters those below some 200 Hz
    are narrower than the 31.25 Hz between the Fourier transform's frequencies, which hit its edge or miss it.
    """
    hop = front_end.hop
    band = (stem.band[0] / (2 * math.pi * hop), stem.band[1] / (2 * math.pi * hop))
    # a band that reaches 0 Hz has no place on a logarithmic scale
    norm = LogNorm(*band) if band[0] > 0 else Normalize(*band)
    scale = ScalarMappable(norm, _colours())

    figure = Figure(figsize=(width_inches(responses.energy.shape[1]), HEIGHT), dpi=DPI)
    FigureCanvasAgg(figure)
    width = figure.get_figwidth()
    left, right = 0.85 / width, 1 - 1.75 / width
    title: dict[str, Any] = {"color": INK, "va": "center", "parse_math": False}
    figure.text(left, 0.965, drawable(name), fontsize=17, weight="bold", **title)
    figure.text(right, 0.965, drawable(shortened(label)), fontsize=12, ha="right", **title)

    top = figure.add_axes((left, 0.43, right - left, 0.445))
    _spectrogram(top, log_mel, front_end, start)
    _strongest_states(figure, top, stem, responses, hop, scale, start)
    _left_over(top, log_mel.shape[1], stem, hop, start)
    bar = figure.add_axes((1 - 0.95 / width, 0.43, 0.2 / width, 0.445))
    _colour_bar(figure, bar, scale, band)

    gap = 0.9 / width
    panel = min((right - left - gap) / 2, 6 / width)
    alias_prone = np.allclose(stem.band, (math.pi / stem.stride[1], math.pi))
    _energy_over_frequency(figure.add_axes((left, 0.075, panel, 0.25)), responses, band, alias_prone, scale)
    _kernels(figure, (left + panel + gap, 0.075, panel, 0.25), stem, responses, hop, scale)
    return figure


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a picture as PNG. Errors: `OSError` if `path` cannot be written."""
    figure.savefig(path, format="png")


def shortened(text: str, length: int = 48) -> str:
    """For a title."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def drawable(text: str) -> str:
    """With what the font has no glyph for in Latin letters."""
    has = get_font(findfont(FontProperties())).get_charmap()
    return "".join(letter if ord(letter) in has else anyascii(letter) or "?" for letter in text)


def _spectrogram(axes: Axes, log_mel: torch.Tensor, front_end: FrontEnd, start: float) -> None:
    bins, frames = log_mel.shape
    values = log_mel.numpy()
    end = start + frames * front_end.hop
    low, high = np.quantile(values, [0.02, 0.998])
    axes.imshow(
        values,
        cmap=GREYS,
        vmin=low,
        vmax=max(high, low + 1e-3),
        origin="lower",
        aspect="auto",
        extent=(start, end, 0, bins),
    )
    centres = front_end.centres().numpy()
    hz = [hz for hz in (100, 200, 500, 1000, 2000, 4000) if centres[0] < hz < centres[-1]]
    axes.set_yticks(np.interp(hz, centres, np.arange(bins) + 0.5), [f"{value:,}" for value in hz])
    axes.set_ylabel("frequency (Hz), centre of mel bin")
    axes.set_xlabel("time (s)")
    axes.set_xlim(start, end)


def _left_over(axes: Axes, frames: int, stem: AaPE, hop: float, start: float) -> None:
    """Mark the frames at the end that are too few for a patch."""
    end = (frames - stem.patch_size[1]) // stem.stride[1] * stem.stride[1] + stem.patch_size[1]
    if end < frames:
        axes.axvspan(
            start + end * hop, start + frames * hop, facecolor="none", edgecolor=FAINT, hatch="////", linewidth=0
        )
        axes.text(
            start + frames * hop, 1.01, "in no patch", transform=axes.get_xaxis_transform(), fontsize=9, ha="right"
        )


def _strongest_states(
    figure: Figure,
    axes: Axes,
    stem: AaPE,
    responses: Responses,
    hop: float,
    scale: ScalarMappable,
    start: float,
) -> None:
    (p_f, p_t), (s_f, s_t) = stem.patch_size, stem.stride
    energy, state = responses.energy.max(-1)  # [N_f, N_t]
    n_f, n_t = energy.shape
    hz = responses.hz.gather(-1, state.unsqueeze(-1)).flatten().numpy()
    reach = 1 / responses.decay.gather(-1, state.unsqueeze(-1)).flatten().numpy()  # s
    level = 10 * np.log10(np.maximum(energy.flatten().numpy() / max(float(energy.max()), 1e-30), 1e-30))
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
    box = axes.get_position()
    frame = box.width * figure.get_figwidth() * 72 / ((limits[1] - start) / hop)  # points a frame
    mel_bin = box.height * figure.get_figheight() * 72 / axes.get_ylim()[1]  # points a mel bin
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
    mel = axes.twinx()
    mel.set_ylim(axes.get_ylim())
    mel.set_yticks([edge * s_f for edge in range(n_f + 1)])
    mel.set_ylabel("mel bin")

    dots = [
        Line2D([], [], marker="o", linestyle="none", color=FAINT, markersize=largest * math.sqrt(1 - below / RANGE))
        for below in (0, 10, 20)
    ]
    handles: list[Any] = [*dots, Line2D([], [], color=FAINT, linewidth=1.8), Patch(facecolor="#a0a0a0")]
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
        ncols=5,
        frameon=False,
        borderaxespad=0.3,
        handletextpad=0.6,
        columnspacing=1.4,
        fontsize=10,
    )


def _range_ms(seconds: np.ndarray[Any, Any]) -> str:
    low, high = (f"{1e3 * value:.0f}" for value in (seconds.min(), seconds.max()))
    return f"{low} ms" if low == high else f"{low} … {high} ms"


def _band_ticks(band: tuple[float, float]) -> list[float]:
    """The band's edges and the octaves of its lower edge, or round steps where it starts at 0 Hz."""
    low, high = band
    inside = [low * 2**n for n in range(1, 12)] if low > 0 else [high * n / 4 for n in range(1, 4)]
    return [low, *(hz for hz in inside if hz < 0.8 * high), high]


def _colour_bar(figure: Figure, axes: Axes, scale: ScalarMappable, band: tuple[float, float]) -> None:
    bar = figure.colorbar(scale, cax=axes)
    ticks = _band_ticks(band)
    names = [f"{hz:.4g}" for hz in ticks]
    bar.set_ticks(ticks, labels=names)
    bar.ax.yaxis.set_minor_locator(NullLocator())
    for tick, hz in zip(bar.ax.get_yticklabels(), ticks, strict=True):
        if hz in band:
            tick.set_fontweight("bold")
    bar.set_label("state's frequency (Hz)")
    for height, va in ((-0.02, "top"), (1.02, "bottom")):
        axes.text(0, height, "band edge", transform=axes.transAxes, va=va, fontsize=9.5, color=INK)


def _energy_over_frequency(
    axes: Axes, responses: Responses, band: tuple[float, float], alias_prone: bool, scale: ScalarMappable
) -> None:
    states = responses.energy.shape[-1]
    edges = np.linspace(*band, states + 1)
    energy, _ = np.histogram(responses.hz.flatten().numpy(), edges, weights=responses.energy.flatten().double().numpy())
    share = 100 * energy / max(energy.sum(), 1e-30)
    centres = (edges[:-1] + edges[1:]) / 2
    axes.bar(centres, share, 0.86 * np.diff(edges), color=scale.to_rgba(centres))
    peak = float(share.max())
    axes.set_ylim(0, 1.32 * max(peak, 1e-3))
    margin = 0.045 * (band[1] - band[0])
    axes.set_xlim(band[0] - margin, band[1] + margin)
    for edge in band:
        axes.axvline(edge, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.annotate(
        "alias-prone band" if alias_prone else "band",
        ((band[0] + band[1]) / 2, 0.955),
        xycoords=("data", "axes fraction"),
        ha="center",
        va="top",
        color=INK,
    )
    axes.annotate(
        "",
        (band[0], 0.865),
        (band[1], 0.865),
        xycoords=("data", "axes fraction"),
        arrowprops={"arrowstyle": "<->", "color": INK, "shrinkA": 0, "shrinkB": 0},
    )
    strongest = strongest_frequency(responses)
    tens = [hz for hz in range(10, math.ceil(band[1]), 10) if band[0] + margin < hz < band[1] - margin]
    axes.set_xticks([band[0], *tens, band[1]], [f"{hz:.4g}" for hz in (band[0], *tens, band[1])])
    axes.set_xlabel("state's frequency (Hz)")
    axes.set_ylabel("energy, all patches (%)")
    axes.set_title(f"Energy over frequency: strongest state at {strongest:.1f} Hz", fontsize=11, loc="left")
    _open(axes)


def distinct_states(responses: Responses, count: int = 4) -> list[int]:
    """The strongest states whose filters differ: apart by the wider one's half width at half height, α/2π Hz."""
    energy = responses.energy.flatten(0, 1).sum(0)
    weight = responses.energy.flatten(0, 1) / energy.clamp_min(1e-30)
    hz = (weight * responses.hz.flatten(0, 1)).sum(0)
    width = (weight * responses.decay.flatten(0, 1)).sum(0) / (2 * math.pi)
    chosen: list[int] = []
    for state in energy.argsort(descending=True).tolist():
        if all(abs(hz[state] - hz[other]) >= max(width[state], width[other]) for other in chosen):
            chosen.append(state)
    return chosen[:count]


def _kernels(
    figure: Figure,
    box: tuple[float, float, float, float],
    stem: AaPE,
    responses: Responses,
    hop: float,
    scale: ScalarMappable,
) -> None:
    """Kernels of the strongest states, each as it stands in the patch where that state has the most energy."""
    states = distinct_states(responses)
    flat = [plane.flatten(0, 1) for plane in (responses.energy, responses.hz, responses.decay)]
    where = flat[0][:, states].argmax(0)
    hz, decay = (plane[where, states] for plane in flat[1:])
    h = kernels(decay * hop, 2 * math.pi * hz * hop, stem.window, stem.kernel).numpy()
    ms = (np.arange(stem.window) - (stem.window - 1) / 2) * hop * 1e3
    limit = 1.1 * float(np.abs(h).max())
    left, bottom, width, height = box
    height *= 0.88  # the rest is the heading's
    real: dict[str, Any] = {"marker": "o", "markersize": 3, "linewidth": 1.6}
    imaginary: dict[str, Any] = {**real, "linewidth": 1.2, "linestyle": (0, (3, 2)), "markerfacecolor": "white"}
    figure.text(left, box[1] + box[3] + 0.008, "Strongest kernels h(d)", fontsize=11, va="bottom")
    figure.legend(
        [Line2D([], [], color=INK, **style) for style in (real, imaginary)],
        ["real", "imaginary"],
        loc="lower right",
        bbox_to_anchor=(left + width, box[1] + box[3] + 0.006),
        ncols=2,
        frameon=False,
        borderpad=0,
        borderaxespad=0,
    )
    for n, (state, planes) in enumerate(zip(states, h, strict=True)):
        share = float(flat[0][:, state].sum() / flat[0].sum().clamp_min(1e-30))
        column, row = n % 2, n // 2
        axes = figure.add_axes(
            (left + 0.52 * width * column, bottom + 0.56 * height * (1 - row), 0.48 * width, 0.44 * height)
        )
        colour = scale.to_rgba(hz[n : n + 1].numpy())[0]
        axes.axhline(0, color="#c8c8c8", linewidth=0.8)
        axes.plot(ms, planes[0], color=colour, **real)
        axes.plot(ms, planes[1], color=colour, **imaginary)
        axes.set_ylim(-limit, limit)
        axes.set_title(
            f"{hz[n]:.1f} Hz, 1/α = {1e3 / decay[n]:.0f} ms ({100 * share:.0f} %)", fontsize=9.5, loc="left", pad=2
        )
        axes.tick_params(labelbottom=row == 1 or n + 2 >= len(states), labelleft=column == 0, labelsize=8.5)
        if row == 1 or len(states) <= 2:
            axes.set_xlabel("d (ms)")
        if column == 0:
            axes.set_ylabel("h(d)")
        _open(axes)


def _open(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
