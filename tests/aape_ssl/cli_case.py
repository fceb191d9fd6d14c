"""A tiny `aape-ssl pretrain` on real clips, for the tests, and callbacks that kill it."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from aape_ssl._lightning import Callback
from aape_ssl.cli import main

OPTIONS = {
    "model.size": [16, 1, 2],
    "model.predictor_depth": 1,
    "model.predictor_heads": 2,
    "model.masks.num_masks": 2,
    "model.ema": [0.9, 0.99],
    "model.ema_steps": 10,
    "model.lr": 0.01,
    "model.warmup_steps": 2,
    "data": "aape_ssl.sound.data.ClipData",
    "data.frames": 32,
    "data.batch_size": 4,
    "data.workers": 0,
    "data.mix": 0.3,
    "data.resize_crop": 0.7,
    "trainer.max_steps": 12,
    "trainer.accelerator": "cpu",
    "trainer.gradient_clip_val": 1.0,
    "trainer.log_every_n_steps": 1,
    "trainer.enable_progress_bar": "false",
    "trainer.enable_model_summary": "false",
    "checkpoint_every": 5,
    "monitor_every": 100,
}


def arguments(data: Path, out: Path, **options) -> list[str]:
    """Of the command; in the names of options, __ is a dot."""
    given = {name.replace("__", "."): value for name, value in options.items()}
    every = {**OPTIONS, "data.data": data, "out": out, **given}
    return ["pretrain", *(f"--{name}={value}" for name, value in every.items())]


def pretrain(data: Path, out: Path, **options) -> int:
    return main(arguments(data, out, **options))


def start(data: Path, out: Path, **options) -> subprocess.Popen:
    """The same in a process of its own, with one thread as in the tests: sums of several have other last bits.

    What it says goes to a file beside `out`: a pipe would stay open as long as the workers of a run that was killed.
    """
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "aape_ssl.cli", *arguments(data, out, **options)]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    with open(said(out), "w") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)


def fork(data: Path, out: Path, **options) -> multiprocessing.Process:
    """The same from this process, which has imported the libraries already."""

    def process() -> None:
        with open(said(out), "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")  # pytest's are elsewhere
        sys.exit(pretrain(data, out, **options))

    forked = multiprocessing.get_context("fork").Process(target=process)
    forked.start()
    return forked


def said(out: Path) -> Path:
    """Where `start` and `fork` put what the run says."""
    return out.with_suffix(".txt")


class DieInStep(Callback):
    """SIGKILL after the first backward pass of a step: before the second, where there are two."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_after_backward(self, trainer, pl_module):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class SignalBeforeTheStart(Callback):
    """While the trainer sets things up."""

    def __init__(self, number: int) -> None:
        self.number = number

    def setup(self, trainer, pl_module, stage):
        os.kill(os.getpid(), self.number)


class DieByTheClock(Callback):
    """SIGKILL so many seconds after a step began, wherever the run, slowed down, is by then."""

    def __init__(self, step: int, seconds: float) -> None:
        self.step = step
        self.timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step and not self.timer.is_alive():
            self.timer.start()
        time.sleep(0.05)


class SpoilAt(Callback):
    """Empties every file of a folder at the beginning of a step."""

    def __init__(self, step: int, folder: Path) -> None:
        self.step, self.folder = step, folder

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            for path in self.folder.iterdir():
                path.write_bytes(b"")
