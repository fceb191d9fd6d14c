"""`aape-ssl demo`: sound files → log-mel → AaPE → tokens, as a table and one picture a clip."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from aape_kernels import AaPE
from aape_kernels.backends import Call, reasons

from ..sound import audio
from . import picture, stems

__all__ = ["bundled_clips", "run", "tokens_per_second"]

FRONT_END = audio.AUDIOSET128
BUDGET = 0.4  # seconds of timing a clip; within it 3 to 50 rounds


@dataclass(frozen=True)
class Viewer:
    """A stem, and how clips are put before it.

    Attributes:
        stem: the stem.
        label: what the pictures' titles call it.
        trained: whether its input is normalised as in training. The untrained bank looks at the log-mel less its
            level instead (`audio.remove_level`): its states are wide (±5.6 Hz at half height), and natural sound has
            so much energy below the alias-prone band that its slowest states would otherwise win in every patch.
    """

    stem: AaPE
    label: str
    trained: bool

    def prepare(self, log_mel: Tensor) -> Tensor:
        """The stem's input (F, T)."""
        if self.trained:
            return FRONT_END.normalise(log_mel)
        return audio.remove_level(log_mel, self.stem.stride[1])


def bundled_clips() -> list[Path]:
    """The CC0 clips that come with the package; clips/LICENSE.md says where from."""
    return sorted((Path(__file__).parent / "clips").glob("*.flac"))


