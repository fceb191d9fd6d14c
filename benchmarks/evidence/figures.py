"""The report's figures: accuracy by stem and task, and accuracy over shifts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .configurations import COMPARED
from .report import NAMES, STATISTICS, columns_of
from .spectrograms import SHIFTS
from .tables import Board

__all__ = ["accuracies", "shift_curves"]

# Okabe and Ito's, told apart with any colour vision; markers tell them apart in grey
LOOKS = {
    "aape": ("#0072B2", "o"),
    "aape-complex": ("#56B4E9", "v"),
    "aape-fixed": ("#009E73", "D"),
    "conv": ("#D55E00", "s"),
    "conv+mlp": ("#CC79A7", "^"),
}
WIDTH = 9  # inches; at 110 dpi as wide as a README
ACROSS = 4  # panels


def _axes(count: int, columns: int, height: float) -> tuple[Any, list[Any]]:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    columns = min(count, columns)
    lines = -(-count // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(WIDTH, height * lines), squeeze=False, layout="constrained")
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    return figure, list(axes.flat[:count])


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def accuracies(board: Board, folder: Path) -> Path:
    """folder/evidence.png: a panel a task; frozen and, where there is any, fine-tuned accuracy of each stem in %.

    Bars are 95 % intervals over seeds and groups of clips; small dots the single seeds; open marks random weights;
    the dashed line the statistics of log-mels.
    """
    stems = [name for name in COMPARED if (name, "pretrained") in board.cells]
    panels = [("frozen", "linear", task) for *_, task in columns_of(board, "frozen", "linear")]
    panels += [("tuned", "tuned", task) for *_, task in columns_of(board, "tuned", "tuned")]
    figure, axes = _axes(len(panels), ACROSS, 1.3 + 0.2 * len(stems))
    for axis, column in zip(axes, panels, strict=True):
        for place, name in enumerate(reversed(stems)):
            colour, marker = LOOKS[name]
            found = board.mean((name, "pretrained"), [column])
            if found is not None:
                axis.plot([100 * found.low, 100 * found.high], [place, place], color=colour, lw=2)
                axis.plot(100 * found.mean, place, marker, color=colour, ms=7)
                axis.plot([100 * each for each in found.by_seed], [place - 0.28] * found.seeds, ".", color=colour, ms=4)
            start = board.mean((name, "untrained"), [column])
            if start is not None:
                axis.plot(100 * start.mean, place, marker, mfc="none", mec="#888888", ms=6)
        baseline = board.mean(STATISTICS, [column])
        if baseline is not None:
            axis.axvline(100 * baseline.mean, color="#444444", ls="--", lw=1)
        axis.set_yticks(range(len(stems)), [NAMES[name].replace(" of AaPE's size", "") for name in reversed(stems)])
        axis.set_ylim(-0.6, len(stems) - 0.4)
        axis.tick_params(labelsize=8)
        axis.set_title(f"{column[2]}, {'fine-tuned' if column[0] == 'tuned' else 'frozen'} (%)", fontsize=9)
        axis.grid(axis="x", color="#dddddd", lw=0.6)
        if axis not in axes[::ACROSS]:
            axis.set_yticklabels([])
    if panels:
        about = "bar: 95 % interval over seeds and groups of clips; dots: seeds; open: random weights; dashed: "
        figure.supxlabel(f"{about}log-mel statistics", fontsize=8)
    return _save(figure, folder / "evidence.png")


def shift_curves(board: Board, folder: Path) -> Path:
    """folder/evidence-shifts.png: accuracy over shifts, a panel a task and way to fit the probe."""
    stems = [name for name in COMPARED if (name, "pretrained") in board.cells]
    at = range(SHIFTS)
    panels = [
        (task, fit)
        for task in board.tasks
        for fit in ("unshifted", "shifted")
        if any(board.has((name, "pretrained"), [(f"shift {s}", fit, task) for s in at]) for name in stems)
    ]
    figure, axes = _axes(max(1, len(panels)), 2, 2.2)
    for axis, (task, fit) in zip(axes, panels, strict=False):
        for name in stems:
            found = [board.mean((name, "pretrained"), [(f"shift {s}", fit, task)]) for s in at]
            values = [100 * each.mean for each in found if each is not None]
            if len(values) == SHIFTS:
                colour, marker = LOOKS[name]
                axis.plot(at, values, color=colour, marker=marker, ms=3.5, lw=1.2, label=NAMES[name])
        axis.set_title(f"{task}, probe fitted {'on random' if fit == 'shifted' else 'without'} shifts (%)", fontsize=8)
        axis.set_xlabel("shift against the patch grid (frames of 10 ms)", fontsize=8)
        axis.set_xticks(range(0, SHIFTS, 3))
        axis.tick_params(labelsize=8)
        axis.grid(color="#dddddd", lw=0.6)
    if panels:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    return _save(figure, folder / "evidence-shifts.png")
