"""`aape-ssl demo`: sound files → log-mel → AaPE → tokens, as a table and one picture per clip."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from aape_kernels import AaPE
from aape_kernels.backends import Call, reasons
from aape_kernels.plot import hear

from .._messages import CheckpointError, complain, one_line
from ..sound import audio, sources
from . import picture, stems

__all__ = ["bundled_clips", "run", "tokens_per_second"]

FRONT_END = audio.AUDIOSET128
BUDGET = 0.4  # seconds of timing per clip, over all backends
BUSY = 0.7  # processors in use lately, above which rates cannot be trusted; starting Python counts for some 0.2


@dataclass(frozen=True)
class Viewer:
    """A stem, and how clips are prepared for it.

    Attributes:
        stem: the stem.
        label: what the pictures' titles call it.
        trained: whether its input is normalised as in training. The untrained bank looks at the log-mel less its
            level instead (`audio.remove_level`): its states are wide (±5.6 Hz at half height), and natural sound has
            so much energy below the alias-prone band that its slowest states would otherwise win in every patch.
        front_end: the one it was trained behind.
        guessed: whether its file holds only tensors, which do not tell stride, window, kernel, band and decay range.
    """

    stem: AaPE
    label: str
    trained: bool
    front_end: audio.FrontEnd = FRONT_END
    guessed: bool = False

    def prepare(self, log_mel: Tensor) -> Tensor:
        """The stem's input (F, T)."""
        if self.trained:
            return self.front_end.normalise(log_mel)
        return audio.remove_level(log_mel, self.stem.stride[1])


def bundled_clips() -> list[Path]:
    """The CC0 clips that come with the package; clips/LICENSE.md says where from."""
    return sorted((Path(__file__).parent / "clips").glob("*.flac"))


@torch.inference_mode()
def tokens_per_second(stem: AaPE, x: Tensor, backends: Sequence[str]) -> list[float]:
    """Tokens per second of AaPE on each backend, then of the plain Conv2d stem, for one clip at a time.

    The Conv2d stem is AaPE's own `proj`; both deliver contiguous (B, N, D) tokens. Rates are from the medians of
    torch's timer, with the threads that torch has.
    """

    def conv2d() -> Tensor:
        tokens: Tensor = stem.proj(x).flatten(2).transpose(1, 2).contiguous()
        return tokens

    def rate(call: Callable[[], Tensor]) -> float:
        timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
        return count / timer.blocked_autorange(min_run_time=BUDGET / (len(backends) + 1)).median

    chosen, count, rates = stem.backend, conv2d().shape[1], []
    try:
        for backend in backends:
            stem.backend = backend
            rates.append(rate(lambda: stem(x)))
    finally:
        stem.backend = chosen
    return [*rates, rate(conv2d)]


def run(files: Sequence[Path], checkpoint: Path | None, out: Path, seconds: float, start: float = 0.0) -> int:
    """The command: returns its exit status, 0, 1 if some clips could not be used, 2 if nothing could be done.

    Nothing is printed on stdout, and `out` is not made, before the first clip that can be used.
    """
    available = reasons(Call("embed", torch.device("cpu"), torch.float32))
    backends = [name for name, why in available.items() if why is None]
    try:
        viewer = _viewer(checkpoint)
        _try_backends(["auto", *backends])
    except CheckpointError as error:
        return complain(f"--checkpoint {checkpoint}: {str(error).removeprefix(f'{checkpoint}: ')}")
    except (ValueError, RuntimeError, ImportError) as error:
        return complain(error)

    clips, missing = _clips(files or bundled_clips())
    names = _unique_names([clip.name for clip in clips])
    width = max([len("clip"), *(len(_printable(name)) for name in names)])
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0  # others' work counts, too
    shown = 0
    for clip, name in zip(clips, names, strict=True):
        try:
            waveform, whole = _piece(clip, start, seconds)
            log_mel = _log_mel(waveform, viewer)
        except audio.AudioError as error:
            complain(f"{clip.name}: {error}")
            continue
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            return complain(f"--out {out}: cannot be written ({error.strerror})")
        try:
            row = _look(log_mel, name, viewer, backends, out, start)
        except OSError as error:
            complain(f"{out / name}.png: cannot be written ({error.strerror})")
            continue
        if not shown:
            print(_heading(viewer, backends, width, busy), flush=True)
        got = len(waveform) / audio.SAMPLE_RATE
        length = f"{whole:.2f}" if got > whole - 0.01 else f"{got:.4g} of {whole:.1f}"
        print(f"{_printable(name):{width}}  {length:>12}  {row}", flush=True)
        shown += 1

    if not shown:
        return 2
    edge = 1 / (2 * viewer.stem.stride[1] * viewer.front_end.hop)  # π/S_t
    print(f"\nalias-prone: share of the modulation energy above {edge:g} Hz, where the sequence of patches aliases")
    for name, why in available.items():
        if why is not None:
            print(f"not run: {name} ({why})")
    print(_printable(f"pictures: {out}"))
    return 0 if shown == len(clips) and not missing else 1


def _clips(files: Sequence[Path]) -> tuple[list[sources.Clip], int]:
    """The files, and the clips of folders, manifests and shards; how many of those could not be used."""
    clips, missing = [], 0
    for file in files:
        several = file.is_dir() or file.suffix in (".csv", ".tar")
        if not several and (file.is_file() or not glob.has_magic(str(file))):
            clips.append(sources.Clip(str(file), file))
            continue
        try:
            clips += sources.find(file)
        except sources.SourceError as error:
            complain(error)
            missing += 1
    return clips, missing


