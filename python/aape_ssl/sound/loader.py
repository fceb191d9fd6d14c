"""Batches of log-mel crops whose order and content depend on (seed, epoch, index) alone; a loader that can be resumed.

They depend neither on the number of workers nor on how often the run was interrupted: every random number of a clip is
drawn from the clip's own generator.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from .._messages import unchanged, whole, within
from . import audio
from .audio import SAMPLE_RATE, FrontEnd
from .sources import Clip

__all__ = ["ClipLoader", "Crops", "TooManyFailedError", "features", "mix", "resize_crop"]

ORDER, CROP = 1, 2  # streams of random numbers; SeedSequence pads with zeros, so the tag comes first
Key = tuple[int, int]  # epoch, index
Batch = dict[str, Any]


class TooManyFailedError(RuntimeError):
    """More clips than allowed cannot be decoded; the message lists the first of them."""


def mix(log_mel: Tensor, other: Tensor, ratio: Tensor) -> Tensor:
    """ln((1 − λ) eˣ + λ eʸ): two clips heard together, as powers.

    log_mel, other (B, F, T); ratio λ (B) in [0, 1) -> (B, F, T). Source: BYOL-A's mixup.
    """
    ratio = ratio.view(-1, 1, 1)
    return torch.logaddexp(log_mel + torch.log1p(-ratio), other + torch.log(ratio))


def resize_crop(log_mel: Tensor, box: Tensor) -> Tensor:
    """A box of the spectrogram, stretched to its full size by bicubic interpolation.

    log_mel (B, F, T); box (B, 4): lower edge and height as shares of F, start and width as shares of T. -> (B, F, T).
    Stretching in time slows all modulation by the same factor. Source: after BYOL-A's random resize crop; boxes within
    the spectrogram are ours.
    """
    bottom, height, start, width = box.unbind(-1)
    nought = torch.zeros_like(bottom)
    # output coordinate u in [−1, 1] reads the input at size · u + (2 · edge + size − 1)
    rows = [width, nought, 2 * start + width - 1, nought, height, 2 * bottom + height - 1]
    x = log_mel.unsqueeze(1)
    grid = torch.nn.functional.affine_grid(torch.stack(rows, -1).view(-1, 2, 3), list(x.shape), align_corners=False)
    return torch.nn.functional.grid_sample(x, grid, "bicubic", "border", align_corners=False).squeeze(1)


def features(batch: Batch, front_end: FrontEnd, frames: int) -> Batch:
    """Waveforms of a batch (`Crops`) to {"log_mel": (B, 1, F, T) float32, normalised, "index": (B) int64}.

    Computed on the waveforms' device.
    """
    x = front_end.log_mel(batch["waveform"])[..., :frames]
    if "other" in batch:
        x = mix(x, front_end.log_mel(batch["other"])[..., :frames], batch["ratio"])
    x = front_end.normalise(x)
    if "box" in batch:
        x = resize_crop(x, batch["box"])
    return {"log_mel": x.unsqueeze(1), "index": batch["index"]}


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread, as in a worker: sums that are split over several threads differ in their last bits."""
    threads = torch.get_num_threads()
    if threads > 1:  # builds without OpenMP warn of every other call
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if threads > 1:
            torch.set_num_threads(threads)


