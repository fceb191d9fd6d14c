"""Diagnostics while training: numbers for every logger, pictures for TensorBoard, a warning at collapse."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aape_kernels import AaPE

from . import diagnostics
from ._lightning import Callback, LightningModule, TensorBoardLogger, Trainer, rank_zero_warn
from .masks import Masks
from .training import PretrainingModule

__all__ = ["CollapseWarning", "Monitor"]


class CollapseWarning(UserWarning):
    """The diagnostics say that the representation collapses."""


class Monitor(Callback):
    """Every so many optimiser steps, of the step's last micro-batch on this process:

    - token std, content std, RankMe (`diagnostics.of_terms`), with a `CollapseWarning` when they say collapse;
    - of an AaPE stem the shares of decay and frequency at the bounds of their ranges, their histograms, and the norm
      of its encoder's gradient; of any stem with a branch ‖branch‖ / ‖W_p vec(patch)‖;
    - the first clip's spectrogram, and what its first mask leaves of it.

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
            gradients = [p.grad for p in stem.encoder.parameters() if p.grad is not None]
            self._values["stem/encoder_grad_norm"] = float(torch.nn.utils.get_total_norm(gradients))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look, log and warn."""
        assert isinstance(pl_module, PretrainingModule)
        if self._values is None:
            return
        values, self._values = self._values, None
        step, student, x = trainer.global_step, pl_module.objective.student, batch["log_mel"]

        found = diagnostics.of_terms(outputs["terms"])
        values |= {f"tokens/{name}": value for name, value in found.items()}
        warning = diagnostics.collapse(found, student.size.dim)
        if warning is not None:
            rank_zero_warn(f"optimiser step {step}: {warning}", category=CollapseWarning)

        boards = [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
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
        for board in boards:
            board.add_image("clip and its first mask", picture(x[0, 0], outputs["masks"], student.patch_size), step)
        for logger in trainer.loggers:
            logger.log_metrics(values, step)
        self.last = values


def picture(log_mel: Tensor, masks: Masks, patch: tuple[int, int]) -> Tensor:
    """The first clip (F, T) over itself with the patches dark that its first mask hides: (1, 2F + 2, T), from 0 to 1.

    Low mel bins are at the bottom.
    """
    x = log_mel.detach().float()
    x = (x - x.min()) / (x.max() - x.min()).clamp_min(1e-12)
    grid = x.shape[0] // patch[0], x.shape[1] // patch[1]
    seen = torch.zeros(grid[0] * grid[1], device=x.device)
    seen[masks.visible[0, 0]] = 1
    seen = seen.view(grid).repeat_interleave(patch[0], 0).repeat_interleave(patch[1], 1)
    masked = torch.zeros_like(x)
    masked[: seen.shape[0], : seen.shape[1]] = seen
    line = torch.ones(2, x.shape[1], device=x.device)
    return torch.cat([x.flip(0), line, (x * masked).flip(0)])[None]