def _piece(clip: sources.Clip, start: float, seconds: float) -> tuple[Tensor, float]:
    """The clip from `start` on, and how many seconds it has in all. Errors: `AudioError`."""
    whole = clip.seconds()
    if 0 < whole <= start:
        raise audio.AudioError(f"has {whole:.2f} s, nothing from --start {start:g} on")
    if start:
        seconds = min(seconds, whole - start)
    return clip.load(seconds, start / (whole - seconds) if start else 0.0), whole


def _try_backends(names: Sequence[str]) -> None:
    """Run one patch through each: what `AAPE_BACKEND` and `AAPE_CPU_ISA` ask for may not run here.

    Errors: `ValueError` or `RuntimeError` naming the variable, `ImportError` for a native module that does not load.
    """
    stem = stems.untrained_stem()
    patch = torch.zeros(1, 1, *stem.patch_size)
    for name in names:
        stem.backend = name
        stem(patch)


def _heading(viewer: Viewer, backends: Sequence[str], width: int, busy: float) -> str:
    """The lines above the table's rows."""
    sizes = f"{'x'.join(map(str, viewer.stem.patch_size))} patches, {viewer.front_end.mel_bins} mel bins"
    lines = [f"stem: {_printable(viewer.label)}; {sizes}"]
    if viewer.guessed:
        lines.append("its stride, window, kernel, band and decay range: taken as AaPE's defaults")
    lines.append(
        f"tokens/s: one clip at a time, {torch.get_num_threads()} CPU threads; short single clips are the slow case, "
        "a batch comes nearer to Conv2d"
    )
    if busy > BUSY:
        load = f"load {busy:.1f} on {os.cpu_count()} processors"
        lines.append(f"THE MACHINE IS NOT IDLE ({load}): tokens/s may be many times too low")
    rates = "  ".join(f"{rate:>14}" for rate in (*(f"AaPE {name}" for name in backends), "Conv2d"))
    lines += ["", f"{'clip':{width}}  {'seconds':>12}  {'tokens':>6}  {rates}  {'alias-prone':>11}"]
    return "\n".join(lines)


def _look(log_mel: Tensor, name: str, viewer: Viewer, backends: Sequence[str], out: Path, start: float) -> str:
    """Write one clip's pictures and return its table row, without name and length. Errors: `OSError`."""
    stem, front_end = viewer.stem, viewer.front_end
    x = viewer.prepare(log_mel)
    responses = hear(stem, x[None], front_end.hop)
    rates = tokens_per_second(stem, x[None, None], backends)
    share = audio.modulation_share(log_mel, stem.stride[1])

    patches = range(0, responses.energy.shape[1], picture.PATCHES)
    for page, first in enumerate(patches, 1):
        last = page == len(patches)
        shown = log_mel[:, first * stem.stride[1] : None if last else (first + picture.PATCHES) * stem.stride[1]]
        title, of = name, f", {page} of {len(patches)}" if len(patches) > 1 else ""
        figure = picture.draw(
            shown,
            front_end,
            stem,
            responses.between(first, first + picture.PATCHES),
            f"{picture.shortened(title)}{of}",
            viewer.label,
            start + first * stem.stride[1] * front_end.hop,
        )
        figure.savefig(out / (f"{name}.png" if page == 1 else f"{name}-page{page}.png"))

    tokens = responses.energy.shape[0] * responses.energy.shape[1]
    speeds = "  ".join(f"{rate:>14,.0f}" for rate in rates)
    return f"{tokens:>6}  {speeds}  {100 * share:>9.1f} %"


def _log_mel(waveform: Tensor, viewer: Viewer) -> Tensor:
    log_mel = viewer.front_end.log_mel(waveform)
    patch = viewer.stem.patch_size[1]
    if log_mel.shape[1] < patch:
        needed = viewer.front_end.seconds(patch)
        got = len(waveform) / audio.SAMPLE_RATE
        raise audio.AudioError(f"is too short: expected {needed:.3f} s, one patch of {patch} frames, got {got:.3f} s")
    if float(log_mel.max()) <= viewer.front_end.floor + 1e-3:
        raise audio.AudioError("is silent")
    return log_mel


def _viewer(checkpoint: Path | None) -> Viewer:
    if checkpoint is None:
        return Viewer(stems.untrained_stem(), "untrained: a fixed filter bank", trained=False)
    whole = stems.load_encoders_stem(checkpoint)
    if whole is not None:
        return Viewer(whole[0], checkpoint.resolve().name, trained=True, front_end=whole[1])
    stem, prefix = stems.load_stem(checkpoint)
    where = f" ({prefix.rstrip('.')})" if prefix else ""
    return Viewer(stem, f"{checkpoint.name}{where}", trained=True, guessed=True)


def _unique_names(files: Sequence[str]) -> list[str]:
    """A picture's name for each file: its stem, numbered if another has it already (in any case).

    Another has it also where one of the two may be the name of a page of the other.
    """
    names: list[str] = []
    taken: set[str] = set()
    paged: set[str] = set()  # the names that have pages with names that are taken
    for file in files:
        name, number = Path(file).stem, 1
        while taken & {name.casefold(), _paged(name.casefold())} or name.casefold() in paged:
            number += 1
            name = f"{Path(file).stem}-{number}"
        taken.add(name.casefold())
        paged.add(_paged(name.casefold()))
        names.append(name)
    return names


def _paged(name: str) -> str:
    """The name whose page has this one, "x" for "x-page2"; "" if it is no page's."""
    of, _, page = name.rpartition("-page")
    return of if page.isdecimal() else ""


def _printable(text: str) -> str:
    """`text` with characters escaped that the terminal's encoding lacks; file names may hold anything."""
    encoding = sys.stdout.encoding or "utf-8"
    return one_line(text.encode(encoding, "backslashreplace").decode(encoding))
