"""Log-mels of a task's clips, decoded once for all encoders and shifts, and features of them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aape_ssl.evaluation.embedding import Encoder, cache_folder, named, own_columns, pool
from aape_ssl.sound.audio import SAMPLE_RATE, FrontEnd
from aape_ssl.sound.sources import Clip

__all__ = ["SHIFTS", "Spectrograms", "features"]

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
SHIFTS = 16  # of the clip against the patch grid, 0 to 15 frames: all there are for patches of 16
VERSION = 1  # to be raised whenever other log-mels come out


@dataclass(frozen=True)
class Spectrograms:
    """Normalised log-mels of clips at every shift, (n, F, frames + shifts − 1).

    Silence of shifts − 1 frames, the clip, silence: a clip delayed by s frames is the slice that begins at frame
    shifts − 1 − s, to the same values as from its delayed waveform. At shift 0 the same as `embedding.embed` sees, but
    that a front end which reflects the waveform at its ends (`m2d80`) sees silence before the clip here.

    Attributes:
        log_mels: float32, on the disk (a read-only memory map).
        lengths: (n) of the clips in frames, not rounded.
        paths: of the clips' files, resolved.
        frames: that an encoder looks at; `dataclasses.replace` makes them fewer.
        shifts: how many there are, from 0 on.
        about: front end, frames, shifts, version, and a digest of the clips: all that the values depend on.
    """

    log_mels: Floats
    lengths: NDArray[np.float64]
    paths: tuple[Path, ...]
    frames: int
    shifts: int
    about: dict[str, Any]

    @classmethod
    def of(
        cls,
        clips: Sequence[Clip],
        front_end: FrontEnd,
        frames: int = 128,
        shifts: int = SHIFTS,
        cache: Path | None = None,
    ) -> Spectrograms:
        """Of these clips, in their order; from the cache where it has those of the same content.

        Args:
            clips: those of all tasks may be given at once: see `rows`.
            front_end: whose normalisation they get.
            frames: that an encoder looks at.
            shifts: how many there are, from 0 on.
            cache: folder; `embedding.cache_folder()` unless given.

        Errors: `AudioError` naming the first clip that cannot be decoded; none is left out.
        """
        paths = tuple(clip.path.resolve() for clip in clips)
        about = {
            "version": VERSION,
            "front_end": repr(front_end),
            "frames": frames,
            "shifts": shifts,
            "clips": len(clips),
            "digest": _digest(clips),
        }
        key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:24]
        folder = (cache or cache_folder()) / "spectrograms"
        values, description = folder / f"{key}.npy", folder / f"{key}.json"
        if not description.exists():  # it is written last
            folder.mkdir(parents=True, exist_ok=True)
            part = folder / f"{key}.{os.getpid()}.part"
            try:
                lengths = _write(part, clips, front_end, frames, shifts)
                os.replace(part, values)
            finally:
                part.unlink(missing_ok=True)
            part.write_text(json.dumps({**about, "lengths": lengths}), encoding="utf-8")
            os.replace(part, description)
        kept = json.loads(description.read_text(encoding="utf-8"))
        return cls(np.load(values, mmap_mode="r"), np.array(kept["lengths"]), paths, frames, shifts, about)

    def rows(self, clips: Sequence[Clip]) -> Ints:
        """Where the spectrograms of these clips are. Errors: `KeyError` for a file that is not among them."""
        row = {path: number for number, path in enumerate(self.paths)}
        return np.array([row[clip.path.resolve()] for clip in clips], dtype=np.int64)

    def at(self, rows: Ints, shift: Ints) -> tuple[Tensor, Tensor]:
        """Clips (B) delayed by shifts (B): (B, 1, F, frames), and the share of that which each clip reaches, (B)."""
        first = self.shifts - 1 - shift
        x = np.stack([self.log_mels[row, :, at : at + self.frames] for row, at in zip(rows, first, strict=True)])
        own = np.minimum((self.lengths[rows] + shift) / self.frames, 1)
        return torch.from_numpy(x).unsqueeze(1), torch.from_numpy(own)


def _digest(clips: Sequence[Clip]) -> str:
    """Of the bytes of all files, in order."""
    digest = hashlib.blake2b(digest_size=32)
    for clip in clips:
        if clip.path.is_file():  # one that is not there is named when it is decoded
            digest.update(hashlib.blake2b(clip.path.read_bytes()).digest())
            digest.update(repr(clip.span).encode())
    return digest.hexdigest()


def _write(path: Path, clips: Sequence[Clip], front_end: FrontEnd, frames: int, shifts: int) -> list[float]:
    """The array as .npy; the clips' lengths in frames."""
    hop = round(front_end.hop * SAMPLE_RATE)
    before = (shifts - 1) * hop
    count = frames + shifts - 1
    # the last frame may reach beyond its hop
    samples = max(round(front_end.seconds(count) * SAMPLE_RATE), count * hop)
    out = np.lib.format.open_memmap(path, "w+", np.float32, (len(clips), front_end.mel_bins, count))
    lengths = []
    for row, clip in enumerate(clips):
        waveform = named(clip, lambda clip: clip.load((samples - before) / SAMPLE_RATE))
        lengths.append(len(waveform) / hop)
        waveform = torch.nn.functional.pad(waveform[: samples - before], (before, 0))
        waveform = torch.nn.functional.pad(waveform, (0, samples - len(waveform)))
        out[row] = front_end.normalise(front_end.log_mel(waveform)[:, :count]).numpy()
    out.flush()
    return lengths


@torch.inference_mode()
def features(
    encoder: Encoder,
    spectrograms: Spectrograms,
    shift: int | Sequence[int] | Ints = 0,
    rows: Sequence[int] | Ints | None = None,
    batch_size: int = 64,
    device: str = "cpu",
) -> Floats:
    """Clip embeddings as `embedding.embed` gives them, of clips delayed by `shift` frames, (rows, N_f D).

    Args:
        encoder: (B, 1, F, frames), normalised -> tokens and grid, as `AudioEncoder.tokens`.
        spectrograms: of the encoder's front end.
        shift: one for all, or one for each of the rows.
        rows: which spectrograms; all unless given.
        batch_size, device: of the encoder's batches.

    Errors: `ValueError` for a shift that the spectrograms do not have.
    """
    where = np.arange(len(spectrograms.lengths)) if rows is None else np.asarray(rows, dtype=np.int64)
    shifts = np.broadcast_to(np.asarray(shift, dtype=np.int64), where.shape)
    if len(where) and not (shifts.min() >= 0 and shifts.max() < spectrograms.shifts):
        raise ValueError(f"shift: expected 0 to {spectrograms.shifts - 1} frames, got {shifts.min()} to {shifts.max()}")
    found = []
    for first in range(0, len(where), batch_size):
        batch = slice(first, first + batch_size)
        x, own = (part.to(device) for part in spectrograms.at(where[batch], shifts[batch]))
        tokens, grid = encoder(x)
        found.append(pool(tokens, grid, own_columns(own, grid)).float().cpu())
    return torch.cat(found).numpy()
