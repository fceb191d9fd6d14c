"""Pre-training and fine-tuning with the product's own modules, on log-mels that are kept in memory.

Objective, optimiser, schedule, masks, order of the clips and Lightning's loop are `aape_ssl`'s: what differs from
`aape-ssl pretrain` and `finetune` is that log-mels were computed once, that clips are shifted by whole frames
(`KeptCrops`), and that nothing is written while a run of minutes goes on.
"""

from __future__ import annotations

import copy
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from aape_kernels import AaPE
from aape_ssl._lightning import Callback, LightningModule, Trainer
from aape_ssl.method.masks import MaskSampler
from aape_ssl.saved.pretrained import AudioEncoder
from aape_ssl.sound.loader import ClipLoader
from aape_ssl.sound.sources import Clip
from aape_ssl.training.commands import PRESETS
from aape_ssl.training.finetuning import FinetuningModule, predict
from aape_ssl.training.monitor import Monitor
from aape_ssl.training.pretraining import PretrainingModule

from .configurations import Configuration
from .kept import FRONT_END, KeptClips, KeptCrops
from .spectrograms import Spectrograms

__all__ = ["OutOfTimeError", "Recipe", "Tuned", "exported", "finetune", "pretrain", "untrained"]

PRESET = PRESETS["laptop"]


class OutOfTimeError(RuntimeError):
    """The time that was given is over."""


@dataclass(frozen=True)
class Recipe:
    """What all configurations have in common.

    Attributes:
        steps, batch_size: of pre-training; the rest is the preset `laptop`'s, warm-up a tenth of the steps and at most
            the preset's.
        frames: that an encoder is pre-trained on.
        epochs: of fine-tuning, the best of which on validation is kept; the rest is `FinetuningModule`'s.
        tuning_batch_size: of fine-tuning.
    """

    steps: int
    batch_size: int = 32
    frames: int = 128
    epochs: int = 8
    tuning_batch_size: int = 16

    def key(self, tuning: bool) -> dict[str, Any]:
        """What results depend on; the fields of fine-tuning where it is one's."""
        own = {name: value for name, value in asdict(self).items() if tuning or name not in ("epochs", TUNING)}
        return {**own, "preset": model_options()}


TUNING = "tuning_batch_size"


@cache
def _preset() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(PRESET.read_text(encoding="utf-8"))
    return content


def model_options() -> dict[str, Any]:
    """The preset's, of model and gradient."""
    return {**_preset()["model"], "gradient_clip_val": _preset()["trainer"]["gradient_clip_val"]}


def dim() -> int:
    """D of the preset."""
    return int(_preset()["model"]["size"][0])


class Deadline(Callback):
    """Ends a run when the time, in seconds since the epoch, is over."""

    def __init__(self, until: float) -> None:
        super().__init__()
        self.until = until

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        """Look at the clock."""
        if time.time() > self.until:
            raise OutOfTimeError


def _trainer(accelerator: str, until: float, callbacks: Sequence[Callback], **options: Any) -> Trainer:
    return Trainer(
        accelerator=accelerator,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[Deadline(until), *callbacks],
        **options,
    )


class Adapting(PretrainingModule):
    """`PretrainingModule` with a learning rate, and a beginning, of its own for AaPE's encoder.

    Args:
        encoder_rate, encoder_from: of `Configuration`.
        options: of `PretrainingModule`.
    """

    def __init__(self, encoder_rate: float, encoder_from: float, **options: Any) -> None:
        super().__init__(**options)
        self.encoder_rate, self.encoder_from = encoder_rate, encoder_from

    def configure_optimizers(self) -> Any:
        """As there, with groups for the encoder."""
        found = super().configure_optimizers()
        stem = self.objective.student.stem
        if not isinstance(stem, AaPE) or (self.encoder_rate, self.encoder_from) == (1, 0):
            return found
        own = {id(parameter) for parameter in stem.encoder.parameters()}
        optimizer, schedule = found["optimizer"], found["lr_scheduler"]["scheduler"].lr_lambdas[0]
        start = round(self.encoder_from * self.trainer.max_steps)

        def late(step: int) -> float:
            return self.encoder_rate * float(schedule(step)) if step >= start else 0.0

        groups = [
            {**group, "params": [p for p in group["params"] if (id(p) in own) == inside]}
            for inside in (False, True)
            for group in optimizer.param_groups
        ]
        rates = [schedule] * 2 + [late] * 2
        kept = [(group, rate) for group, rate in zip(groups, rates, strict=True) if group["params"]]
        optimizer = torch.optim.AdamW([group for group, _ in kept], lr=self.lr, betas=self.betas)
        of_groups = torch.optim.lr_scheduler.LambdaLR(optimizer, [rate for _, rate in kept])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": of_groups, "interval": "step"}}


