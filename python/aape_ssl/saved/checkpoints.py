"""Checkpoints that survive kill -9, a full disk and a damaged file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from .._files import read_checkpoint
from .._lightning import Checkpoint, CheckpointIO, LightningModule, ModelCheckpoint, Trainer
from .._messages import CheckpointError, at_least, why
from .reading import load_encoder, made_with, read_pretraining

__all__ = [
    "AtomicCheckpointIO",
    "BestCheckpoint",
    "CheckpointError",
    "LastCheckpoint",
    "StoppedError",
    "check_resumable",
    "load_encoder",
    "made_with",
    "read_pretraining",
]


class StoppedError(RuntimeError):
    """A training that was told to stop has written its checkpoint.

    Attributes:
        signal: the number of the signal that stopped it, 0 on processes that got none.
    """

    def __init__(self, signal: int) -> None:
        super().__init__(signal)
        self.signal = signal


class AtomicCheckpointIO(CheckpointIO):
    """Writes to a temporary file beside the checkpoint, which it replaces only once all of it is on the disk.

    Whatever happens, the name is that of a whole checkpoint, the previous or the new one. Lightning's own does not wait
    for the disk (`fsync`). Reads with `weights_only=True`.

    Errors: `CheckpointError`.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """`torch.save` of `checkpoint` under `path`."""
        path = Path(path)
        temporary = path.with_name(f"{path.name}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_folder(path.parent)
        except (OSError, RuntimeError) as error:  # torch.save turns a file's OSErrors into RuntimeErrors
            temporary.unlink(missing_ok=True)
            cause = error.__context__ if isinstance(error.__context__, OSError) else error
            kept = "; the one written before is kept, to resume from" if path.exists() else ""
            raise CheckpointError(f"{path}: the checkpoint could not be written ({why(cause)}){kept}") from error

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """What `save_checkpoint` wrote."""
        return read_checkpoint(path, map_location)

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Remove it, if it exists."""
        Path(path).unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class LastCheckpoint(Checkpoint):
    """Keeps `last.ckpt` in a folder: written anew every so many optimiser steps, and after the last one.

    It is written only after a step, never between accumulated batches, whose gradients no checkpoint holds; and where
    a validation follows the step, after that: a resumed run would not make up for it. A `fast_dev_run` writes none.
    Lightning's own callback would name a resumed run's file `last-v1.ckpt`.

    Asked to `stop`, it writes after the current step, and its validation, and raises `StoppedError`, on all processes
    at once.

    Args:
        folder: where.
        every_n_steps: optimiser steps.
    """

    def __init__(self, folder: str | os.PathLike[str], every_n_steps: int = 1000) -> None:
        super().__init__()
        at_least(1, every_n_steps=every_n_steps)
        self.path, self.every_n_steps = Path(folder) / "last.ckpt", every_n_steps
        self._saved, self._due = 0, False
        self._asked: int | None = None

    def stop(self, signal: int) -> None:
        """Ask the training to end, as `signal` did."""
        self._asked = signal

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A resumed run already has the checkpoint that it came from."""
        self._saved = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        """Write it when due, and stop when asked to, unless a validation comes first."""
        step, loop = trainer.global_step, trainer.fit_loop
        if step != self._saved and (step % self.every_n_steps == 0 or step == trainer.max_steps):
            self._due = True
        assert loop._data_fetcher is not None
        if not loop.epoch_loop._should_check_val_fx(loop._data_fetcher):
            self._settle(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make up for what was put off, unless the epoch ends: other callbacks may wait for that."""
        if not (trainer.sanity_checking or trainer.is_last_batch):
            self._settle(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make up for what was put off."""
        self._settle(trainer)

    def _settle(self, trainer: Trainer) -> None:
        batches = trainer.fit_loop.epoch_loop.batch_idx + 1
        if batches % trainer.accumulate_grad_batches and not trainer.is_last_batch:
            return
        stop = trainer.strategy.reduce_boolean_decision(self._asked is not None, all=False)
        if self._due or (stop and trainer.global_step != self._saved):
            self._save(trainer)
        if stop:
            raise StoppedError(self._asked or 0)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write it if the last step was not known beforehand."""
        if trainer.global_step != self._saved:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            trainer.save_checkpoint(self.path, weights_only=False)
        self._saved, self._due = trainer.global_step, False


class BestCheckpoint(ModelCheckpoint):
    """Lightning's, for a folder that may be moved or copied between a run and its resumption."""

    __qualname__ = ModelCheckpoint.__qualname__  # by which a checkpoint names whose state it holds

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The scores, and the paths as they are from this run's folder on."""
        here = str(self.dirpath)

        def moved(path: str) -> str:
            return os.path.join(here, os.path.relpath(path, state_dict["dirpath"])) if path else path

        paths = {name: moved(path) for name, path in state_dict.items() if name.endswith("_model_path")}
        best = {moved(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict({**state_dict, **paths, "best_k_models": best, "dirpath": here})


def check_resumable(path: str | os.PathLike[str]) -> None:
    """Refuse a checkpoint that lacks what Lightning resumes from: it would fail without naming it, or begin anew.

    Errors: `CheckpointError`.
    """
    needed = ("pytorch-lightning_version", "state_dict", "optimizer_states", "lr_schedulers", "loops")
    missing = [name for name in needed if name not in read_checkpoint(path)]
    if missing:
        raise CheckpointError(f"{path}: expected a checkpoint to resume from, it lacks {', '.join(missing)}")
