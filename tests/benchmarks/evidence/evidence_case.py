"""A task of a second and a half, for the tests of the experiments' runner."""

from pathlib import Path

import numpy as np
import pytest
import soundfile

from aape_ssl.sound.audio import SAMPLE_RATE
from aape_ssl.sound.sources import Clip, write_manifest
from benchmarks.evidence import material
from benchmarks.evidence.material import RESULTS, Material, Protocol

CLIPS = 60


def made(folder: Path, task: str, clips: int = CLIPS) -> Path:
    """Two classes, tones above and below 1 kHz in noise, six clips a group, and folds of whole groups."""
    folder = folder / task
    folder.mkdir(parents=True, exist_ok=True)
    rng, found = np.random.default_rng(len(task)), []
    for number in range(clips):
        label, group = number % 2, number // 6
        hz = rng.uniform(300, 800) * (1 + 2 * label)
        t = np.arange(round(SAMPLE_RATE * 0.2)) / SAMPLE_RATE
        path = folder / f"{number}.wav"
        soundfile.write(path, 0.1 * np.sin(2 * np.pi * hz * t) + 0.01 * rng.standard_normal(len(t)), SAMPLE_RATE)
        found.append(Clip(path.name, path, f"label {label}", str(group % 5), f"group {group}"))
    write_manifest(folder / "manifest.csv", found)
    return folder / "manifest.csv"


def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: Protocol = RESULTS) -> Material:
    """Tasks trill and initials, of so few frames that a step takes a moment."""
    monkeypatch.setattr(material, "make", lambda task, cache, seed, clips: made(cache / "made", task))
    monkeypatch.setattr(material, "FRAMES", 32)
    monkeypatch.setattr(material, "SPEECH", 16)
    return Material.prepare(protocol, ["trill", "initials"], tmp_path)