def untrained(configuration: Configuration, seed: int, recipe: Recipe) -> Adapting:
    """A module as pre-training starts with it.

    Of one seed all configurations of one patch size start with the same weights but for the stem's branch: the plain
    convolution's patch embedding, layers, predictor and projection.
    """
    options = {name: value for name, value in _preset()["model"].items() if name != "masks"}
    options |= {name: tuple(value) for name, value in options.items() if isinstance(value, list)}
    options["masks"] = MaskSampler(**_preset()["model"]["masks"], seed=seed)
    options["warmup_steps"] = min(options["warmup_steps"], max(1, recipe.steps // 10))
    options["patch_size"] = configuration.patch

    def module(stem: str, stem_options: dict[str, Any] | None, seed: int) -> Adapting:
        torch.manual_seed(seed)
        own = {"stem": stem, "stem_options": stem_options}
        return Adapting(configuration.encoder_rate, configuration.encoder_from, **options, **own)

    made = module(configuration.stem, configuration.options or None, seed)
    made.load_state_dict(module("conv", None, seed).state_dict(), strict=False)
    if configuration.w2_std is not None:
        for encoder in (made.objective.student, made.objective.teacher):
            assert isinstance(encoder.stem, AaPE)
            torch.manual_seed(seed)  # the teacher starts as the student
            torch.nn.init.normal_(encoder.stem.encoder.w2, std=configuration.w2_std)
    return made


def exported(module: PretrainingModule, recipe: Recipe) -> AudioEncoder:
    """Its teacher, as `aape-ssl export` gives it."""
    options = {name: module.options[name] for name in ("size", "stem", "patch_size", "stem_options")}
    statistics = (FRONT_END.mean, FRONT_END.std)
    encoder = AudioEncoder(**options, front_end="audioset128", statistics=statistics, frames=recipe.frames)
    encoder.encoder.load_state_dict(module.objective.teacher.state_dict())
    return encoder.eval()


def pretrain(
    configuration: Configuration,
    seed: int,
    recipe: Recipe,
    clips: Sequence[Clip],
    kept: Spectrograms,
    folder: Path,
    accelerator: str = "cpu",
    until: float = float("inf"),
) -> dict[str, float]:
    """Pre-train on all of `clips`, leave the teacher in `folder`, and say how it went.

    Returns steps/s and, after the last step, the losses and the monitor's diagnostics.

    Errors: `OutOfTimeError`.
    """
    module = untrained(configuration, seed, recipe)
    monitor = Monitor(recipe.steps)
    options = {"max_steps": recipe.steps, "gradient_clip_val": model_options()["gradient_clip_val"]}
    loader = ClipLoader(KeptCrops(clips, kept, seed), recipe.batch_size)
    trainer = _trainer(accelerator, until, [monitor], **options, log_every_n_steps=recipe.steps)
    started = time.monotonic()
    trainer.fit(module, loader)
    seconds = time.monotonic() - started
    part = folder.with_name(f"{folder.name}.{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    exported(module.cpu(), recipe).save_pretrained(part)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)
    losses = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return {"seconds": seconds, "steps_per_second": recipe.steps / seconds, **losses, **monitor.last}


class BestEpoch(Callback):
    """The weights of the epoch that is best on validation; of equal ones the first's."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy, self.epoch, self.weights = -1.0, -1, dict[str, Tensor]()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep them."""
        accuracy = float(trainer.callback_metrics["valid/accuracy"])
        if accuracy > self.accuracy:
            self.accuracy, self.epoch = accuracy, trainer.current_epoch
            self.weights = copy.deepcopy(pl_module.state_dict())


@dataclass(frozen=True)
class Tuned:
    """A fine-tuning.

    Attributes:
        correct: of each test clip, in the manifest's order.
        valid: accuracy on validation of the epoch that was kept.
        epoch: which it was, from 0.
        seconds: how long it took.
    """

    correct: list[bool]
    valid: float
    epoch: int
    seconds: float


def finetune(
    checkpoint: Path,
    manifest: Path,
    held_out: str,
    seed: int,
    recipe: Recipe,
    kept: Spectrograms,
    accelerator: str = "cpu",
    until: float = float("inf"),
) -> Tuned:
    """Fine-tune a whole encoder with `FinetuningModule`, keep its best epoch on validation, and test that once.

    Errors: `OutOfTimeError`.
    """
    torch.manual_seed(seed)
    data = KeptClips(manifest, checkpoint, kept, seed, test=held_out, batch_size=recipe.tuning_batch_size)
    module, best = FinetuningModule(str(checkpoint)), BestEpoch()
    trainer = _trainer(accelerator, until, [best], max_epochs=recipe.epochs, log_every_n_steps=10**9)
    started = time.monotonic()
    trainer.fit(module, datamodule=data)
    module.load_state_dict(best.weights)
    assert module.model is not None
    logits = predict(module.model, data, trainer.strategy.root_device)
    correct = logits.argmax(1) == data.targets(data.test).numpy().argmax(1)
    return Tuned(correct.tolist(), best.accuracy, best.epoch, time.monotonic() - started)
