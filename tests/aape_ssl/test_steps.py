"""Optimiser steps: means over what was accumulated, overflows of the loss's scale, epochs and their ends."""

import importlib
import signal
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from ssl_case import Tensors, module, trainer

import aape_ssl
import aape_ssl.training.pretraining
from aape_ssl import demo, training
from aape_ssl._lightning import Callback, LightningModule, Trainer
from aape_ssl.saved.checkpoints import AtomicCheckpointIO, LastCheckpoint, StoppedError
from aape_ssl.sound.data import ClipData
from aape_ssl.training.steps import OVERFLOWS, NonFiniteError

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:.*number of training batches",
    "ignore:Detected call of `lr_scheduler.step:UserWarning",  # where the scaler has skipped the first step
)


class Gradients(Callback):
    """Those that the optimiser gets."""

    def __init__(self):
        self.norms = []

    def on_train_start(self, trainer, pl_module):
        trainer.optimizers[0].register_step_post_hook(lambda *given: self.look(pl_module))

    def look(self, pl_module):
        grads = [p.grad.norm() for p in pl_module.parameters() if p.grad is not None]
        self.norms.append(float(torch.stack(grads).norm()))


@pytest.mark.parametrize("accumulate", [1, 2, 8])
def test_an_epoch_that_ends_early_has_the_mean_of_what_it_has(accumulate, tmp_path):
    """One batch an epoch, whatever should be accumulated: the same step."""
    norms = []
    for count in (1, accumulate):
        seen = Gradients()
        fit = trainer(tmp_path / f"{count}", 2, count, callbacks=[seen], gradient_clip_val=None)
        fit.fit(module(), Tensors(12))
        norms.append(seen.norms[:2])
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)


def test_three_batches_in_steps_of_two(tmp_path):
    """The second step has one of them: the trainer divides by two all the same."""
    whole = Gradients()
    trainer(tmp_path, 2, 2, callbacks=[whole], gradient_clip_val=None).fit(module(lr=0.0), Tensors(4))
    single = Gradients()
    trainer(tmp_path / "b", 3, 1, callbacks=[single], gradient_clip_val=None).fit(module(lr=0.0), Tensors(4))
    # masks differ from step to step: the size of the gradient does not, by so much
    assert 0.6 < whole.norms[1] / single.norms[2] < 1.6


def scaled(folder, steps, **options):
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", **options))
    return Trainer(
        max_steps=steps,
        plugins=[plugin],
        logger=False,
        enable_checkpointing=False,
        accelerator="cpu",
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def test_overflows_of_the_scale_are_skipped(tmp_path):
    model = module()
    before = {name: value.clone() for name, value in model.objective.state_dict().items()}
    scaled(tmp_path, 1, init_scale=2.0**60).fit(model, Tensors())
    after = model.objective.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())  # the teacher's steps, too
    scaled(tmp_path, 60, growth_interval=5).fit(module(), Tensors())


def test_overflows_that_go_on_stop_the_run(tmp_path):
    with pytest.raises(NonFiniteError, match=r"optimiser step"):
        scaled(tmp_path, OVERFLOWS + 5, init_scale=2.0**120, backoff_factor=0.99).fit(module(), Tensors())


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_weights_in_16_bits_are_refused(precision, tmp_path):
    with pytest.raises(ValueError, match=rf"precision: expected weights in float32 .* got {precision}"):
        trainer(tmp_path, 2, precision=precision).fit(module(), Tensors())


def test_reloaded_loaders_go_on(tmp_path):
    for n in range(12):
        soundfile.write(tmp_path / f"{n}.wav", np.random.default_rng(n).standard_normal(8000) * 0.1, 16000)

    class Seen(Callback):
        def __init__(self):
            self.batches = []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.batches.append((batch["index"].tolist(), float(batch["log_mel"].sum())))

    runs = []
    for options in ({}, {"reload_dataloaders_every_n_epochs": 1}):
        seen = Seen()
        data = ClipData(str(tmp_path), 16, batch_size=4, workers=0)
        trainer(tmp_path / f"o{len(runs)}", 9, callbacks=[seen], **options).fit(module(patch_size=(32, 4)), data)
        runs.append(seen.batches)
    assert runs[1] == runs[0]
    assert runs[0][3:6] != runs[0][:3]


class Probed(LightningModule):
    """Three batches an epoch; says in which it was validated, and may die."""

    def __init__(self, dies_at=None):
        super().__init__()
        self.layer, self.dies_at, self.validated = torch.nn.Linear(1, 1), dies_at, []

    def training_step(self, batch, batch_idx):
        assert self.global_step != self.dies_at
        return self.layer(batch).mean()

    def validation_step(self, batch, batch_idx):
        self.validated.append(self.current_epoch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.ones(3, 1), 1)

    val_dataloader = train_dataloader


