"""`aape-ssl pretrain`: a run of `PretrainingModule`, with presets."""

from __future__ import annotations

from pathlib import Path

from ._lightning import Callback, LightningArgumentParser, LightningDataModule
from .monitor import Monitor
from .runs import Run
from .training import PretrainingModule

__all__ = ["Pretrain"]

PRESETS = {path.stem: path for path in sorted(Path(__file__).with_name("presets").glob("*.yaml"))}
SUMMARY = ("train/loss", "train/regression", "train/contrastive", "train/top1", "train/ema_decay")


class Pretrain(Run):
    """Any data module may feed it; the presets name `ClipData`."""

    command = "pretrain"
    module_type = PretrainingModule
    data_type = LightningDataModule
    any_data = True
    presets = PRESETS

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The monitor's too."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--monitor_every", type=int, default=100, help="optimiser steps between diagnostics")

    def own_callbacks(self) -> list[Callback]:
        """The monitor."""
        self.monitor = Monitor(self.config.monitor_every)
        return [self.monitor]

    def summary(self) -> dict[str, str]:
        """The last losses and diagnostics."""
        metrics = self.trainer.callback_metrics
        values = {name: float(metrics[name]) for name in SUMMARY if name in metrics} | self.monitor.last
        return {name: f"{value:.4g}" for name, value in values.items()}
