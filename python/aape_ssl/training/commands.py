"""`aape-ssl pretrain`, a run of `PretrainingModule` with presets, and `finetune`, one of `FinetuningModule` on labelled
clips, whose best epoch is exported, and tested once."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

from aape_kernels import AaPE

from .._files import read_checkpoint
from .._lightning import Callback, LightningArgumentParser, LightningDataModule
from ..evaluation.probe import interval
from ..method.masks import MaskSampler
from ..method.model import Predictor
from ..saved.checkpoints import BestCheckpoint
from ..saved.pretrained import AudioEncoder
from ..sound.data import ClipData
from .finetuning import FinetuningModule, LabelledClips, mean_average_precision, predict
from .monitor import Monitor
from .pretraining import PretrainingModule
from .runs import Run

__all__ = ["Finetune", "Pretrain"]

PRESETS = {path.stem: path for path in sorted(Path(__file__).with_name("presets").glob("*.yaml"))}
SUMMARY = ("train/loss", "train/regression", "train/contrastive", "train/top1", "train/ema_decay")


class Pretrain(Run):
    """Pre-train an encoder on sound without labels."""

    command = "pretrain"
    usage = "[--preset laptop] --data SOURCE [--out DIR] [--trainer.max_steps N] [options]"
    module_type = PretrainingModule
    data_type = LightningDataModule
    usual_data = ClipData
    of_the_trainer = MappingProxyType({"max_steps": 100_000})
    presets = PRESETS
    parts = MappingProxyType({"model.masks.": MaskSampler, "model.predictor_": Predictor, "model.stem_options: ": AaPE})

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the monitor's option, too."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--monitor_every", type=int, default=100, help="optimiser steps between diagnostics")

    def own_callbacks(self) -> list[Callback]:
        """The monitor."""
        self.monitor = Monitor(self.config.monitor_every, self.config.out)
        return [self.monitor]

    def summary(self) -> dict[str, str]:
        """The last losses and diagnostics."""
        metrics = self.trainer.callback_metrics
        values = {name: float(metrics[name]) for name in SUMMARY if name in metrics} | self.monitor.last
        return {name: f"{value:.4g}" for name, value in values.items()}


class Finetune(Run):
    """Train a checkpoint's encoder and a linear head on labelled clips; the best epoch is exported, and tested once."""

    command = "finetune"
    usage = "--checkpoint PATH --data MANIFEST.csv [--out DIR] [--trainer.max_epochs N] [options]"
    names = MappingProxyType({"--data": "--data.data", "--checkpoint": "--model.checkpoint"})
    module_type = FinetuningModule
    data_type = LabelledClips
    of_the_trainer = MappingProxyType({"max_epochs": 50})

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Let the data be prepared as the checkpoint needs it."""
        super().add_arguments_to_parser(parser)
        parser.link_arguments("model.checkpoint", "data.checkpoint")

    def _check(self, out: Path) -> None:
        super()._check(out)
        if self.config_init.trainer["limit_val_batches"] == 0:
            expected = "expected more than 0, as the epoch that is best on validation is exported"
            raise ValueError(f"--trainer.limit_val_batches: {expected}, got 0")

    def own_callbacks(self) -> list[Callback]:
        """The epoch that is best on validation."""
        name = "map" if self.config.data.multi_label else "accuracy"
        self.best = BestCheckpoint(
            self.config.out, "best", f"valid/{name}", mode="max", save_weights_only=True, enable_version_counter=False
        )
        return [self.best]

    def summary(self) -> dict[str, str]:
        """Validation and test of the exported encoder."""
        module, data = self.model, self.datamodule
        best = self.best.best_model_score
        if best is None:
            steps = self.trainer.global_step
            raise ValueError(f"--trainer: expected limits that leave a validation, there was none in {steps} steps")
        module.load_state_dict(read_checkpoint(self.best.best_model_path)["state_dict"])
        folder = self.config.out / "model"
        module.model.save_pretrained(folder)
        # what is tested is what was written
        logits = predict(AudioEncoder.from_pretrained(folder), data, self.trainer.strategy.root_device)
        targets = data.targets(data.test).numpy()
        rows = {"exported": str(folder), f"valid/{module.name}": f"{float(best):.4f}"}
        if data.multi_label:
            return {**rows, "test/map": f"{mean_average_precision(logits, targets):.4f}"}
        correct = (logits.argmax(1) == targets.argmax(1)).astype(float)
        low, high = interval(correct, [clip.group or clip.name for clip in data.test])
        return {**rows, "test/accuracy": f"{correct.mean():.4f}, 95 % interval {low:.4f} – {high:.4f}"}