class Best(Callback):
    """The epochs that were validated, as a checkpoint's best score is: in the checkpoint."""

    def __init__(self):
        self.epochs = []

    def on_validation_end(self, trainer, pl_module):
        self.epochs.append(trainer.current_epoch)

    def state_dict(self):
        return {"epochs": self.epochs}

    def load_state_dict(self, state):
        self.epochs = list(state["epochs"])


@pytest.mark.parametrize("dies_at", [4, 5, 7])
def test_resumed_at_an_epochs_end_its_validation_is_not_lost(dies_at, tmp_path):
    def fit(model, folder, checkpoint=None):
        best = Best()
        Trainer(
            max_epochs=3,
            callbacks=[best, LastCheckpoint(folder, 3)],
            plugins=[AtomicCheckpointIO()],
            logger=False,
            num_sanity_val_steps=0,
            enable_progress_bar=False,
            enable_model_summary=False,
            accelerator="cpu",
        ).fit(model, ckpt_path=checkpoint, weights_only=True)
        return best.epochs

    with pytest.raises(AssertionError):
        fit(Probed(dies_at), tmp_path)
    resumed = Probed()
    assert fit(resumed, tmp_path, str(tmp_path / "last.ckpt")) == [0, 1, 2]
    assert sorted(set(resumed.validated)) == ([1, 2] if dies_at < 6 else [2])


class Ask(Callback):
    """Asks for the end after a step, as a signal does."""

    def __init__(self, step, last):
        self.step, self.last = step, last

    def on_train_batch_end(self, trainer, *given):
        if trainer.global_step == self.step:
            self.last.stop(signal.SIGTERM)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"val_check_interval": 2},
        {"max_epochs": 9, "max_steps": 6},
        {"check_val_every_n_epoch": 2},
        {"accumulate_grad_batches": 2},
    ],
)
@pytest.mark.parametrize("every", [1, 100])
def test_a_run_that_is_stopped_anywhere_validates_as_one_that_is_not(every, options, tmp_path):
    def fit(folder, step=None, checkpoint=None):
        best, last = Best(), LastCheckpoint(folder, every)
        trainer = Trainer(
            **{"max_epochs": 2, "num_sanity_val_steps": 0, "logger": False, "accelerator": "cpu"} | options,
            callbacks=[best, Ask(step, last), last],
            plugins=[AtomicCheckpointIO()],
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Probed(), ckpt_path=checkpoint, weights_only=True)
        return best.epochs, trainer.global_step

    whole = fit(tmp_path)
    for step in range(1, whole[1] + 1):
        folder = tmp_path / str(step)
        with pytest.raises(StoppedError):
            fit(folder, step)
        assert fit(folder, checkpoint=str(folder / "last.ckpt")) == whole


@pytest.mark.parametrize("name", aape_ssl.MOVED)
def test_modules_are_found_under_the_names_that_they_had(name):
    now = importlib.import_module(f"aape_ssl.{aape_ssl.MOVED[name]}")
    assert importlib.import_module(f"aape_ssl.{name}") is now
    assert now.__spec__.name == now.__name__ == f"aape_ssl.{aape_ssl.MOVED[name]}"


def test_what_packages_held_as_modules_is_found():
    assert training.PretrainingModule is training.pretraining.PretrainingModule
    assert demo.bundled_clips()


def test_an_old_name_is_all_that_a_new_interpreter_needs():
    code = (
        "import aape_ssl.sources\n"
        "from aape_ssl import audio, loader\n"
        "from aape_ssl.sound import sources\n"
        "assert aape_ssl.sources is sources and sources.__spec__.name == 'aape_ssl.sound.sources'\n"
        "assert audio.load"
    )
    subprocess.run([sys.executable, "-W", "error::ImportWarning", "-c", code], check=True)


class Rates(Callback):
    """Those of the optimiser's steps."""

    def __init__(self):
        self.used = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.used.append(optimizer.param_groups[0]["lr"])


@pytest.mark.filterwarnings("ignore:max_steps. the checkpoint was made with")
def test_a_run_that_goes_on_for_longer_takes_the_longer_runs_rates(tmp_path):
    """The finished one would have gone on at 0."""
    whole, first, second = Rates(), Rates(), Rates()
    trainer(tmp_path / "whole", steps=8, callbacks=[whole]).fit(module(), Tensors())
    trainer(tmp_path, steps=4, callbacks=[first]).fit(module(), Tensors())
    resumed = trainer(tmp_path, steps=8, callbacks=[second])
    resumed.fit(module(), Tensors(), ckpt_path=str(tmp_path / "last.ckpt"), weights_only=True)
    assert len(first.used) == 4
    assert second.used == whole.used[4:]
