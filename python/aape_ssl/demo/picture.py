"""One picture per clip: what the stem's states found in every patch. Matplotlib's object interface, no global state."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from anyascii import anyascii
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.lines import Line2D

from aape_kernels import AaPE
from aape_kernels.plot import INK, MARGINS, Heard, band_hz, width_inches
from aape_kernels.plot import draw as draw_strongest
from aape_kernels.reference import kernels

from ..sound.audio import FrontEnd
from .stems import strongest_frequency

__all__ = ["DPI", "HEIGHT", "PATCHES", "distinct_states", "draw", "drawable", "shortened", "width_inches"]

DPI = 120
HEIGHT = 9.0  # inches
PATCHES = 200  # along time, of one picture: as many as can be told apart in 36 inches


def draw(
    log_mel: torch.Tensor,
    front_end: FrontEnd,
    stem: AaPE,
    responses: Heard,
    name: str,
    label: str,
    start: float = 0.0,
) -> Figure:
    """The picture of a clip.

    Args:
        log_mel: (F, T), the background.
        front_end: the one that made it; for the axes.
        stem: for its grid, window, kernel and band.
        responses: the stem's responses to the clip.
        name, label: the clip's and the stem's, for the title.
        start: seconds into the clip at which `log_mel` begins, for the time axis.

    At the top is what `aape_kernels.plot.responses` draws; at the bottom left, the energy of all patches and states
    over frequency; at the bottom right, the kernels of the strongest states.

    White rows low in the spectrogram are mel filters (nearly) without power: of 128 filters, those below some 200 Hz
    are narrower than the 31.25 Hz between the Fourier transform's frequencies, which hit a filter's edge or miss it.
    """
    hop = front_end.hop
    band = band_hz(stem, hop)

    figure = Figure(figsize=(width_inches(responses.energy.shape[1]), HEIGHT), dpi=DPI)
    FigureCanvasAgg(figure)
    width = figure.get_figwidth()
    left, right = MARGINS[0] / width, 1 - MARGINS[1] / width
    title: dict[str, Any] = {"color": INK, "va": "center", "parse_math": False}
    figure.text(left, 0.965, drawable(name), fontsize=17, weight="bold", **title)
    figure.text(right, 0.965, drawable(shortened(label)), fontsize=12, ha="right", **title)

    top = figure.add_axes((left, 0.43, right - left, 0.445))
    bar = figure.add_axes((1 - 0.95 / width, 0.43, 0.2 / width, 0.445))
    scale = draw_strongest(top, stem, log_mel, responses, hop, front_end.centres(), start, bar)

    gap = 0.9 / width
    panel = min((right - left - gap) / 2, 6 / width)
    alias_prone = np.allclose(stem.band, (math.pi / stem.stride[1], math.pi))
    _energy_over_frequency(figure.add_axes((left, 0.075, panel, 0.25)), responses, band, alias_prone, scale)
    _kernels(figure, (left + panel + gap, 0.075, panel, 0.25), stem, responses, hop, scale)
    return figure


def shortened(text: str, length: int = 48) -> str:
    """`text` cut to `length`, for a title."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def drawable(text: str) -> str:
    """`text` with letters that the font lacks transcribed into Latin ones."""
    has = get_font(findfont(FontProperties())).get_charmap()
    return "".join(letter if ord(letter) in has else anyascii(letter) or "?" for letter in text)


def _energy_over_frequency(
    axes: Axes, responses: Heard, band: tuple[float, float], alias_prone: bool, scale: ScalarMappable
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
    name, middle, upright = "alias-prone band" if alias_prone else "band", sum(band) / 2, axes.get_xaxis_transform()
    axes.text(middle, 0.955, name, transform=upright, ha="center", va="top", color=INK)
    arrow = {"arrowstyle": "<->", "color": INK, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", (band[0], 0.865), (band[1], 0.865), xycoords=upright, arrowprops=arrow)
    strongest = strongest_frequency(responses)
    tens = [hz for hz in range(10, math.ceil(band[1]), 10) if band[0] + margin < hz < band[1] - margin]
    axes.set_xticks([band[0], *tens, band[1]], [f"{hz:.4g}" for hz in (band[0], *tens, band[1])])
    axes.set_xlabel("state's frequency (Hz)")
    axes.set_ylabel("energy, all patches (%)")
    axes.set_title(f"Energy over frequency: strongest state at {strongest:.1f} Hz", fontsize=11, loc="left")
    _open(axes)


def distinct_states(responses: Heard, count: int = 4) -> list[int]:
    """The strongest states whose filters differ: by at least the wider one's half width at half height, α/2π Hz."""
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
    responses: Heard,
    hop: float,
    scale: ScalarMappable,
) -> None:
    """Kernels of the strongest states, each as it is in the patch where that state has the most energy."""
    states = distinct_states(responses)
    flat = [plane.flatten(0, 1) for plane in (responses.energy, responses.hz, responses.decay)]
    where = flat[0][:, states].argmax(0)
    hz, decay = (plane[where, states] for plane in flat[1:])
    h = torch.stack(kernels(decay * hop, 2 * math.pi * hz * hop, stem.window, stem.kernel == "quadrature"), 1).numpy()
    ms = (np.arange(stem.window) - (stem.window - 1) / 2) * hop * 1e3
    limit = 1.1 * float(np.abs(h).max())
    left, bottom, width, height = box
    # the rest of the height is the heading's
    grid = figure.add_gridspec(
        2, 2, left=left, right=left + width, bottom=bottom, top=bottom + 0.88 * height, wspace=1 / 12, hspace=3 / 11
    )
    real: dict[str, Any] = {"marker": "o", "markersize": 3, "linewidth": 1.6}
    imaginary: dict[str, Any] = {**real, "linewidth": 1.2, "linestyle": (0, (3, 2)), "markerfacecolor": "white"}
    figure.text(left, bottom + height + 0.008, "Strongest kernels h(d)", fontsize=11, va="bottom")
    figure.legend(
        [Line2D([], [], color=INK, **style) for style in (real, imaginary)],
        ["real", "imaginary"],
        loc="lower right",
        bbox_to_anchor=(left + width, bottom + height + 0.006),
        ncols=2,
        frameon=False,
        borderpad=0,
        borderaxespad=0,
    )
    for n, (state, planes) in enumerate(zip(states, h, strict=True)):
        share = float(flat[0][:, state].sum() / flat[0].sum().clamp_min(1e-30))
        row, column = divmod(n, 2)
        axes = figure.add_subplot(grid[row, column])
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
