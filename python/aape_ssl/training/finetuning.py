"""Fine-tuning as a LightningModule, and the labelled clips that it trains on."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from .._lightning import (
    FSDPStrategy,
    ModelParallelStrategy,
    MulticlassAccuracy,
    MultilabelAveragePrecision,
)
from .._messages import within
from ..evaluation import probe
from ..evaluation.embedding import first_window
from ..saved.pretrained import AudioEncoder, load
from ..sound.data import CropsData
from ..sound.loader import ClipLoader
from ..sound.sources import Clip, find
from .optimisation import adamw, check_rates, grouped
from .steps import SteppingModule

__all__ = ["FinetuningModule", "LabelledClips", "mean_average_precision", "predict"]

PADDING = -1  # in place of a class: such clips do not count


class LabelledClips(CropsData):
    """Labelled clips of a manifest: random crops to train on, the beginning of each clip to validate and test on.

    Args:
        data: a `.csv` manifest with the columns file, label, split (train, valid, test) or fold, and group.
        checkpoint: whose front end prepares the clips.
        test: the fold to hold out; the next one (for the last, the first) validates. "test" for a manifest with splits.
        frames: T of a crop, and of what is validated on; as in pre-training unless given.
        multi_label: clips have several labels, separated by ";".
        batch_size: clips of one process in a batch.
        workers: loading processes; 0 loads in the training process.
        seed: of order and crops.
        resize_crop: least height and width of the box that is stretched to the full crop; 1, the default, for none.
        max_failed: training stops when more than this share of its clips cannot be decoded.

    Attributes:
        labels: the classes, sorted; set by `setup`, as are `train`, `valid` and `test`, lists of clips.

    Errors: `ValueError` naming the argument; `AudioError` if a clip to validate or test on cannot be decoded.
    """

    def __init__(
        self,
        data: str,
        checkpoint: str,
        test: str = "test",
        frames: int | None = None,
        multi_label: bool = False,
        batch_size: int = 64,
        workers: int = 2,
        seed: int = 0,
        resize_crop: float = 1.0,
        max_failed: float = 0.05,
    ) -> None:
        encoder = load(checkpoint)
        super().__init__(
            encoder.front_end,
            batch_size,
            workers,
            frames=encoder.frames if frames is None else frames,
            seed=seed,
            resize_crop=resize_crop,
            max_failed=max_failed,
        )
        self.data, self.held_out, self.multi_label = data, test, multi_label
        self.labels: tuple[str, ...] = ()
        self._place: Mapping[str, Any] | None = None

    def setup(self, stage: str | None = None) -> None:
        """Read the manifest."""
        clips = find(self.data)
        probe.check_labels(clips, self.data)
        self.labels = tuple(sorted({label for clip in clips for label in self.labels_of(clip)}))
        if len(self.labels) < 2:
            raise ValueError(f"data: expected at least two labels, got {', '.join(self.labels)}")
        (parts,) = probe.folds_of(clips, [self.held_out])
        self.train, self.valid, self.test = ([clips[index] for index in part] for part in parts)
        tested = [*self.valid, *self.test]
        of = [[label for clip in part for label in self.labels_of(clip)] for part in (self.train, tested)]
        probe.warn_of_unseen(*of)
        if not self.multi_label:
            probe.warn_of_several(clips, "multi_label takes it for several")
        for clip in tested:  # now, not at the end of a training
            first_window(clip, self.front_end, self.frames)

    def labels_of(self, clip: Clip) -> list[str]:
        """One label, or several for multi-label clips."""
        labels = [label.strip() for label in clip.label.split(";")] if self.multi_label else [clip.label]
        if "" in labels:
            raise ValueError(f"data: expected labels separated by ;, {clip.name} has {clip.label!r}")
        return labels

    def targets(self, clips: Sequence[Clip]) -> Tensor:
        """(clips, classes) float32: 1 for each clip's labels, else 0."""
        number = {label: i for i, label in enumerate(self.labels)}
        targets = torch.zeros(len(clips), len(number))
        for row, clip in zip(targets, clips, strict=True):
            row[[number[label] for label in self.labels_of(clip)]] = 1
        return targets

    @property
    def batches_per_epoch(self) -> int:
        """Batches of this process, as many as the trainer's limit leaves; what is left over is dropped."""
        world, limit = (self.trainer.world_size, self.trainer.limit_train_batches) if self.trainer else (1, 1.0)
        batches = len(self.train) // (self.batch_size * world)
        return min(batches, limit) if isinstance(limit, int) else int(batches * limit)

    def identity(self) -> dict[str, Any]:
        """What makes a training on these clips this one, besides its loader's own: who is what, and who validates."""
        said = "\n".join(f"{clip.name} {clip.label}" for part in (self.train, self.valid) for clip in part)
        clips = f"{len(self.train)} clips and {len(self.valid)} to validate on"
        data = f"{clips} ({hashlib.sha256(said.encode()).hexdigest()[:12]})"
        return {"multi_label": self.multi_label, "data": data}

    def train_dataloader(self) -> ClipLoader:
        """Random crops {"log_mel": (B, 1, F, T), "index": (B)}, as in pre-training; this process's share of them."""
        loader = self.crops_of(self.train)
        if self._place is not None:
            loader.load_state_dict(self._place)
            self._place = None
        return loader

    def state_dict(self) -> dict[str, Any]:
        """The loader's place: Lightning restores none from a checkpoint at an epoch's end."""
        return {"loader": self.loader.state_dict()} if self.loader else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Keep the place for the loader that is yet to be made."""
        self._place = state.get("loader")

    def val_dataloader(self) -> Any:
        """Batches of the same form, of the clips to validate on, in their order."""
        return self.windows(self.valid)

    def windows(self, clips: Sequence[Clip]) -> Any:
        """Batches of the beginnings of clips, {"log_mel": (B, 1, F, T), "index": (B)}."""
        return torch.utils.data.DataLoader(
            _Windows(clips, self), self.batch_size, num_workers=self.workers, persistent_workers=self.workers > 0
        )


class _Windows(torch.utils.data.Dataset[dict[str, Any]]):
    def __init__(self, clips: Sequence[Clip], data: LabelledClips) -> None:
        self.clips, self.front_end, self.frames = clips, data.front_end, data.frames

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"log_mel": first_window(self.clips[index], self.front_end, self.frames), "index": index}


class FinetuningModule(SteppingModule):
    """Trains the encoder of a checkpoint and a linear head on its pooled tokens, on `LabelledClips`.

    Cross-entropy, or binary cross-entropy of each class for multi-label clips. AdamW, warm-up and cosine
    (`warmup_cosine`) over all steps of the trainer's `max_epochs` or `max_steps`, one of which must be given; of both,
    whichever ends first. Layer l of L learns at lr · layer_decay^(L + 1 − l), the stem being layer 0 and the head
    L + 1. No decay of biases, norms or the stem's `no_weight_decay()`. Logs `valid/accuracy`, or `valid/map` (macro
    average over the classes that occur) for multi-label clips.

    Args:
        checkpoint: of pre-training (its teacher), or an exported folder.
        lr: of the head, for the batch as it is.
        layer_decay: in (0, 1]; 1 for one rate everywhere.
        betas: AdamW's.
        weight_decay: AdamW's.
        warmup: share of all steps.
        label_smoothing: of the cross-entropy.

    Errors: `ValueError` naming the argument; `NonFiniteError` while training. Loading a checkpoint that was made with
    other options, clips, labels or an encoder of another kind is a `ValueError` that names them.
    Source: BEiT's and MAE's fine-tuning (layer decay, AdamW (.9, .999)); the defaults' values are ours.
    """

    def __init__(
        self,
        checkpoint: str,
        lr: float = 1e-3,
        layer_decay: float = 0.75,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.05,
        warmup: float = 0.1,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.options = {name: value for name, value in locals().items() if name in OPTIONS}
        check_rates(lr, betas, weight_decay)
        within("(0, 1]", layer_decay=layer_decay)
        within("[0, 1)", warmup=warmup, label_smoothing=label_smoothing)
        self.checkpoint, self.lr, self.layer_decay = checkpoint, lr, layer_decay
        self.betas, self.weight_decay, self.warmup, self.label_smoothing = betas, weight_decay, warmup, label_smoothing
        self.model: AudioEncoder | None = None

    @property
    def clips(self) -> LabelledClips:
        """The clips that it trains on."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, LabelledClips)
        return data

    def configure_model(self) -> None:
        """The encoder with a head for the labels, which are known once the data is set up."""
        if self.model is not None:
            return
        if isinstance(self.trainer.strategy, FSDPStrategy | ModelParallelStrategy):
            raise ValueError(f"strategy: expected one that shards nothing, such as ddp, got {self.trainer.strategy}")
        self.check_precision()
        pretrained, data = load(self.checkpoint), self.clips
        if data.multi_label and self.label_smoothing:
            raise ValueError(f"label_smoothing: expected 0 for clips of several labels, got {self.label_smoothing}")
        pretrained.encoder.check_frames(data.frames)
        config = {**pretrained.config, "labels": data.labels, "frames": data.frames}
        self.model = AudioEncoder(**config)
        self.model.encoder.load_state_dict(pretrained.encoder.state_dict())
        torch.nn.init.trunc_normal_(self.model.head.weight, std=0.01)  # type: ignore[arg-type]
        torch.nn.init.zeros_(self.model.head.bias)  # type: ignore[arg-type]
        # in JSON's terms: an exported folder has lists where a checkpoint has tuples
        self.options = json.loads(json.dumps({**self.options, **self.model.config, **data.identity()}))
        count = len(data.labels)
        self.name = "map" if data.multi_label else "accuracy"
        self.quality = (
            MultilabelAveragePrecision(count, average=None, ignore_index=PADDING)
            if data.multi_label
            else MulticlassAccuracy(count, average="micro", ignore_index=PADDING)
        )
        self._train: Tensor
        self._valid: Tensor
        self.register_buffer("_train", data.targets(data.train), persistent=False)
        self.register_buffer("_valid", data.targets(data.valid), persistent=False)
        self._occurs: Tensor  # of the classes, in the clips that were validated on
        self.register_buffer("_occurs", torch.zeros(count, dtype=torch.bool), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised log-mel (B, 1, F, T) -> logits (B, classes)."""
        assert self.model is not None
        return self.model(x)  # type: ignore[no-any-return]

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """The loss of one batch of crops."""
        logits, targets = self(batch["log_mel"]).float(), self._train[batch["index"]]
        if self.clips.multi_label:
            loss = F.binary_cross_entropy_with_logits(logits, targets)
        else:
            loss = F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(logits), sync_dist=True)
        return self.accumulated(loss, batch_idx)

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Scores of one batch of clips; each clip counts once, whatever the number of processes."""
        index, trainer = batch["index"], self.trainer
        logits, targets = self(batch["log_mel"]).float(), self._valid[index]
        # as probabilities: given scores, it would guess batch by batch whether they are
        scores, classes = (logits.sigmoid(), targets.long()) if self.clips.multi_label else (logits, targets.argmax(1))
        # of w processes, r has clips r, r + w, …, and some have another's once more, so that all have equally many
        classes[index % trainer.world_size != trainer.global_rank] = PADDING
        self.quality.update(scores, classes)
        self._occurs |= targets.bool().any(0)

    def on_validation_epoch_end(self) -> None:
        """The score of all clips; for multi-label clips, its mean over the classes that occur in them."""
        found = self.quality.compute()
        if self.clips.multi_label:
            occurs = self.trainer.strategy.reduce(self._occurs.int(), reduce_op="sum")
            found = found[occurs > 0].mean()
        self.quality.reset()
        self._occurs.zero_()
        self.log(f"valid/{self.name}", found, prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> Any:
        """AdamW with one rate per layer, and warm-up and cosine over all steps."""
        trainer, data = self.trainer, self.clips
        # not `estimated_stepping_batches`: it sets the loader up before a resumed run has its place
        an_epoch = -(-data.batches_per_epoch // trainer.accumulate_grad_batches)
        given = ((trainer.max_steps, 1), (trainer.max_epochs or -1, an_epoch))
        ends = [count * each for count, each in given if count > 0]
        if not ends:
            raise ValueError("max_epochs: expected a number of epochs, at whose end the learning rate is 0")
        steps = min(ends)
        return adamw(self._groups(), self.betas, round(self.warmup * steps), steps)

    def _groups(self) -> list[dict[str, Any]]:
        assert self.model is not None
        last = len(self.model.encoder.layers) + 1

        def rate(name: str) -> float:
            return self.lr * self.layer_decay ** (last - _depth(name, last))

        return grouped(self.model, rate, self.model.no_weight_decay(), self.weight_decay)


OPTIONS = frozenset(inspect.signature(FinetuningModule).parameters) - {"checkpoint"}
"""What makes a run this one; the checkpoint may have moved: what it holds counts."""


def _depth(name: str, last: int) -> int:
    """Depth of a parameter of `AudioEncoder`: 0 for the stem, 1 … L for the layers, `last` for last norm and head."""
    part, _, rest = name.removeprefix("encoder.").partition(".")
    return 0 if part == "stem" else int(rest.partition(".")[0]) + 1 if part == "layers" else last


def mean_average_precision(scores: NDArray[np.float32], targets: NDArray[np.float32]) -> float:
    """Average precision of each class, averaged over the classes that occur in targets; both (clips, classes)."""
    from sklearn.metrics import average_precision_score

    occur = targets.any(0)
    return float(average_precision_score(targets[:, occur], scores[:, occur], average="macro"))


@torch.inference_mode()
def predict(encoder: AudioEncoder, data: LabelledClips, device: torch.device | str = "cpu") -> NDArray[np.float32]:
    """Logits (clips, classes) of the held-out clips."""
    encoder = encoder.to(device).eval()
    return torch.cat([encoder(batch["log_mel"].to(device)).cpu() for batch in data.windows(data.test)]).numpy()
