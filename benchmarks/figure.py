"""The summary of a run as a picture: this package's compiled stems over the Conv2d stem, case by case."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .table import ratios

__all__ = ["draw"]

STYLE = {"forward": ("o", "#0072b2"), "forward + backward": ("s", "#d55e00")}


def draw(run: dict[str, Any], path: Path) -> None:
    """Write the picture: a point the median, a bar p20 to p80; left of 1 the AaPE stem is the faster.

    Errors: `ValueError` for a run without such rows.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = ratios(run)
    if not found:
        raise ValueError("expected a run with rows of this package's stems")
    figure = Figure(figsize=(9, 1.2 + 0.32 * len(found)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for direction, (marker, colour) in STYLE.items():
        for row, cells in enumerate(found.values()):
            if direction in cells:
                ratio = cells[direction]
                height = row + (0.14 if direction == "forward" else -0.14) * -1
                axes.plot([ratio["p20"], ratio["p80"]], [height] * 2, color=colour, linewidth=2)
                axes.plot(ratio["median"], height, marker, color=colour, label=direction if row == 0 else None)
    axes.axvline(1, color="#222222", linewidth=1, linestyle="--")
    axes.set_yticks(range(len(found)), [f"{peer}: {case}" for peer, case in found], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel("time of the AaPE stem / time of the Conv2d stem")
    axes.grid(axis="x", color="#dddddd")
    axes.set_axisbelow(True)
    axes.legend(loc="upper right")
    figure.savefig(path)
