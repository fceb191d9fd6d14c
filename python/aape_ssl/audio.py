"""From a sound file to a log-mel spectrogram, and how much of its modulation a patch grid aliases."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "AUDIOSET128",
    "SAMPLE_RATE",
    "AudioError",
    "FrontEnd",
    "duration",
    "import_kaldi",
    "load",
    "modulation_share",
    "remove_level",
]

SAMPLE_RATE = 16_000  # Hz


class AudioError(ValueError):
    """A sound file that cannot be used; the message is one line that says why."""


def _stub_extension() -> ModuleType:
    """What torchaudio's Python parts ask of `torchaudio._extension`, with every compiled part reported as absent."""

    def unchanged(function: Callable[..., Any]) -> Callable[..., Any]:
        return function

    stub: Any = ModuleType("torchaudio._extension")
    stub._IS_TORCHAUDIO_EXT_AVAILABLE = False
    stub._IS_ALIGN_AVAILABLE = False
    stub.fail_if_no_align = unchanged
    stub._check_cuda_version = lambda: None
    extension: ModuleType = stub
    return extension


def import_kaldi() -> ModuleType:
    """`torchaudio.compliance.kaldi`, beside a CPU build of torch too.

    torchaudio's wheels hold a compiled extension that needs libtorch_cuda, so a plain `import torchaudio` fails beside
    a CPU torch, or one of another CUDA version. Its Python parts need no extension: only if the plain import fails,
    it is repeated with `torchaudio._extension` replaced by a stub.

    Errors: `ImportError` if torchaudio is not installed or does not import with the stub either.
    """
    name = "torchaudio._extension"
    try:
        from torchaudio.compliance import kaldi
    except (ImportError, OSError, RuntimeError) as error:
        if find_spec("torchaudio") is None:
            raise
        # the failed import leaves submodules of a package that is no longer there
        for left in [key for key in sys.modules if key.partition(".")[0] == "torchaudio"]:
            del sys.modules[left]
        sys.modules[name] = _stub_extension()
        try:
            from torchaudio.compliance import kaldi
        except Exception:  # whatever it is, the stub must not stay for the next import
            del sys.modules[name]
            raise ImportError(f"torchaudio does not import: {error}") from error
    module: ModuleType = kaldi
    return module


def _open(path: str | os.PathLike[str]) -> Any:
    import soundfile

    if not os.path.exists(path):
        raise AudioError("no such file")
    if os.path.isdir(path):
        raise AudioError("is a directory, not a sound file")
    if os.path.getsize(path) == 0:
        raise AudioError("is empty (0 bytes)")
    try:
        return soundfile.SoundFile(os.fspath(path))
    except (soundfile.SoundFileError, OSError, TypeError) as error:  # TypeError: headerless formats such as .raw
        raise AudioError(f"cannot be read as sound ({_one_line(error)})") from error


def _one_line(error: Exception) -> str:
    text = " ".join(str(getattr(error, "error_string", error)).split())
    return text.rstrip(".")


def duration(path: str | os.PathLike[str]) -> float:
    """Length of a sound file in seconds, as its header says. Errors: `AudioError`."""
    with _open(path) as file:
        return float(file.frames / file.samplerate)


def load(path: str | os.PathLike[str], seconds: float | None = None) -> Tensor:
    """A sound file as a mono waveform at 16 kHz.

    Args:
        path: whatever libsndfile reads: wav, flac, ogg, mp3, aiff; any sampling rate, any number of channels, which
            are averaged. Resampled by soxr ("HQ").
        seconds: how much to read from the start; all unless given.

    Returns:
        (samples), float32, full scale ±1.

    Errors: `AudioError` for a file that is missing, unreadable, without samples, or with non-finite ones.
    """
    import soundfile
    import soxr

    with _open(path) as file:
        rate = int(file.samplerate)
        try:
            samples = file.read(-1 if seconds is None else math.ceil(seconds * rate), dtype="float32", always_2d=True)
        except (soundfile.SoundFileError, OSError, MemoryError) as error:
            raise AudioError(f"cannot be read as sound ({_one_line(error)})") from error
    if len(samples) == 0:
        raise AudioError("holds no samples")
    waveform = torch.from_numpy(samples.mean(axis=1))
    if not bool(waveform.isfinite().all()):
        raise AudioError("holds samples that are not finite")
    if rate != SAMPLE_RATE:
        waveform = torch.from_numpy(soxr.resample(waveform.numpy(), rate, SAMPLE_RATE))
    return waveform


