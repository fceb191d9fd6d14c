"""Embeddings of a frozen encoder: of labelled clips for probing, of sound files as npz or parquet."""

from __future__ import annotations

import hashlib
import os
import warnings
import zipfile
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._files import check_new_file, replacing
from .._messages import at_least, one_of
from ..sound.audio import SAMPLE_RATE, AudioError, FrontEnd
from ..sound.sources import Clip

__all__ = [
    "Encoder",
    "cache_folder",
    "cached",
    "embed",
    "embed_files",
    "first_window",
    "named",
    "own_columns",
    "pool",
    "statistics",
]

T = TypeVar("T")
Floats = NDArray[np.float32]
# normalised log-mel (B, 1, F, T) -> frequency-major tokens (B, N, D) and their grid (N_f, N_t), N = N_f N_t
Encoder = Callable[[Tensor], tuple[Tensor, tuple[int, int]]]


def columns(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Frame embeddings, tokens concatenated along frequency: (B, N_f N_t, D) -> (B, N_t, N_f D)."""
    batch, count, width = tokens.shape
    if count != grid[0] * grid[1]:
        raise ValueError(f"tokens: expected {grid[0]} × {grid[1]} of them, got {count}")
    return tokens.reshape(batch, *grid, width).transpose(1, 2).flatten(2)


def pool(tokens: Tensor, grid: tuple[int, int], own: Tensor | None = None) -> Tensor:
    """Time-mean of frequency-concatenated tokens: (B, N_f N_t, D) -> (B, N_f D).

    own (B): how many of the N_t columns to average over, from the first on; all unless given. Source: EVAR, M2D.
    """
    x = columns(tokens, grid)
    if own is None:
        return x.mean(1)
    inside = torch.arange(grid[1], device=x.device) < own.unsqueeze(1)  # [B, N_t]
    return (x * inside.unsqueeze(2)).sum(1) / own.unsqueeze(1)


def _windows(
    clip: Clip, front_end: FrontEnd, frames: int, most: int | None = None, shift: int = 0
) -> tuple[Tensor, Tensor]:
    """Normalised log-mels of consecutive windows (W, F, frames), and the share of each that is the clip's own, (W).

    The last window is padded with silence. At most `most` windows. The clip begins `shift` frames after the first
    window does, and the silence before it counts as its own. Errors: `AudioError`.
    """
    hop = round(front_end.hop * SAMPLE_RATE)
    step = frames * hop
    samples = max(round(front_end.seconds(frames) * SAMPLE_RATE), step)  # the last frame may reach beyond the step
    waveform = front_end.check(clip.load(None if most is None else (step * (most - 1) + samples) / SAMPLE_RATE))
    waveform = torch.nn.functional.pad(waveform, (shift * hop, 0))
    length = len(waveform)
    count = max(1, -(-(length - (samples - step)) // step))
    count = count if most is None else min(count, most)
    needed = step * (count - 1) + samples
    pieces = torch.nn.functional.pad(waveform, (0, max(0, needed - length)))[:needed].unfold(0, samples, step)
    own = (length - step * torch.arange(count)).clamp(max=step) / step
    return front_end.normalise(front_end.log_mel(pieces)[..., :frames]), own


def first_window(clip: Clip, front_end: FrontEnd, frames: int) -> Tensor:
    """The beginning of a clip as normalised log-mel (1, F, frames), padded with silence. Errors: `AudioError`."""
    return named(clip, lambda clip: _windows(clip, front_end, frames, 1)[0])


def own_columns(own: Tensor, grid: tuple[int, int]) -> Tensor:
    """How many columns of tokens (B) hold something of the clip, given the share of the window (B) that it fills."""
    return (own * grid[1]).ceil().long().clamp(1, grid[1])


@torch.inference_mode()
def embed(
    encoder: Encoder,
    clips: Sequence[Clip],
    front_end: FrontEnd,
    frames: int,
    batch_size: int = 64,
    device: str = "cpu",
    shift: int = 0,
) -> Floats:
    """Clip embeddings, (clips, N_f D): each clip's first `frames` frames, padded with silence, encoded and pooled.

    Columns of tokens that hold only padding are left out of the mean.

    Args:
        encoder: (B, 1, F, frames), normalised -> tokens and grid.
        clips, front_end, frames: what to embed, as in training. Frames that fill no patch of the encoder's are in no
            token: a multiple of the patch's loses nothing.
        batch_size, device: of the encoder's batches.
        shift: delays each clip by so many frames of silence. Its content moves against the patch grid and nothing of
            its beginning is lost; still only `frames` frames are looked at, so that any part of the clip beyond them
            is not. Source: the paper tests robustness to shifts; this definition is ours.

    Errors: `AudioError` naming the first clip that cannot be decoded: scores of fewer clips would not be comparable;
    `ValueError` for another batch size or shift, such as one that leaves nothing of the clip to look at.
    """
    at_least(1, batch_size=batch_size)
    if not 0 <= shift < frames:
        raise ValueError(f"shift: expected at least 0 frames and fewer than {frames}, got {shift}")
    rows = []
    for first in range(0, len(clips), batch_size):
        windows = [
            named(clip, lambda clip: _windows(clip, front_end, frames, 1, shift)) for clip in clips[first:][:batch_size]
        ]
        x, own = (torch.cat(parts).to(device) for parts in zip(*windows, strict=True))
        tokens, grid = encoder(x.unsqueeze(1))
        rows.append(pool(tokens, grid, own_columns(own, grid)).float().cpu())
    return torch.cat(rows).numpy()


def statistics(clips: Sequence[Clip], front_end: FrontEnd) -> Floats:
    """The baseline's features, (clips, 3 F): mean, standard deviation and mean |Δ| over time of each log-mel bin.

    Errors: `AudioError` naming a clip that cannot be decoded, or has fewer than two frames.
    """

    def row(clip: Clip) -> Tensor:
        x = front_end.log_mel(clip.load())
        if x.shape[1] < 2:
            raise AudioError(f"expected at least 2 frames, got {x.shape[1]}")
        return torch.cat([x.mean(1), x.std(1, correction=0), x.diff(dim=1).abs().mean(1)])

    return torch.stack([named(clip, row) for clip in clips]).numpy()


def named(clip: Clip, compute: Callable[[Clip], T]) -> T:
    """What `compute` gives; an `AudioError` of its begins with the clip's name."""
    try:
        return compute(clip)
    except AudioError as error:
        raise AudioError(f"{clip.name}: {error}") from error


def cache_folder() -> Path:
    """`AAPE_SSL_CACHE`, else `aape_ssl` in `XDG_CACHE_HOME` or `~/.cache`."""
    given = os.environ.get("AAPE_SSL_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(given) if given else Path(base) / "aape_ssl"


def cached(path: str | os.PathLike[str], clips: Sequence[Clip], key: str, compute: Callable[[], Floats]) -> Floats:
    """What `compute` gives, (clips, features), kept in an `.npz`; computed again for other clips or another `key`.

    Clips differ if names, order, or a file's size or time do. `key`, which the file keeps as `about`, is whatever else
    features depend on: checkpoint, front end, frames. Warns where the file cannot be written.
    """
    names = hashlib.sha256("\n".join([key, *map(_identity, clips)]).encode()).hexdigest()
    try:
        with open(path, "rb") as file, np.load(file) as kept:
            if str(kept["of"]) == names:
                features: Floats = kept["features"]
                return features
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # none yet, or damaged
        pass
    features = compute()
    try:
        with replacing(path) as part, open(part, "wb") as new:
            np.savez(new, of=names, about=key, features=features)
    except OSError as error:  # they are known all the same
        warnings.warn(f"cache: {error}: these embeddings will be computed again", stacklevel=2)
    return features


def _identity(clip: Clip) -> str:
    try:
        found = os.stat(clip.path)
    except OSError:  # `compute` will say so
        return clip.name
    return f"{clip.name} {clip.span} {found.st_size} {found.st_mtime_ns}"


@torch.inference_mode()
def embed_files(
    encoder: Encoder,
    clips: Sequence[Clip],
    front_end: FrontEnd,
    frames: int,
    out: str | os.PathLike[str],
    level: Literal["clip", "frame"] = "clip",
    batch_size: int = 64,
    device: str = "cpu",
) -> list[tuple[str, str]]:
    """Embeddings of whole clips, however long, as one file of columns.

    A clip is encoded in consecutive windows of `frames` frames, the last one padded with silence. Level "frame" has one
    row per column of tokens: `name`, `time` (its centre, in seconds), `embedding` (N_f D, float32: tokens concatenated
    along frequency); "clip" has one row per clip, their mean, without `time`. Columns of only padding are left out.

    Args:
        encoder, clips, front_end, frames, batch_size, device: as for `embed`.
        out: a new `.npz`, whose arrays are these columns, or `.parquet`, which needs pyarrow.
        level: "clip" or "frame".

    Returns: name and reason of each clip that could not be decoded, and is left out, in the clips' order.
    Errors: `ValueError` for `out` or `level`, before anything is encoded, and where no clip can be decoded.
    """
    out = Path(out)
    at_least(1, batch_size=batch_size)
    one_of(("clip", "frame"), level=level)
    if out.suffix not in (".npz", ".parquet"):
        raise ValueError(f"out: expected a .npz or .parquet file, got {out}")
    if out.suffix == ".parquet" and find_spec("pyarrow") is None:
        raise ValueError(f"out: writing {out} needs pyarrow: pip install pyarrow")
    check_new_file(out=out)
    names: list[str] = []
    times: list[Floats] = []
    rows: list[Floats] = []
    failed: list[tuple[str, str]] = []  # clips of two shards may have the same name
    for clip in clips:
        try:
            x, own = _windows(clip, front_end, frames)
        except AudioError as error:
            failed.append((clip.name, str(error)))
            continue
        found = []
        for part, share in zip(x.split(batch_size), own.split(batch_size), strict=True):
            tokens, grid = encoder(part.unsqueeze(1).to(device))
            inside = torch.arange(grid[1]) < own_columns(share, grid).unsqueeze(1)
            found.append(columns(tokens, grid).float().cpu()[inside])
        features = torch.cat(found)
        if level == "clip":
            features = features.mean(0, keepdim=True)
        names += [clip.name] * len(features)
        times.append((np.arange(len(features), dtype=np.float32) + 0.5) * (frames * front_end.hop / grid[1]))
        rows.append(features.numpy())
    if not rows:
        name, why = next(iter(failed), ("", ""))
        raise ValueError(f"clips: none of the {len(clips)} could be used, such as {name}: {why}")
    table: dict[str, Any] = {"name": np.array(names), "embedding": np.concatenate(rows)}
    if level == "frame":
        table["time"] = np.concatenate(times)
    with replacing(out) as part, open(part, "wb") as file:
        _write_table(file, table, out.suffix)
    return failed


def _write_table(file: Any, table: dict[str, Any], suffix: str) -> None:
    if suffix == ".npz":
        np.savez(file, **table)
        return
    import pyarrow
    import pyarrow.parquet

    width = table["embedding"].shape[1]
    vectors = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(table["embedding"].ravel()), width)
    pyarrow.parquet.write_table(pyarrow.table({**table, "embedding": vectors}), file)
