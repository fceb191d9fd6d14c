"""From a sound file to a log-mel spectrogram, and how much of its modulation a patch grid aliases."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .._messages import one_line
from ..libraries import import_kaldi

__all__ = [
    "AUDIOSET128",
    "FRONT_ENDS",
    "M2D80",
    "SAMPLE_RATE",
    "AudioError",
    "FrontEnd",
    "KaldiFbank",
    "MelSpectrogram",
    "duration",
    "import_kaldi",
    "load",
    "measure",
    "modulation_share",
    "remove_level",
]

SAMPLE_RATE = 16_000  # Hz

BLOCK = 65_536  # frames read at a time where all of a file is

# times full scale; powers of louder samples overflow float32
LOUDEST = 1e12


class AudioError(ValueError):
    """A sound file that cannot be used; the message is one line that says why."""


def _open(file: str | os.PathLike[str] | BinaryIO) -> Any:
    import soundfile

    if isinstance(file, str | os.PathLike):
        if not os.path.exists(file):
            raise AudioError("no such file")
        if os.path.isdir(file):
            raise AudioError("is a directory, not a sound file")
        if os.path.getsize(file) == 0:
            raise AudioError("is empty (0 bytes)")
        try:
            os.fsencode(file).decode("utf-8")
        except UnicodeDecodeError as error:
            raise AudioError("its name is not UTF-8") from error
        file = os.fspath(file)
    try:
        return soundfile.SoundFile(file)
    except (soundfile.SoundFileError, OSError, TypeError) as error:  # TypeError: headerless formats such as .raw
        raise _unreadable(error) from error


def _unreadable(error: Exception) -> AudioError:
    why = one_line(getattr(error, "error_string", error)).rstrip(".")
    return AudioError(f"cannot be read as sound ({why})")


def duration(path: str | os.PathLike[str]) -> float:
    """Length of a sound file in seconds, as its header says. Errors: `AudioError`."""
    with _open(path) as file:
        return float(file.frames / file.samplerate)


def load(file: str | os.PathLike[str] | BinaryIO, seconds: float | None = None, at: float = 0.0) -> Tensor:
    """A sound file as a mono waveform at 16 kHz.

    Args:
        file: path or open binary file of any format that libsndfile reads: wav, flac, ogg, mp3, aiff; any sampling
            rate, any number of channels, which are averaged. Resampled by soxr ("HQ").
        seconds: how much to read; all unless given.
        at: which piece of a longer file: 0 its start, 1 its end, in between a piece in between. A file that was cut
            short is a shorter file, whatever its header says.

    Returns:
        (samples), float32, full scale ±1.

    Errors: `AudioError` for a file that is missing, unreadable, without samples, or with samples that are not finite or
    beyond `LOUDEST`.
    """
    import soundfile
    import soxr

    with _open(file) as sound:
        rate = int(sound.samplerate)
        most = sound.frames if seconds is None else math.ceil(seconds * rate)
        try:
            samples = _piece(sound, sound.frames, most, at)
            if at > 0 and len(samples) < min(sound.frames, most):
                # an mp3 that was cut is shorter than its header says; where that says nothing, the length is estimated,
                # with tags taken for sound: only decoding tells
                there = sound.seek(0)
                while read := len(sound.read(BLOCK, dtype="float32")):
                    there += read
                samples = _piece(sound, there, most, at)
        except (soundfile.SoundFileError, OSError, MemoryError, ValueError) as error:
            raise _unreadable(error) from error
    if len(samples) == 0:
        raise AudioError("holds no samples")
    waveform = torch.from_numpy(samples.mean(axis=1))
    if not bool(waveform.isfinite().all()):
        raise AudioError("holds samples that are not finite")
    if (peak := float(waveform.abs().max())) > LOUDEST:
        raise AudioError(f"holds samples far beyond full scale ({peak:.3g})")
    if rate != SAMPLE_RATE:
        waveform = torch.from_numpy(soxr.resample(waveform.numpy(), rate, SAMPLE_RATE))
    return waveform


def _piece(sound: Any, frames: int, most: int, at: float) -> Any:
    """At most so many frames of an open file that has `frames`, (frames, channels) float32."""
    count = min(frames, most)
    if at > 0:
        sound.seek(round(at * (frames - count)))
    return sound.read(count, dtype="float32", always_2d=True)


@dataclass(frozen=True)
class FrontEnd(ABC):
    """A log-mel filter bank at 16 kHz, with the statistics that its users normalise by.

    Attributes:
        mel_bins: F.
        mean, std: of the log-mel values over the training set; `measure` computes them from other data.
        length, hop: of a frame, in seconds.
        low, high: edges of the filter bank, in Hz.
        spread: how many `std` are 1 after `normalise`.
    """

    mel_bins: int
    mean: float
    std: float
    length: float = 0.025
    hop: float = 0.010
    low: float = 20.0
    high: float = SAMPLE_RATE / 2
    spread: float = 1.0

    def log_mel(self, waveform: Tensor) -> Tensor:
        """ln of the power in the mel filters, not normalised.

        waveform (..., samples) at 16 kHz -> (..., F, T) float32, contiguous, on the waveform's device; T = 0 where the
        waveform is shorter than one frame.

        Errors: `TypeError` for samples that are not floating-point numbers; `ValueError` for a number, or a batch of
        no waveforms.
        """
        if not isinstance(waveform, Tensor):
            raise TypeError(f"waveform: expected a tensor, got {type(waveform).__name__}")
        if not waveform.is_floating_point():
            raise TypeError(f"waveform: expected floating-point samples, full scale ±1, got {waveform.dtype}")
        if waveform.dim() == 0 or math.prod(waveform.shape[:-1]) == 0:
            got = tuple(waveform.shape)
            raise ValueError(f"waveform: expected shape (..., samples) of at least one waveform, got {got}")
        if self._too_short(waveform):
            return waveform.new_zeros(*waveform.shape[:-1], self.mel_bins, 0, dtype=torch.float32)
        return self._log_mel(waveform.float()).contiguous()

    @abstractmethod
    def _log_mel(self, waveform: Tensor) -> Tensor:
        """The same for float32 samples, at least one frame of them."""

    @abstractmethod
    def seconds(self, frames: int) -> float:
        """The shortest waveform, in seconds, that gives at least this many frames."""

    def centres(self) -> Tensor:
        """Centre frequency of each mel bin in Hz, (F) float64: evenly spaced in mel between `low` and `high`."""
        low, high = (self._mel(torch.tensor(edge, dtype=torch.float64)) for edge in (self.low, self.high))
        return self._hz(torch.linspace(float(low), float(high), self.mel_bins + 2, dtype=torch.float64)[1:-1])

    @staticmethod
    @abstractmethod
    def _mel(hz: Tensor) -> Tensor: ...

    @staticmethod
    @abstractmethod
    def _hz(mel: Tensor) -> Tensor: ...

    @property
    def floor(self) -> float:
        """What `log_mel` gives for no power at all: ln 2⁻²³."""
        return math.log(torch.finfo(torch.float32).eps)

    def normalise(self, log_mel: Tensor) -> Tensor:
        """(x − mean)/(spread · std)."""
        return (log_mel - self.mean) / (self.spread * self.std)

    def by(self, statistics: Sequence[float]) -> FrontEnd:
        """The same, normalising by this mean and standard deviation. Errors: `ValueError` for what are none."""
        if len(statistics) != 2 or not (math.isfinite(statistics[0]) and 0 < statistics[1] < math.inf):
            raise ValueError(f"statistics: expected (mean, std), finite and std > 0, got {tuple(statistics)}")
        return replace(self, mean=float(statistics[0]), std=float(statistics[1]))

    def check(self, waveform: Tensor) -> Tensor:
        """`waveform` (samples), if it holds a frame: a shorter one would be silence that something else adds.

        Errors: `AudioError`.
        """
        if self._too_short(waveform):
            got = waveform.shape[-1] / SAMPLE_RATE
            raise AudioError(f"is too short: expected {self.length:g} s, one frame, got {got:.3g} s")
        return waveform

    def _too_short(self, waveform: Tensor) -> bool:
        return waveform.shape[-1] < round(self.length * SAMPLE_RATE)


@dataclass(frozen=True)
class KaldiFbank(FrontEnd):
    """Kaldi's filter bank as AST and EAT use it; they normalise by twice the standard deviation.

        waveform − its mean → Hann frames → |FFT|² → triangles on mel(f) = 1127 ln(1 + f/700) → ln max(·, 2⁻²³)

    T = ⌊(samples − 400)/160⌋ + 1. Kaldi's pre-emphasis of 0.97 and its removal of each frame's mean apply; no dither,
    so the result is deterministic. Source: `torchaudio.compliance.kaldi.fbank(htk_compat=True)`.
    """

    spread: float = 2.0

    def _log_mel(self, waveform: Tensor) -> Tensor:
        *batch, samples = waveform.shape
        length, hop = round(self.length * SAMPLE_RATE), round(self.hop * SAMPLE_RATE)
        # Kaldi takes one waveform: clips are laid end to end, a whole number of hops each, and the frames that reach
        # from one clip into the next are dropped
        stride = -(-samples // hop) * hop
        clips = (waveform - waveform.mean(-1, keepdim=True)).reshape(-1, samples)
        joined = torch.nn.functional.pad(clips, (0, stride - samples)).flatten()
        joined = joined[: len(joined) - (stride - samples)]
        frames: Tensor = import_kaldi().fbank(
            joined.unsqueeze(0),
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
        count = (samples - length) // hop + 1
        frames = torch.nn.functional.pad(frames, (0, 0, 0, len(clips) * (stride // hop) - len(frames)))
        frames = frames.view(*batch, stride // hop, self.mel_bins)[..., :count, :]
        return frames.mT

    def seconds(self, frames: int) -> float:
        """From the first frame's start to the last one's end."""
        return (frames - 1) * self.hop + self.length

    @staticmethod
    def _mel(hz: Tensor) -> Tensor:
        return 1127 * torch.log1p(hz / 700)

    @staticmethod
    def _hz(mel: Tensor) -> Tensor:
        return 700 * torch.expm1(mel / 1127)


@dataclass(frozen=True)
class MelSpectrogram(FrontEnd):
    """The mel spectrogram of M2D: frames centred on multiples of the hop, the waveform reflected at its ends.

        periodic Hann frames → |FFT|² → triangles on the Slaney mel scale, of area 1 Hz → ln(· + 2⁻²³)

    T = ⌊samples/160⌋ + 1. Source: M2D (there by nnAudio), as `torchaudio.transforms.MelSpectrogram`.
    """

    def _log_mel(self, waveform: Tensor) -> Tensor:
        power: Tensor = _mel_transform(self, waveform.device)(waveform)
        return (power + torch.finfo(torch.float32).eps).log()

    def seconds(self, frames: int) -> float:
        """From the first frame's centre to the last one's, but at least one frame."""
        return max((frames - 1) * self.hop, self.length)

    @staticmethod
    def _mel(hz: Tensor) -> Tensor:
        return torch.where(hz < 1000, 3 / 200 * hz, 15 + 27 * torch.log(hz / 1000) / math.log(6.4))

    @staticmethod
    def _hz(mel: Tensor) -> Tensor:
        return torch.where(mel < 15, 200 / 3 * mel, 1000 * torch.exp((mel - 15) * math.log(6.4) / 27))


@lru_cache(maxsize=8)
def _mel_transform(front_end: MelSpectrogram, device: torch.device) -> torch.nn.Module:
    import_kaldi()  # after it, torchaudio as a whole can be imported
    from torchaudio.transforms import MelSpectrogram as Transform

    module: torch.nn.Module = Transform(
        sample_rate=SAMPLE_RATE,
        n_fft=round(front_end.length * SAMPLE_RATE),
        hop_length=round(front_end.hop * SAMPLE_RATE),
        f_min=front_end.low,
        f_max=front_end.high,
        n_mels=front_end.mel_bins,
        norm="slaney",
        mel_scale="slaney",
    )
    return module.to(device)


# mean and standard deviation of AudioSet, as published by AST and EAT, and by M2D
AUDIOSET128 = KaldiFbank(mel_bins=128, mean=-4.268, std=4.569)
M2D80 = MelSpectrogram(mel_bins=80, mean=-7.1, std=4.2, low=50.0)
FRONT_ENDS: dict[str, FrontEnd] = {"audioset128": AUDIOSET128, "m2d80": M2D80}


def measure(front_end: FrontEnd, waveforms: Iterable[Tensor]) -> FrontEnd:
    """`front_end` with the mean and standard deviation of its log-mel values over all frames of these waveforms.

    Sums in float64; every frame counts the same, so that long clips weigh more than short ones.

    Errors: `ValueError` where there is no frame at all, or where all values are equal.
    """
    count, total, squares = 0, 0.0, 0.0
    for waveform in waveforms:
        x = front_end.log_mel(waveform).double() - front_end.mean  # centred, so that the squares do not cancel
        count, total, squares = count + x.numel(), total + float(x.sum()), squares + float(x.square().sum())
    if count == 0:
        raise ValueError("measure: expected waveforms of at least one frame, got none")
    mean = total / count
    variance = squares / count - mean**2
    if not variance > 1e-6:
        raise ValueError("measure: expected sound, got waveforms whose log-mel values are all equal")
    return replace(front_end, mean=front_end.mean + mean, std=math.sqrt(variance))


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
    """The log-mel minus its moving average: the modulation that is too fast for the sequence of patches to carry.

    The average is under a Hann window of 2 S_t frames, whose gain is 1 for a steady level and ½ at ω = π/S_t, the
    lower edge of the alias-prone band; so the difference has ½ there and is near 1 from twice that on. At the ends of
    the clip the average is over the frames that exist.

    log_mel (F, T) -> (F, T). Source: ours.
    """
    d = torch.arange(1 - stride, stride, dtype=log_mel.dtype)
    window = (1 + torch.cos(math.pi * d / stride)).view(1, 1, -1)  # [1, 1, 2 S_t − 1]: its end frames weigh 0
    rows = torch.stack([log_mel, torch.ones_like(log_mel)]).flatten(0, 1).unsqueeze(1)
    total, weight = torch.nn.functional.conv1d(rows, window, padding=stride - 1).squeeze(1).chunk(2)
    return log_mel - total / weight