class Crops(Dataset[Any]):
    """Random crops of clips, fetched a batch at a time by (epoch, index).

    A clip shorter than the crop is padded with zeros at its end. One that cannot be decoded is reported and replaced
    by another, drawn from those not in the batch, whose index the batch then has.

    Args:
        clips: the set.
        front_end: log-mel and its statistics.
        frames: T of a crop.
        seed: of crops, mixing and boxes.
        mix: largest share λ of another random clip, drawn uniformly from [0, mix) for each clip; 0: no mixing (the
            default). Decodes two files per clip.
        resize_crop: least height and width of the box for `resize_crop`, each drawn uniformly up to 1; 1: none (the
            default).
        waveforms: leave `features` to the caller, for a whole batch on the device.
        max_failed: share of the clips that may fail, but never all of them.
    """

    def __init__(
        self,
        clips: Sequence[Clip],
        front_end: FrontEnd,
        frames: int,
        *,
        seed: int = 0,
        mix: float = 0.0,
        resize_crop: float = 1.0,
        waveforms: bool = False,
        max_failed: float = 0.05,
    ) -> None:
        whole(1, frames=frames)
        whole(0, seed=seed)
        within("[0, 1]", mix=mix, max_failed=max_failed)
        within("(0, 1]", resize_crop=resize_crop)
        self.clips, self.front_end, self.frames, self.seed = list(clips), front_end, frames, seed
        self.mix, self.resize_crop, self.waveforms = mix, resize_crop, waveforms
        self.allowed = min(math.floor(max_failed * len(self.clips)), len(self.clips) - 1)
        self.samples = round(front_end.seconds(frames) * SAMPLE_RATE)

    def __len__(self) -> int:
        return len(self.clips)

    def waveform(self, index: int, at: float) -> Tensor:
        """The piece `at` (`audio.load`) of a clip, (samples), padded with zeros.

        Errors: `AudioError`, also for a clip that is shorter than a frame.
        """
        piece = self.front_end.check(self.clips[index].load(self.samples / SAMPLE_RATE, at)[: self.samples])
        return torch.nn.functional.pad(piece, (0, self.samples - len(piece)))

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        with _one_thread():
            failed: dict[int, str] = {}
            taken = {index for _, index in keys}
            batch = default_collate([self._crop(key, taken, failed) for key in keys])
            if len(failed) > self.allowed:
                batch = {}  # it may lack clips, and training stops anyway
            elif not self.waveforms:
                batch = features(batch, self.front_end, self.frames)
            return {**batch, "failed": failed}

    def _crop(self, key: Key, taken: set[int], failed: dict[int, str]) -> Batch:
        """What one clip has in a batch, before `features`."""
        rng = np.random.default_rng([CROP, self.seed, *key])
        # always all of them, so that no option moves the crops
        at, share, partner, at_partner, *sides = rng.random(8)
        index, waveform = self._decode(key[1], at, taken, rng, failed)
        crop = {"index": index, "waveform": waveform}
        if self.mix > 0:
            other = int(partner * len(self))
            crop |= {"other": waveform, "ratio": torch.tensor(self.mix * share, dtype=torch.float32)}
            try:
                crop["other"] = self.waveform(other, at_partner)
            except audio.AudioError as error:
                failed[other] = str(error)  # mixed with itself, the clip stays as it is
        if self.resize_crop < 1:
            height, width = (1 - (1 - self.resize_crop) * side for side in sides[:2])
            box = [sides[2] * (1 - height), height, sides[3] * (1 - width), width]
            crop["box"] = torch.tensor(box, dtype=torch.float32)
        return crop

    def _decode(
        self, wanted: int, at: float, taken: set[int], rng: np.random.Generator, failed: dict[int, str]
    ) -> tuple[int, Tensor]:
        """The wanted clip, or the first other that can be decoded: those already in the batch come last."""
        try:
            return wanted, self.waveform(wanted, at)
        except audio.AudioError as error:
            failed[wanted] = str(error)
        for other in sorted(rng.permutation(len(self)).tolist(), key=taken.__contains__):
            if len(failed) > self.allowed:
                break
            if other in failed:
                continue
            try:
                piece = self.waveform(other, at)
            except audio.AudioError as error:
                failed[other] = str(error)
                continue
            taken.add(other)
            return other, piece
        return wanted, torch.zeros(self.samples)  # nothing is left: the batch is thrown away


class _Order(Sampler[list[Key]]):
    """What is left of an epoch, as one process's batches.

    Separate from `ClipLoader`, which holds the DataLoader that holds this: in a reference cycle, workers would not be
    told to end before their pipes are closed, and would be waited for.
    """

    def __init__(self, place: Mapping[str, int], clips: int, seed: int, batch_size: int, rank: int, world: int) -> None:
        self.place, self.clips, self.seed, self.rank, self.shape = place, clips, seed, rank, (world, batch_size)

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, count = self.place["epoch"], self.clips // math.prod(self.shape)
        order = np.random.default_rng([ORDER, self.seed, epoch]).permutation(self.clips)
        mine = order[: count * math.prod(self.shape)].reshape(count, *self.shape)[self.place["given"] :, self.rank]
        return iter([[(epoch, index) for index in batch] for batch in mine.tolist()])