@dataclass(frozen=True)
class FrontEnd:
    """Kaldi's log-mel filter bank at 16 kHz, with the statistics that its users normalise by.

    Attributes:
        mel_bins: F.
        length, hop: of a frame, in seconds.
        low, high: edges of the filter bank, in Hz.
        mean, std: of the log-mel values over the training set.
    """

    mel_bins: int
    mean: float
    std: float
    length: float = 0.025
    hop: float = 0.010
    low: float = 20.0
    high: float = SAMPLE_RATE / 2

    def log_mel(self, waveform: Tensor) -> Tensor:
        """log of the power in triangular mel filters, not normalised.

            waveform − its mean → Hann frames → |FFT|² → triangles on mel(f) = 1127 ln(1 + f/700) → ln max(·, 2⁻²³)

        waveform (samples) at 16 kHz -> (F, T) float32, T = ⌊(samples − 400)/160⌋ + 1; T = 0 below one frame. Kaldi's
        pre-emphasis of 0.97 and its removal of each frame's mean apply; no dither, so the result is deterministic.

        Source: the front end of AST and EAT, `torchaudio.compliance.kaldi.fbank(htk_compat=True)`.
        """
        if len(waveform) < round(self.length * SAMPLE_RATE):
            return waveform.new_zeros(self.mel_bins, 0)
        frames: Tensor = import_kaldi().fbank(
            (waveform - waveform.mean()).unsqueeze(0),
            sample_frequency=float(SAMPLE_RATE),
            num_mel_bins=self.mel_bins,
            frame_length=self.length * 1e3,
            frame_shift=self.hop * 1e3,
            low_freq=self.low,
            high_freq=self.high,
            window_type="hanning",
            htk_compat=True,
            use_energy=False,
            dither=0.0,
        )
        return frames.T.contiguous()

    @property
    def floor(self) -> float:
        """What `log_mel` gives for no power at all: ln 2⁻²³."""
        return math.log(torch.finfo(torch.float32).eps)

    def normalise(self, log_mel: Tensor) -> Tensor:
        """(x − mean)/(2 · std), as AST and EAT feed their encoders."""
        return (log_mel - self.mean) / (2 * self.std)

    def seconds(self, frames: int) -> float:
        """The shortest waveform, in seconds, that gives this many frames."""
        return (frames - 1) * self.hop + self.length

    def centres(self) -> Tensor:
        """Centre frequency of each mel bin in Hz, (F) float64: evenly spaced in mel between `low` and `high`."""
        low, high = (1127 * math.log1p(edge / 700) for edge in (self.low, self.high))
        mel = torch.linspace(low, high, self.mel_bins + 2, dtype=torch.float64)[1:-1]
        return 700 * torch.expm1(mel / 1127)


# mean and standard deviation of AudioSet, as AST and EAT publish them
AUDIOSET128 = FrontEnd(mel_bins=128, mean=-4.268, std=4.569)


def modulation_share(log_mel: Tensor, stride: int) -> float:
    """Share of the modulation energy that patches of this stride alias: π/S_t < ω ≤ π, the alias-prone band.

        Σ_f Σ_{π/S_t < ω ≤ π} |X_f(ω)|² / Σ_f Σ_{0 < ω ≤ π} |X_f(ω)|²

    X_f is the discrete Fourier transform over time of mel bin f, its mean removed, under a Hann window; ω in
    rad/frame, so that the hop does not enter.

    Args:
        log_mel: (F, T) natural-log mel spectrogram.
        stride: S_t in frames.

    Returns:
        A number in [0, 1]; 0 where nothing is modulated.

    Source: ours; the band is the paper's argument for its stem.
    """
    frames = log_mel.shape[-1]
    x = log_mel.double()
    x = (x - x.mean(-1, keepdim=True)) * torch.hann_window(frames, periodic=False, dtype=x.dtype)
    power = torch.fft.rfft(x).abs().square().sum(0)  # [frames // 2 + 1]
    aliased = 2 * stride * torch.arange(len(power)) > frames  # 2πk/T > π/S_t
    total = float(power[1:].sum())
    return float(power[aliased].sum()) / total if total > 0 else 0.0


def remove_level(log_mel: Tensor, stride: int) -> Tensor:
    """The log-mel less its moving average: what modulates faster than the sequence of patches can carry.

    The average is under a Hann window of 2 S_t frames, whose gain is 1 for a steady level and ½ at ω = π/S_t, the
    lower edge of the alias-prone band; so the difference has ½ there and nears 1 from twice that on. At the ends of
    the clip the average is over the frames that exist.

    log_mel (F, T) -> (F, T). Source: ours.
    """
    d = torch.arange(1 - stride, stride, dtype=log_mel.dtype)
    window = (1 + torch.cos(math.pi * d / stride)).view(1, 1, -1)  # [1, 1, 2 S_t − 1]: its end frames weigh 0
    rows = torch.stack([log_mel, torch.ones_like(log_mel)]).flatten(0, 1).unsqueeze(1)
    total, weight = torch.nn.functional.conv1d(rows, window, padding=stride - 1).squeeze(1).chunk(2)
    return log_mel - total / weight
