"""What `aape-ssl pretrain` and `finetune` share: LightningCLI, the folder of a run, resuming, errors in one line."""

from __future__ import annotations

import os
import re
import shutil
import signal
import threading
import time
import warnings
from abc import abstractmethod
from argparse import ArgumentParser
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from .._arguments import as_lists, as_typed, in_options, named, retouch, short
from .._lightning import (
    Callback,
    CSVLogger,
    LightningArgumentParser,
    LightningCLI,
    LightningDataModule,
    LightningModule,
    MisconfigurationException,
    TensorBoardLogger,
    Trainer,
)
from .._messages import CheckpointError, at_least, complain, one_of
from ..saved.checkpoints import AtomicCheckpointIO, LastCheckpoint, StoppedError, check_resumable
from ..sound.loader import TooManyFailedError
from .steps import NonFiniteError

__all__ = ["Run", "main"]


HELP = {
    "config": "a file of options, such as the config.yaml among a run's logs; other options override it",
    "model": "",  # options that load a configuration for others
    "model.masks": "",
    "trainer": "",
    "seed_everything": "of the initial weights",
    "data.help": "list the options of a data module, those of ClipData for `ClipData`",
    "data": "a folder, manifest, shards or pattern; or a data module's class, with --data.NAME for its options",
    "trainer.max_steps": "optimiser steps; for finetune, -1 for as many as the epochs have",
    "trainer.max_epochs": "passes over the data",
    "trainer.devices": "how many GPUs, or processes on a CPU",
    "trainer.strategy": "auto, ddp, or sharded (FSDP2)",
    "trainer.precision": "32-true, bf16-mixed or 16-mixed (default: 32-true)",
    "trainer.accumulate_grad_batches": "batches an optimiser step",
    "trainer.gradient_clip_val": "largest norm of the gradient",
}
"""In place of lightning's texts. Of its trainer's options, the help lists these, `--trainer.help` all."""
REFUSED = (CheckpointError, MisconfigurationException, NonFiniteError, TooManyFailedError, OSError, ValueError)
"""What ends a command with a line on stderr, and status 2."""