class ClipLoader:
    """Shuffled batches of `Crops`, each epoch in its own order; what is left over at the end of one is dropped.

    The batches of `world` processes, laid side by side, are those of one process with `world` times the size.
    Iterating again begins the next epoch. After `load_state_dict`, it continues with the batch after the last one that
    had been given when `state_dict` was called: the same bits, with any number of workers.

    Args:
        data: the crops.
        batch_size: clips of this process in a batch.
        workers: processes that load; 0 loads in this one.
        rank, world: which process this is, of how many.
        epoch: the one to begin with.
        limit: how many batches of an epoch are taken, or which share, as lightning's `limit_train_batches`: whether a
            resumed epoch was over depends on it. All unless given.

    Attributes:
        place: the epoch of the last batch, and how many of its batches have been given.
        failed: index and reason of every clip that could not be decoded.

    Errors: `ValueError` where the set is smaller than one batch over all processes. Iterating:
    `TooManyFailedError`.
    """

    def __init__(
        self,
        data: Crops,
        batch_size: int,
        *,
        workers: int = 0,
        rank: int = 0,
        world: int = 1,
        epoch: int = 0,
        limit: int | float = 1.0,
    ) -> None:
        whole(1, batch_size=batch_size)
        whole(0, workers=workers)
        self.step = batch_size * world
        if len(data) < self.step:
            raise ValueError(f"batch_size: expected at most the {len(data)} clips there are, got {self.step} in all")
        self.data, self.failed = data, dict[int, str]()
        self.place, self._resumed = {"epoch": epoch, "given": 0}, False
        self._taken = min(limit, len(self)) if isinstance(limit, int) else int(limit * len(self))
        self._loader = DataLoader(
            data,
            batch_sampler=_Order(self.place, len(data), data.seed, batch_size, rank, world),
            num_workers=workers,
            collate_fn=_as_is,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=workers > 0,
            generator=torch.Generator(),  # its own, so that the global one is left alone
        )

    def __len__(self) -> int:
        return len(self.data) // self.step

    def __iter__(self) -> Iterator[Batch]:
        if self.place["given"] and not (self._resumed and self.place["given"] < self._taken):
            self.place |= {"epoch": self.place["epoch"] + 1, "given": 0}
        self._resumed = False
        for batch in self._loader:
            self.failed |= batch.pop("failed")
            if len(self.failed) > self.data.allowed:
                raise TooManyFailedError(self.report(f", more than the {self.data.allowed} that max_failed allows"))
            self.place["given"] += 1
            yield batch

    def close(self) -> None:
        """End the workers now; iterating starts new ones."""
        iterator, self._loader._iterator = self._loader._iterator, None
        if iterator is not None:
            iterator._shutdown_workers()  # type: ignore[attr-defined]  # as Lightning does with a DataLoader's

    def report(self, remark: str = "", most: int | None = 10) -> str:
        """Which clips could not be decoded, one a line, at most so many; "" if none."""
        if not self.failed:
            return ""
        lines = [f"{len(self.failed)} of {len(self.data)} clips could not be decoded{remark}:"]
        lines += [f"  {self.data.clips[index].name}: {why}" for index, why in sorted(self.failed.items())[:most]]
        return "\n".join([*lines, "  ..."] if most is not None and len(self.failed) > most else lines)

    def state_dict(self) -> dict[str, Any]:
        """Its place, in plain numbers and strings for `torch.load(weights_only=True)`."""
        return {**self.place, "failed": dict(self.failed), **self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`.

        Errors: `ValueError` if the clips, the seed or the batch size over all processes differ.
        """
        unchanged(state, **self._identity())
        self.place |= {name: state[name] for name in self.place}
        self.failed = dict(state["failed"])
        self._resumed = True

    def _identity(self) -> dict[str, Any]:
        names = "\n".join(clip.name for clip in self.data.clips)
        clips = f"{len(self.data)} clips ({hashlib.sha256(names.encode()).hexdigest()[:12]})"
        of_clips = {"clips": clips, "seed": self.data.seed, "clips a batch over all processes": self.step}
        return of_clips | {"mix": self.data.mix, "resize_crop": self.data.resize_crop}


def _as_is(batch: Any) -> Any:
    return batch