@torch.inference_mode()
def tokens_per_second(stem: AaPE, x: Tensor, backends: Sequence[str]) -> list[float]:
    """Tokens a second of AaPE on each backend, then of the plain Conv2d stem, for one clip at a time.

    The Conv2d stem is AaPE's own `proj`; both deliver contiguous (B, N, D) tokens. Medians over 3 to 50
    rounds of one pass each, as many as fit in `BUDGET`, after one pass each to warm up.
    """

    def aape(backend: str) -> Callable[[], Tensor]:
        def call() -> Tensor:
            stem.backend = backend
            tokens: Tensor = stem(x)
            return tokens

        return call

    def conv2d() -> Tensor:
        tokens: Tensor = stem.proj(x).flatten(2).transpose(1, 2).contiguous()
        return tokens

    def seconds(call: Callable[[], Tensor]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    calls = [*map(aape, backends), conv2d]
    chosen, count = stem.backend, conv2d().shape[1]
    try:
        for call in calls:
            call()
        rounds: list[list[float]] = []
        start = time.perf_counter()
        while len(rounds) < 3 or (len(rounds) < 50 and time.perf_counter() - start < BUDGET):
            rounds.append([seconds(call) for call in calls])
    finally:
        stem.backend = chosen
    return [count / statistics.median(times) for times in zip(*rounds, strict=True)]


def run(files: Sequence[Path], checkpoint: Path | None, out: Path, seconds: float) -> int:
    """The command: returns its exit status, 0, 1 if some clips could not be used, 2 if nothing could be done.

    Nothing is printed on stdout, and `out` is not made, before the first clip that can be used.
    """
    available = reasons(Call("embed", torch.device("cpu"), torch.float32))
    backends = [name for name, why in available.items() if why is None]
    try:
        viewer = _viewer(checkpoint)
        _try_backends(["auto", *backends])
    except stems.CheckpointError as error:
        return _fail(f"--checkpoint {checkpoint}: {error}")
    except (ValueError, RuntimeError, ImportError) as error:
        return _fail(str(error))

    files = list(files) or bundled_clips()
    names = _unique_names(files)
    width = max([len("clip"), *(len(_printable(name)) for name in names)])
    shown = 0
    for file, name in zip(files, names, strict=True):
        try:
            whole, log_mel = audio.duration(file), _log_mel(file, viewer.stem, seconds)
        except audio.AudioError as error:
            _complain(f"{file}: {error}")
            continue
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            return _fail(f"--out {out}: cannot be written ({error.strerror})")
        try:
            row = _look(log_mel, name, viewer, backends, out)
        except OSError as error:
            _complain(f"{out / name}.png: cannot be written ({error.strerror})")
            continue
        if not shown:
            print(_heading(viewer, backends, width), flush=True)
        length = f"{whole:.2f}" if whole <= seconds else f"{seconds:.4g} of {whole:.1f}"
        print(f"{_printable(name):{width}}  {length:>12}  {row}", flush=True)
        shown += 1

    if not shown:
        return 2
    edge = _nyquist(viewer.stem)
    print(f"\nalias-prone: share of the modulation energy above {edge:g} Hz, where the sequence of patches aliases")
    for name, why in available.items():
        if why is not None:
            print(f"not run: {name} ({why})")
    print(_printable(f"pictures: {out}"))
    return 0 if shown == len(files) else 1


def _try_backends(names: Sequence[str]) -> None:
    """One patch through each: what `AAPE_BACKEND` and `AAPE_CPU_ISA` ask for may not run here.

    Errors: `ValueError` or `RuntimeError` naming the variable, `ImportError` for a native module that does not load.
    """
    stem = stems.untrained_stem()
    patch = torch.zeros(1, 1, *stem.patch_size)
    for name in names:
        stem.backend = name
        stem(patch)


def _heading(viewer: Viewer, backends: Sequence[str], width: int) -> str:
    """What stands above the table's rows."""
    sizes = f"{'x'.join(map(str, viewer.stem.patch_size))} patches, {FRONT_END.mel_bins} mel bins"
    lines = [f"stem: {_printable(viewer.label)}; {sizes}"]
    if viewer.trained:
        lines.append("its stride, window, kernel, band and decay range: taken as AaPE's defaults")
    lines.append(
        f"tokens/s: one clip at a time, {torch.get_num_threads()} CPU threads; short single clips are the slow case, "
        "a batch comes nearer to Conv2d"
    )
    rates = "  ".join(f"{rate:>14}" for rate in (*(f"AaPE {name}" for name in backends), "Conv2d"))
    lines += ["", f"{'clip':{width}}  {'seconds':>12}  {'tokens':>6}  {rates}  {'alias-prone':>11}"]
    return "\n".join(lines)


def _look(log_mel: Tensor, name: str, viewer: Viewer, backends: Sequence[str], out: Path) -> str:
    """One clip: its picture, and its table row without name and length. Errors: `OSError`."""
    stem = viewer.stem
    x = viewer.prepare(log_mel)
    responses = stems.respond(stem, x, FRONT_END.hop)
    rates = tokens_per_second(stem, x[None, None], backends)
    share = audio.modulation_share(log_mel, stem.stride[1])

    figure = picture.draw(log_mel, FRONT_END, stem, responses, name, viewer.label)
    picture.save(figure, out / f"{name}.png")

    tokens = responses.energy.shape[0] * responses.energy.shape[1]
    speeds = "  ".join(f"{rate:>14,.0f}" for rate in rates)
    return f"{tokens:>6}  {speeds}  {100 * share:>9.1f} %"


def _log_mel(file: Path, stem: AaPE, seconds: float) -> Tensor:
    waveform = audio.load(file, seconds)
    log_mel = FRONT_END.log_mel(waveform)
    patch = stem.patch_size[1]
    if log_mel.shape[1] < patch:
        needed = FRONT_END.seconds(patch)
        got = len(waveform) / audio.SAMPLE_RATE
        raise audio.AudioError(f"is too short: expected {needed:.3f} s, one patch of {patch} frames, got {got:.3f} s")
    if float(log_mel.max()) <= FRONT_END.floor + 1e-3:
        raise audio.AudioError("is silent")
    return log_mel


def _viewer(checkpoint: Path | None) -> Viewer:
    if checkpoint is None:
        return Viewer(stems.untrained_stem(), "untrained: a fixed filter bank", trained=False)
    stem, prefix = stems.load_stem(checkpoint)
    where = f" ({prefix.rstrip('.')})" if prefix else ""
    return Viewer(stem, f"{checkpoint.name}{where}", trained=True)


def _nyquist(stem: AaPE) -> float:
    """The lower edge of the alias-prone band, π/S_t, in Hz."""
    return 1 / (2 * stem.stride[1] * FRONT_END.hop)


def _unique_names(files: Sequence[Path]) -> list[str]:
    """A picture's name for each file: its stem, numbered where others have it (whatever the case) already."""
    names: list[str] = []
    taken: set[str] = set()
    for file in files:
        name, number = file.stem, 1
        while name.casefold() in taken:
            number += 1
            name = f"{file.stem}-{number}"
        taken.add(name.casefold())
        names.append(name)
    return names


def _printable(text: str) -> str:
    """`text` with what the terminal's encoding lacks escaped; file names may hold anything."""
    encoding = sys.stdout.encoding or "utf-8"
    return " ".join(text.encode(encoding, "backslashreplace").decode(encoding).split())


def _complain(message: str) -> None:
    print(_printable(f"aape-ssl: {message}"), file=sys.stderr, flush=True)


def _fail(message: str) -> int:
    _complain(message)
    return 2