class StopOnSignals(Callback):
    """SIGTERM, which SLURM and others send before they kill, and the first SIGINT end a training after its step, and
    the validation that may follow, with a checkpoint; the second SIGINT ends it at once. Before the first step, any of
    them does: there is nothing to keep.

    Args:
        last: writes the checkpoint.
    """

    def __init__(self, last: LastCheckpoint) -> None:
        super().__init__()
        self.last, self._before = last, dict[signal.Signals, Any]()

    def arm(self) -> None:
        """Handle signals from before the trainer sets anything up."""
        self._handle(self._leave)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace the trainer's handlers: its SIGTERM handler ends a run without a checkpoint."""
        self._handle(self._ask)

    def _handle(self, handler: Callable[[int, Any], None]) -> None:
        if threading.current_thread() is threading.main_thread():
            now = {name: signal.signal(name, handler) for name in (signal.SIGTERM, signal.SIGINT)}
            self._before = self._before or now

    def _leave(self, number: int, frame: Any) -> None:
        os.write(2, f"aape-ssl: {signal.Signals(number).name}: ended before the first step\n".encode())
        raise SystemExit(128 + number)

    def _ask(self, number: int, frame: Any) -> None:
        self.last.stop(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        # not print: what it interrupts may be printing
        os.write(2, f"aape-ssl: {signal.Signals(number).name}: ends after this step\n".encode())

    def disarm(self) -> None:
        """Restore the handlers as they were."""
        for name, handler in self._before.items():
            signal.signal(name, handler)
        self._before = {}


class Run(LightningCLI):
    """A training with a folder of its own: checkpoint, CSV and TensorBoard logs, configuration."""

    command: ClassVar[str]
    module_type: ClassVar[type[LightningModule]]
    data_type: ClassVar[type[LightningDataModule]]
    usual_data: ClassVar[type[LightningDataModule] | None] = None
    """The default class of data module, if `--data` may name another one."""
    presets: ClassVar[Mapping[str, Path]] = {}
    all_help: ClassVar[bool] = False
    of_the_trainer: ClassVar[Mapping[str, Any]] = {}
    """Defaults of the trainer's options."""
    names: ClassVar[Mapping[str, str]] = {"--data": "--data.data"}
    """Options by the names that the other commands have for them."""
    usage: ClassVar[str] = ""
    parts: ClassVar[Mapping[str, Callable[..., Any]]] = {}
    """Parts of the model, whose options are among its own, by the prefix of their names."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of a run besides those of model, data and trainer."""
        out = Path(f"{self.command}-output")
        parser.add_argument("--out", type=Path, default=out, help="folder for checkpoint and logs")
        resume = "go on from last.ckpt in --out, if there: to the same bits, with as many processes and threads"
        parser.add_argument("--resume", type=bool, default=False, help=resume)
        parser.add_argument("--checkpoint_every", type=int, default=1000, help="optimiser steps")
        if self.presets:  # `_with_preset` takes it out before it is parsed
            what = f"{', '.join(self.presets)}: a configuration, which other options override"
            parser.add_argument("--preset", type=str, default=None, help=what)
        if self.usual_data:
            path = f"{self.usual_data.__module__}.{self.usual_data.__qualname__}"
            parser.set_defaults({"data": {"class_path": path}})
        if not self.all_help:
            retouch(parser, HELP, "trainer.")
        groups: list[Any] = parser._action_groups  # type: ignore[assignment]
        lightnings = next(group for group in groups if (group.title or "").startswith("Customize"))
        lightnings.title = "lightning's Trainer, of which --trainer.help lists everything"
        groups.sort(key=lambda group: group is lightnings)  # this package's options first

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer with this package's callbacks, loggers and checkpoints; the configuration's are added to them."""
        out = self.config.out
        self._check(out)
        self.last = LastCheckpoint(out, self.config.checkpoint_every)
        callbacks = [self._get(self.config_init, key) for key in self._parser(self.subcommand).callback_keys]
        given = dict(self.config_init.trainer) | kwargs
        if given["logger"] is None:
            given["logger"] = [CSVLogger(out, "csv"), TensorBoardLogger(out, "tensorboard")]
        given["plugins"] = [AtomicCheckpointIO(), *_listed(given["plugins"])]
        self.signals = StopOnSignals(self.last)
        given["callbacks"] = [*_listed(given["callbacks"]), *self.own_callbacks(), self.last, self.signals]
        given["default_root_dir"] = out
        return self._instantiate_trainer(given, callbacks)

    def _set_seed(self) -> None:
        at_least(0, **{"--seed_everything": self._get(self.config, "seed_everything")})
        super()._set_seed()

    def _check(self, out: Path) -> None:
        """Refuse what lightning would accept, only to misread it or fail later."""
        if out.exists() and not out.is_dir():
            raise ValueError(f"--out: expected a folder, {out} is a file")
        at_least(1, **{f"--{name}": getattr(self.config, name, 1) for name in ("checkpoint_every", "monitor_every")})
        if preset := getattr(self.config, "preset", None):  # `_with_preset` has taken those of the command line out
            raise ValueError(f"--preset: expected on the command line, got {preset!r} from a file of options")
        trainer = self.config_init.trainer
        at_least(1, **{"--trainer.accumulate_grad_batches": trainer["accumulate_grad_batches"]})
        at_least(0, **{"--trainer.gradient_clip_val": trainer["gradient_clip_val"] or 0})

    @abstractmethod
    def own_callbacks(self) -> list[Callback]:
        """Callbacks of the command."""

    @abstractmethod
    def summary(self) -> dict[str, str]:
        """What the table at the end says besides steps, minutes and checkpoint; runs on the first process only."""

    def leave_nothing(self) -> None:
        """Remove the logs of a run that was refused before its first step, and folders that hold nothing else."""
        if self.trainer.global_step or not self.trainer.is_global_zero:
            return
        for logger in self.trainer.loggers:
            if logger.log_dir is None or self.config.out not in Path(logger.log_dir).parents:
                continue
            logger.finalize("failed")
            shutil.rmtree(logger.log_dir, ignore_errors=True)
            for folder in Path(logger.log_dir).parents:
                if not folder.is_relative_to(self.config.out) or not folder.is_dir() or any(folder.iterdir()):
                    break
                folder.rmdir()

    def fit(self) -> None:
        """Train, from the last checkpoint if asked to, and print the summary."""
        path, resume = self.last.path, self.config.resume
        if path.exists() and not resume:
            raise ValueError(
                f"--out: {path} is there already; --resume=true goes on from it, another folder starts anew"
            )
        if path.exists():
            check_resumable(path)
        start = time.monotonic()
        self.signals.arm()
        try:
            self.trainer.fit(
                self.model,
                datamodule=self.datamodule,
                ckpt_path=str(path) if path.exists() else None,
                weights_only=True,
            )
        finally:
            self.signals.disarm()
        if not self.trainer.global_step:
            raise ValueError("--trainer: expected limits that leave something to train on, no step was made")
        minutes = (time.monotonic() - start) / 60
        if self.trainer.is_global_zero:
            rows = {"optimiser steps": f"{self.trainer.global_step}", "minutes": f"{minutes:.1f}"}
            if not self.trainer.fast_dev_run:  # type: ignore[attr-defined]  # it writes nothing
                rows |= {"checkpoint": str(path), **self.summary()}
            width = max(map(len, rows))
            for name, value in rows.items():
                print(f"{name:<{width}}  {value}")


def _listed(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def _with_preset(presets: Mapping[str, Path], argv: Sequence[str]) -> list[str]:
    """`--preset NAME`, the last of several, as the `--config` that comes first: everything else overrides it."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", nargs="?", const="")
    found, others = parser.parse_known_args(argv)
    if not presets or found.preset is None:
        return list(argv)
    one_of(presets, **{"--preset": found.preset})
    return ["--config", str(presets[found.preset]), *others]


