"""`aape-ssl pretrain`: LightningCLI around `PretrainingModule`, with presets."""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ._lightning import (
    CSVLogger,
    LightningArgumentParser,
    LightningCLI,
    LightningDataModule,
    TensorBoardLogger,
    Trainer,
)
from .checkpoints import AtomicCheckpointIO, CheckpointError, LastCheckpoint
from .monitor import Monitor
from .training import NonFiniteError, PretrainingModule

__all__ = ["main"]

PRESETS = {path.stem: path for path in sorted(Path(__file__).with_name("presets").glob("*.yaml"))}
SUMMARY = ("train/loss", "train/regression", "train/contrastive", "train/top1", "train/ema_decay")


class PretrainCLI(LightningCLI):
    """With the folder of a run: checkpoint, CSV and TensorBoard logs, configuration."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What a run has beside model, data and trainer."""
        parser.add_argument("--out", type=Path, default=Path("pretrain-output"), help="folder for checkpoint and logs")
        resume = "go on from last.ckpt in --out, if there: to the same bits, with as many processes and threads"
        parser.add_argument("--resume", type=bool, default=False, help=resume)
        parser.add_argument("--checkpoint_every", type=int, default=1000, help="optimiser steps")
        parser.add_argument("--monitor_every", type=int, default=100, help="optimiser steps between diagnostics")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """With this package's callbacks, loggers and checkpoints; those of the configuration come on top."""
        out = self.config.out
        self.last = LastCheckpoint(out, self.config.checkpoint_every)
        self.monitor = Monitor(self.config.monitor_every)
        callbacks = [self._get(self.config_init, key) for key in self._parser(self.subcommand).callback_keys]
        given = dict(self.config_init.trainer) | kwargs
        if given["logger"] is None:
            given["logger"] = [CSVLogger(out, "csv"), TensorBoardLogger(out, "tensorboard")]
        given["plugins"] = [AtomicCheckpointIO(), *_listed(given["plugins"])]
        given["callbacks"] = [*_listed(given["callbacks"]), self.monitor, self.last]
        given["default_root_dir"] = out
        return self._instantiate_trainer(given, callbacks)


def _listed(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def _with_preset(argv: Sequence[str]) -> list[str]:
    """`--preset NAME` as the `--config` that comes first, so that everything else overrides it."""
    arguments = list(argv)
    for i, argument in enumerate(arguments):
        name, given, value = argument.partition("=")
        if name == "--preset":
            preset = value if given else "".join(arguments[i + 1 : i + 2])
            if preset not in PRESETS:
                raise ValueError(f"--preset: expected one of {', '.join(PRESETS)}, got {preset!r}")
            del arguments[i : i + (1 if given else 2)]
            return ["--config", str(PRESETS[preset]), *arguments]
    return arguments


def main(argv: Sequence[str]) -> int:
    """Run `aape-ssl pretrain` with `argv` and return its exit status: 0, or 2 with one line on stderr."""
    # jsonargparse's, of what lightning 2.6 does
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    # at every start: of lightning 2.6 beside torch 2.13, and that arguments come from `argv`, as they do
    warnings.filterwarnings("ignore", ".*LeafSpec.*is deprecated", FutureWarning)
    warnings.filterwarnings("ignore", "LightningCLI's args parameter", UserWarning)
    cli = None
    try:
        cli = PretrainCLI(
            PretrainingModule,
            LightningDataModule,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            parser_kwargs={"prog": "aape-ssl pretrain"},
            args=_with_preset(argv),
            run=False,
        )
        _fit(cli)
    except (CheckpointError, NonFiniteError, OSError, ValueError) as error:
        stopped = cli is not None and isinstance(error, NonFiniteError) and cli.last.path.exists()
        kept = f"; the last good checkpoint is {cli.last.path}" if cli and stopped else ""
        print(f"aape-ssl: {' '.join(str(error).split())}{kept}", file=sys.stderr)
        return 2
    return 0


def _fit(cli: PretrainCLI) -> None:
    path, resume = cli.last.path, cli.config.resume
    if path.exists() and not resume:
        raise ValueError(f"--out: {path} is there already; --resume=true goes on from it, another folder starts anew")
    start = time.monotonic()
    cli.trainer.fit(
        cli.model, datamodule=cli.datamodule, ckpt_path=str(path) if path.exists() else None, weights_only=True
    )
    if cli.trainer.is_global_zero:
        _summarise(cli, time.monotonic() - start)


def _summarise(cli: PretrainCLI, seconds: float) -> None:
    found = {
        name: float(cli.trainer.callback_metrics[name]) for name in SUMMARY if name in cli.trainer.callback_metrics
    }
    rows = {"optimiser steps": f"{cli.trainer.global_step}", "minutes": f"{seconds / 60:.1f}"}
    rows |= {name: f"{value:.4g}" for name, value in {**found, **cli.monitor.last}.items()}
    rows["checkpoint"] = str(cli.last.path)
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")
