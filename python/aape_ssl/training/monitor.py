"""Diagnostics while training: numbers for every logger, pictures for TensorBoard, a warning at collapse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from aape_kernels import AaPE

from .._files import replacing
from .._lightning import Callback, LightningModule, TensorBoardLogger, Trainer, rank_zero_warn
from .._messages import at_least
from ..method import diagnostics
from ..method.masks import Masks
from ..method.objective import Pretraining
from .pretraining import PretrainingModule
from .sharding import gathered, total_norm

__all__ = ["CollapseWarning", "Monitor"]

TAG = "clip, its first mask and the predictor's attention"


class CollapseWarning(UserWarning):
    """The diagnostics say that the representation collapses."""


class Monitor(Callback):
    """Every so many optimiser steps, reports on the step's last micro-batch on this process:

    - token std, content std, RankMe (`diagnostics.of_terms`), with a `CollapseWarning` when they say collapse;
    - for an AaPE stem, the shares of decay and frequency at the bounds of their ranges, their histograms, and the norm
      of its encoder's gradient; for any stem with a branch, ‖branch‖ / ‖W_p vec(patch)‖;
    - the first clip's spectrogram, what its first mask leaves of it, and how the predictor attends to that.

    Histograms and pictures go to TensorBoard, the rest to every logger; the latest picture to `folder`, too.

    Args:
        every_n_steps: optimiser steps.
        folder: where to keep the latest picture as `monitor.png`; nowhere unless given.

    Attributes:
        last: the values that were logged last.
    """

    def __init__(self, every_n_steps: int = 100, folder: Path | None = None) -> None:
        super().__init__()
        at_least(1, every_n_steps=every_n_steps)
        self.every_n_steps, self.folder = every_n_steps, folder
        self.last: dict[str, float] = {}
        self._values: dict[str, float] | None = None  # of a step that is due

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Note the gradient's norm, which is gone after the step."""
        assert isinstance(pl_module, PretrainingModule)
        if (trainer.global_step + 1) % self.every_n_steps:
            return
        self._values = {}
        stem = pl_module.objective.student.stem
        if isinstance(stem, AaPE):
            self._values["stem/encoder_grad_norm"] = float(total_norm(stem.encoder.parameters()))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look, log and warn."""
        assert isinstance(pl_module, PretrainingModule)
        if self._values is None:
            return
        values, self._values = self._values, None
        step, x, masks = trainer.global_step, batch["log_mel"], outputs["masks"]
        objective = pl_module.objective
        student = objective.student

        found = diagnostics.of_terms(outputs["terms"])
        values |= {f"tokens/{name}": value for name, value in found.items()}
        warning = diagnostics.collapse(found, student.size.dim)
        if warning is not None:
            rank_zero_warn(f"optimiser step {step}: {warning}", category=CollapseWarning)

        boards = [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        with gathered(objective):
            ratio = diagnostics.branch_ratio(student.stem, x)
            if ratio is not None:
                values["stem/branch_ratio"] = ratio
            if isinstance(student.stem, AaPE):
                for name, positions in diagnostics.filter_positions(student.stem, x).items():
                    values[f"stem/{name}_at_bounds"] = diagnostics.at_bounds(positions)
                    for board in boards:
                        board.add_histogram(f"stem/{name}", positions, step)
            drawn = bool(boards) or self.folder is not None
            attention = first_attention(objective, x, masks) if drawn else None
        if attention is not None:
            figure = picture(x[0, 0], masks, student.patch_size, attention)
            if self.folder is not None and trainer.is_global_zero:
                self.folder.mkdir(parents=True, exist_ok=True)
                with replacing(self.folder / "monitor.png") as part:
                    figure.savefig(part, format="png")
            for board in boards:
                board.add_figure(TAG, figure, step, close=False)
        for logger in trainer.loggers:
            logger.log_metrics(values, step)
        self.last = values


@torch.no_grad()
def first_attention(objective: Pretraining, x: Tensor, masks: Masks) -> Tensor:
    """`Predictor.attention` (N_v) of the first of the clips x (B, 1, F, T) under its first mask."""
    x, visible, masked = x[:1], masks.visible[:1, :1], masks.masked[:1, :1]
    tokens = objective.student(x, visible)
    return objective.predictor.attention(tokens, visible, masked, objective.student.grid(x))[0, 0]


def picture(log_mel: Tensor, masks: Masks, patch: tuple[int, int], attention: Tensor) -> Figure:
    """The first clip (F, T); what its first mask leaves of it; and how the predictor attends to that, (N_v), as shares
    of the highest in dB, because one patch often gets several times as much as the others."""
    x = log_mel.detach().float().cpu()
    (bins, frames), visible = x.shape, masks.visible[0, 0].cpu()
    grid = bins // patch[0], frames // patch[1]
    level = torch.full((grid[0] * grid[1],), torch.nan)
    level[visible] = 10 * (attention.float().cpu() / attention.max().cpu()).clamp_min(1e-30).log10()
    hidden = torch.ones(grid[0] * grid[1])
    hidden[visible] = torch.nan

    figure = Figure(figsize=(max(6.0, min(16.0, frames / 30)) + 1.5, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subplots(3, 1, sharex=True, sharey=True)
    whole: dict[str, Any] = {"origin": "lower", "aspect": "auto", "extent": (0, frames, 0, bins)}
    tokens: dict[str, Any] = {**whole, "extent": (0, grid[1] * patch[1], 0, grid[0] * patch[0])}
    for axes, title in zip(
        rows, ("log-mel, normalised", "what the student sees", "the predictor's attention"), strict=True
    ):
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_ylabel("mel bin")
        axes.set_facecolor("#dddddd")
    for axes in rows[:2]:
        shown = axes.imshow(x.numpy(), cmap="magma", **whole)
    rows[1].imshow(hidden.view(grid).numpy(), cmap="Greys", vmin=0, vmax=2, **tokens)
    rows[1].legend(handles=[Patch(facecolor="#959595", label="masked")], loc="upper right", fontsize=9)
    shares = rows[2].imshow(level.view(grid).numpy(), cmap="viridis", vmin=-20, vmax=0, **tokens)
    figure.colorbar(shown, ax=rows[:2], label="0.5 is a standard deviation")
    figure.colorbar(shares, ax=rows[2], label="dB of the highest", extend="min")
    rows[2].set_xlabel("frame")
    rows[2].set(xlim=(0, frames), ylim=(0, bins))
    return figure
