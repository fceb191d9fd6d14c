"""Clips for Lightning: a LightningDataModule around `ClipLoader`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from torch import Tensor

from .._lightning import LightningDataModule
from .._messages import one_of, unchanged, whole
from .audio import FRONT_ENDS, AudioError, FrontEnd, measure
from .loader import ClipLoader, Crops, features
from .sources import Clip, SourceError, find

__all__ = ["ClipData", "CropsData"]

MEASURED = 512  # clips; at 2 s each 17 minutes of sound


class CropsData(LightningDataModule):
    """Trains on `Crops` of clips, a share of them per process. When training ends, workers do too, and the clips that
    could not be decoded are listed on stderr.

    Args:
        front_end: log-mel and its statistics.
        batch_size: clips of one process in a batch.
        workers: loading processes; 0 loads in the training process.
        crops: further arguments of `Crops`.
    """

    def __init__(self, front_end: FrontEnd, batch_size: int, workers: int, **crops: Any) -> None:
        super().__init__()
        whole(1, frames=crops["frames"], batch_size=batch_size)
        whole(0, workers=workers)
        self.front_end, self.batch_size, self.workers = front_end, batch_size, workers
        self.frames: int = crops["frames"]
        self.crops_options = crops
        self.loader: ClipLoader | None = None

    def crops_of(self, clips: Sequence[Clip]) -> ClipLoader:
        """A loader from the trainer's epoch on, replacing the previous one (`reload_dataloaders_every_n_epochs`)."""
        trainer, before = self.trainer, self.loader
        rank, world, epoch = (trainer.global_rank, trainer.world_size, trainer.current_epoch) if trainer else (0, 1, 0)
        crops = Crops(clips, self.front_end, **self.crops_options)
        self.loader = ClipLoader(
            crops,
            self.batch_size,
            workers=self.workers,
            rank=rank,
            world=world,
            epoch=epoch,
            limit=trainer.limit_train_batches if trainer else 1.0,
        )
        if before:
            before.close()
            self.loader.failed |= before.failed
        return self.loader

    def teardown(self, stage: str | None = None) -> None:
        """End the workers, and list the clips that could not be decoded."""
        if self.loader:
            self.loader.close()
            if report := self.loader.report():
                print(report, file=sys.stderr)


class ClipData(CropsData):
    """Random log-mel crops of a set of clips, to pre-train on.

    A batch is {"log_mel": (B, 1, F, frames) float32, normalised, "index": (B) int64}; what it holds depends only on
    seed, epoch and index (`Crops`). Checkpoints hold the loader's place, by Lightning's protocol for stateful loaders,
    and the statistics: a resumed run continues with the same bits.

    Args:
        data: a folder, a `.csv` manifest, or `.tar` shards (`sources.find`).
        frames: T of a crop; 208 are 2.1 s.
        front_end: a name in `FRONT_ENDS`.
        statistics: to normalise by: the front end's own ("preset"), "data" for those of 512 random crops of these
            clips, or (mean, std).
        splits: only the manifest's clips of these splits or folds; all unless given.
        batch_size: clips of one process in a batch.
        workers: loading processes; 0 loads in the training process.
        seed: of order and crops.
        mix: largest share of another clip mixed in, as powers; 0, the default, for none.
        resize_crop: least height and width of the box that is stretched to the full crop; 1, the default, for none.
        on_device: compute log-mels on the device for the whole batch; by default, workers do.
        max_failed: training stops when more than this share of the clips cannot be decoded.

    Errors: `ValueError` that names the argument or the file.
    """

    def __init__(
        self,
        data: str,
        frames: int = 208,
        front_end: str = "audioset128",
        statistics: Literal["preset", "data"] | tuple[float, float] = "preset",
        splits: list[str] | None = None,
        batch_size: int = 64,
        workers: int = 2,
        seed: int = 0,
        mix: float = 0.0,
        resize_crop: float = 1.0,
        on_device: bool = False,
        max_failed: float = 0.05,
    ) -> None:
        one_of(FRONT_ENDS, front_end=front_end)
        if isinstance(statistics, str) and statistics not in ("preset", "data"):
            raise ValueError(f"statistics: expected preset, data or (mean, std), got {statistics!r}")
        of = FRONT_ENDS[front_end]
        super().__init__(
            of if isinstance(statistics, str) else of.by(statistics),
            batch_size,
            workers,
            frames=frames,
            seed=seed,
            mix=mix,
            resize_crop=resize_crop,
            waveforms=on_device,
            max_failed=max_failed,
        )
        self.front_end_name, self.data, self.statistics, self.splits = front_end, data, statistics, splits
        self.clips: list[Clip] = []

    def setup(self, stage: str | None = None) -> None:
        """Find the clips, and measure their statistics where they were asked for."""
        if self.clips:
            return
        self.clips = find(self.data, self.splits)
        if self.statistics == "data":
            self.front_end = measure(self.front_end, self._sample())

    def _sample(self) -> Iterator[Tensor]:
        rng = np.random.default_rng([self.crops_options["seed"]])
        failed: dict[str, str] = {}
        for index in rng.permutation(len(self.clips))[:MEASURED].tolist():
            try:
                # as long as the clip is: zeros after a short one are not data
                yield self.clips[index].load(self.front_end.seconds(self.frames), rng.random())
            except AudioError as error:  # reported when training meets it
                failed[self.clips[index].name] = str(error)
        if len(failed) == min(len(self.clips), MEASURED):
            name, why = next(iter(failed.items()))
            raise SourceError(f"{self.data}: none of {len(failed)} clips could be decoded: {name}: {why}")

    def train_dataloader(self) -> ClipLoader:
        """The loader; with several processes, this one's share of it."""
        self.setup()
        return self.crops_of(self.clips)

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int = 0) -> dict[str, Any]:
        """Waveforms to log-mels, where workers left that to the device."""
        return features(batch, self.front_end, self.frames) if "waveform" in batch else batch

    def state_dict(self) -> dict[str, Any]:
        """What the encoder's input is; the loader keeps its own place."""
        statistics = {"mean": self.front_end.mean, "std": self.front_end.std}
        return {"front_end": self.front_end_name, "frames": self.frames, **statistics}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The statistics that the run began with.

        Errors: `ValueError` for another front end or length, or where other statistics were given as numbers.
        """
        unchanged(state, front_end=self.front_end_name, frames=self.frames)
        statistics = (state["mean"], state["std"])
        if not isinstance(self.statistics, str):
            unchanged({"statistics": statistics}, statistics=tuple(map(float, self.statistics)))
        self.front_end = self.front_end.by(statistics)
