"""A SoundFont's programs: which of them share samples, and notes rendered from them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aape_ssl.sound.audio import SAMPLE_RATE

__all__ = ["Note", "SoundFontError", "Synthesiser", "components", "samples_of"]

# the `pdta` chunk's records, SoundFont Technical Specification 2.04, section 7
RECORDS = {
    b"phdr": [("name", "S20"), ("program", "<u2"), ("bank", "<u2"), ("bag", "<u2"), ("rest", "V12")],
    b"pbag": [("generator", "<u2"), ("modulator", "<u2")],
    b"pgen": [("operator", "<u2"), ("amount", "<u2")],
    b"inst": [("name", "S20"), ("bag", "<u2")],
    b"ibag": [("generator", "<u2"), ("modulator", "<u2")],
    b"igen": [("operator", "<u2"), ("amount", "<u2")],
    b"shdr": [("name", "S20"), ("start", "<u4"), ("end", "<u4"), ("rest", "V18")],
}
INSTRUMENT, SAMPLE = 41, 53  # generator operators: which instrument a preset's zone plays, which sample an instrument's
Note = tuple[float, float, int, int]  # onset (s), end (s), MIDI key, velocity


class SoundFontError(ValueError):
    """A file that is no SoundFont, or no way to play it; the message is one line that says why."""


def _records(path: Path) -> dict[bytes, Any]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise SoundFontError(f"{path}: cannot be read ({error.strerror})") from error
    start = content.find(b"pdta")
    if content[:4] != b"RIFF" or content[8:12] != b"sfbk" or start < 0:
        raise SoundFontError(f"{path}: expected a SoundFont 2 file (RIFF sfbk), got something else")
    found = {}
    at = start + 4
    while at + 8 <= len(content):
        name, size = content[at : at + 4], int.from_bytes(content[at + 4 : at + 8], "little")
        if name in RECORDS:
            kind = np.dtype(RECORDS[name])
            if at + 8 + size > len(content) or size % kind.itemsize:
                raise SoundFontError(f"{path}: its {name.decode()} chunk is damaged ({size} bytes)")
            found[name] = np.frombuffer(content, kind, size // kind.itemsize, at + 8)
        at += 8 + size + size % 2
    missing = RECORDS.keys() - found.keys()
    if missing:
        raise SoundFontError(f"{path}: lacks the chunk {sorted(missing)[0].decode()}")
    return found


def _amounts(bags: Any, generators: Any, first: int, last: int, operator: int) -> set[int]:
    zone = generators[bags["generator"][first] : bags["generator"][last]]
    return set(zone["amount"][zone["operator"] == operator].tolist())


def samples_of(path: str | os.PathLike[str], bank: int = 0) -> dict[int, set[int]]:
    """For each program of a bank, where the samples it plays start in the font's sample data.

    Headers that differ in pitch or loop but start at the same point are the same recording.

    Errors: `SoundFontError`.
    """
    chunk = _records(Path(path))
    presets, instruments = chunk[b"phdr"], chunk[b"inst"]
    found: dict[int, set[int]] = {}
    # the last record of each list is a sentinel that tells where the one before it ends
    for number, preset in enumerate(presets[:-1]):
        if preset["bank"] != bank:
            continue
        starts: set[int] = set()
        following = presets["bag"][number + 1]
        for instrument in _amounts(chunk[b"pbag"], chunk[b"pgen"], preset["bag"], following, INSTRUMENT):
            bags = instruments["bag"][instrument : instrument + 2]
            samples = _amounts(chunk[b"ibag"], chunk[b"igen"], bags[0], bags[1], SAMPLE)
            starts |= {int(chunk[b"shdr"]["start"][sample]) for sample in samples}
        found[int(preset["program"])] = starts
    return dict(sorted(found.items()))


def components(samples: dict[int, set[int]]) -> dict[int, int]:
    """For each program the least program that it is connected to, through programs that share samples."""
    component: dict[int, int] = {}
    for program, own in samples.items():
        # those so far that share a sample with it become one, named by their least
        joined = {component[other] for other in component if samples[other] & own}
        name = min({program} | joined)
        component = {other: name if old in joined else old for other, old in component.items()} | {program: name}
    return component


class Synthesiser:
    """Renders notes of a SoundFont's programs by tinysoundfont, at 48 kHz, resampled to 16 kHz by soxr.

    Errors: `SoundFontError` where tinysoundfont is not installed or refuses the file.
    """

    RATE = 48_000  # Hz: tinysoundfont interpolates linearly and would alias at 16 kHz

    def __init__(self, path: str | os.PathLike[str]) -> None:
        try:
            import tinysoundfont
        except ImportError as error:
            # not in an extra of ours: it asks for PyAudio, which has no wheels and is needed for loudspeakers only
            raise SoundFontError("rendering notes needs tinysoundfont: pip install --no-deps tinysoundfont") from error
        self.synth = tinysoundfont.Synth(gain=-6.0, samplerate=self.RATE)
        try:
            self.font = self.synth.sfload(os.fspath(path))
        except Exception as error:  # its own exceptions are plain ones
            raise SoundFontError(f"{path}: cannot be loaded by tinysoundfont ({error})") from error

    def render(self, program: int, notes: Sequence[Note], seconds: float) -> Tensor:
        """These notes, each (onset, end, key, velocity), as (samples) at 16 kHz, mono.

        Onsets and ends fall on multiples of a sample of 48 kHz; nothing is left of what was rendered before.
        """
        import soxr

        synth, rate = self.synth, self.RATE
        synth.sounds_off()
        synth.generate(rate // 10)  # tinysoundfont fades what it stops
        synth.program_select(0, self.font, 0, program)
        events = sorted(
            [(round(onset * rate), 1, key, velocity) for onset, _, key, velocity in notes]
            + [(round(end * rate), 0, key, 0) for _, end, key, _ in notes]
        )
        total, at, pieces = round(seconds * rate), 0, []
        for time, on, key, velocity in [*events, (total, 0, 0, 0)]:
            time = min(time, total)
            if time > at:
                pieces.append(np.frombuffer(synth.generate(time - at), np.float32).reshape(-1, 2).mean(1))
                at = time
            if on:
                synth.noteon(0, key, velocity)
            else:
                synth.noteoff(0, key)
        waveform = soxr.resample(np.concatenate(pieces), rate, SAMPLE_RATE)
        return torch.from_numpy(waveform[: round(seconds * SAMPLE_RATE)])
