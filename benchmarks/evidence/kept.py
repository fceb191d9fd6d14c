"""Clips for training whose log-mels are in memory: decoding took half of a step's time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aape_ssl.sound.audio import FRONT_ENDS, FrontEnd
from aape_ssl.sound.loader import CROP, Batch, ClipLoader, Crops, Key
from aape_ssl.sound.sources import Clip
from aape_ssl.training.finetuning import LabelledClips

from .spectrograms import Spectrograms

__all__ = ["FRONT_END", "KeptClips", "KeptCrops"]

FRONT_END: FrontEnd = FRONT_ENDS["audioset128"]


class KeptCrops(Crops):
    """Clips in memory, each delayed by 0 to `shifts` − 1 frames at random, by the random numbers of `Crops`.

    The clips are about as long as a crop, so that a crop of `Crops` would always begin where its clip does: shifts
    against the patch grid, which longer sound brings by itself, would be missing.
    """

    def __init__(self, clips: Sequence[Clip], kept: Spectrograms, seed: int) -> None:
        super().__init__(clips, FRONT_END, kept.frames, seed=seed)
        self.kept, self.rows = kept, kept.rows(clips)

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        drawn = [np.random.default_rng([CROP, self.seed, *key]).random() for key in keys]
        index = np.array([index for _, index in keys])
        x, _ = self.kept.at(self.rows[index], (np.array(drawn) * self.kept.shifts).astype(np.int64))
        return {"log_mel": x, "index": torch.from_numpy(index), "failed": {}}


class KeptClips(LabelledClips):
    """`LabelledClips` from memory: shifted at random to train on, and as they are to validate and test on."""

    def __init__(self, data: Path, checkpoint: Path, kept: Spectrograms, seed: int, **options: Any) -> None:
        super().__init__(str(data), str(checkpoint), frames=kept.frames, seed=seed, workers=0, **options)
        self.kept, self.seed = kept, seed

    def setup(self, stage: str | None = None) -> None:
        """Read the manifest; of a trial's few clips, one batch an epoch."""
        super().setup(stage)
        self.batch_size = min(self.batch_size, len(self.train))

    def train_dataloader(self) -> ClipLoader:
        """Shifted clips."""
        return ClipLoader(KeptCrops(self.train, self.kept, self.seed), self.batch_size)

    def windows(self, clips: Sequence[Clip]) -> Any:
        """Batches of clips."""
        rows, index = self.kept.rows(clips), torch.arange(len(clips))
        batches = [
            {"log_mel": self.kept.at(rows[part], np.zeros_like(rows[part]))[0], "index": part}
            for part in index.split(self.batch_size)
        ]
        # a list would be several loaders to Lightning
        return torch.utils.data.DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
