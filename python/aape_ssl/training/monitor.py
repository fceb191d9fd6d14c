"""Diagnostics while training: numbers for every logger, pictures for TensorBoard, a warning at collapse."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aape_kernels import AaPE

from .._lightning import Callback, LightningModule, TensorBoardLogger, Trainer, rank_zero_warn
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
    """Every so many optimiser steps, of the step's last micro-batch on this process:

    - token std, content std, RankMe (`diagnostics.of_terms`), with a `CollapseWarning` when they say collapse;
    - of an AaPE stem the shares of decay and frequency at the bounds of their ranges, their histograms, and the norm
      of its encoder's gradient; of any stem with a branch ‖branch‖ / ‖W_p vec(patch)‖;
    - the first clip's spectrogram, what its first mask leaves of it, and how the predictor attends to that.

    Histograms and pictures go to TensorBoard, the rest to every logger.

    Args:
        every_n_steps: optimiser steps.

    Attributes:
        last: the values that were logged last.
    """

    def __init__(self, every_n_steps: int = 100) -> None:
        super().__init__()
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps: expected at least 1, got {every_n_steps}")
        self.every_n_steps = every_n_steps
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
                filters = diagnostics.filter_statistics(student.stem, x)
                values["stem/decay_at_bounds"] = filters.decay_at_bounds
                values["stem/frequency_at_bounds"] = filters.frequency_at_bounds
                for board in boards:
                    board.add_histogram("stem/decay", filters.decay, step)
                    board.add_histogram("stem/frequency", filters.frequency, step)
            if boards:
                attention = first_attention(objective, x, masks)
        for board in boards:
            board.add_image(TAG, picture(x[0, 0], masks, student.patch_size, attention), step)
        for logger in trainer.loggers:
            logger.log_metrics(values, step)
        self.last = values


@torch.no_grad()
def first_attention(objective: Pretraining, x: Tensor, masks: Masks) -> Tensor:
    """`Predictor.attention` (N_v) of the first of the clips x (B, 1, F, T) under its first mask."""
    x, visible, masked = x[:1], masks.visible[:1, :1], masks.masked[:1, :1]
    tokens = objective.student(x, visible)
    return objective.predictor.attention(tokens, visible, masked, objective.student.grid(x))[0, 0]


def picture(log_mel: Tensor, masks: Masks, patch: tuple[int, int], attention: Tensor) -> Tensor:
    """The first clip (F, T) over what its first mask leaves of it, over the attention (N_v) to that: (1, 3F + 4, T).

    From 0 to 1; low mel bins are at the bottom. What is masked is dark; a visible patch is as bright as the square root
    of its attention relative to the highest, as one patch often gets several times what the others do.
    """
    x = log_mel.detach().float()
    x = (x - x.min()) / (x.max() - x.min()).clamp_min(1e-12)
    visible = masks.visible[0, 0]
    seen = _on_patches(torch.ones_like(attention), visible, x, patch)
    share = _on_patches((attention / attention.max()).sqrt(), visible, x, patch)
    line = torch.ones(2, x.shape[1], device=x.device)
    return torch.cat([x.flip(0), line, (x * seen).flip(0), line, share.flip(0)])[None]


def _on_patches(values: Tensor, visible: Tensor, x: Tensor, patch: tuple[int, int]) -> Tensor:
    """(F, T) like x: `values` of the visible tokens on all of their patch, 0 elsewhere."""
    grid = x.shape[0] // patch[0], x.shape[1] // patch[1]
    tokens = torch.zeros(grid[0] * grid[1], device=x.device)
    tokens[visible] = values.float()
    pixels = tokens.view(grid).repeat_interleave(patch[0], 0).repeat_interleave(patch[1], 1)
    whole = torch.zeros_like(x)
    whole[: pixels.shape[0], : pixels.shape[1]] = pixels
    return whole