def _one_line(error: Exception) -> str:
    first, *rest = (" ".join(line.split()) for line in str(error).splitlines())
    if " in DataLoader worker process " in first:  # torch's, then the worker's traceback, which ends "TYPE: TEXT"
        kind, _, said = rest[-1].partition(": ")
        return said or kind
    return " ".join([first, "; ".join(rest)]).strip()


def _of_the_trainer(message: str) -> str:
    """lightning's complaints, "`max_steps` must be …", with the option first."""
    match = re.match(r"`(?:Trainer\()?(\w+)[`=]|You selected an invalid (strategy)", message)
    return f"{match[1] or match[2]}: {message}" if match else message


def main(run: type[Run], argv: Sequence[str]) -> int:
    """Run the command with `argv` and return its exit status: 0, 2 with a line on stderr, or 128 plus the number of
    the signal that ended it."""
    # jsonargparse's warnings about what lightning 2.6 does
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    # shown at every start: about lightning 2.6 beside torch 2.13, and that arguments come from `argv`, as they do
    warnings.filterwarnings("ignore", ".*LeafSpec.*is deprecated", FutureWarning)
    warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty", UserWarning)  # the logs
    warnings.filterwarnings("ignore", "LightningCLI's args parameter", UserWarning)
    cli = None
    if "--trainer.help" in argv:
        run, argv = type(run.__name__, (run,), {"all_help": True}), ["--help"]
    try:
        cli = run(
            run.module_type,
            run.data_type,
            subclass_mode_data=run.usual_data is not None,
            auto_configure_optimizers=False,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            trainer_defaults=dict(run.of_the_trainer),
            parser_class=short(LightningArgumentParser, run.command, run.names),
            parser_kwargs={"description": run.__doc__, "usage": f"aape-ssl {run.command} {run.usage}"},
            args=_with_preset(run.presets, as_lists(named(argv, run.names), ("--data.splits",))),
            run=False,
        )
        cli.fit()
    except StoppedError as error:
        assert cli is not None
        if cli.trainer.is_global_zero:
            said = f"stopped at optimiser step {cli.trainer.global_step}; {cli.last.path} is written"
            complain(f"{said}; the same command with --resume=true goes on")
        return 128 + (error.signal or signal.SIGTERM)
    except SystemExit:
        if cli is not None:
            cli.leave_nothing()
        raise
    except BrokenPipeError:  # an OSError that is no complaint: `cli.main` answers it
        raise
    except REFUSED as error:
        stopped = cli is not None and isinstance(error, NonFiniteError | TooManyFailedError) and cli.last.path.exists()
        kept = f"; the last good checkpoint is {cli.last.path}" if cli and stopped else ""
        if cli is not None:
            cli.leave_nothing()
        groups: dict[str, Callable[..., Any]] = {"model.": run.module_type}
        if cli is None:  # the model and its parts are made before any data is looked at
            groups |= run.parts
        groups |= {"data.": run.usual_data or run.data_type, "trainer.": Trainer, **run.parts}
        return complain(as_typed(in_options(_of_the_trainer(_one_line(error)), groups), run.names) + kept)
    except RuntimeError as error:
        if "Error(s) in loading state_dict" not in str(error):
            raise
        return complain(f"--resume: the checkpoint is of another model: {_one_line(error)}")
    return 0
