"""Which clips pre-train, train, validate and test: the tasks of an experiment, and their log-mels."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aape_ssl.evaluation import probe
from aape_ssl.sound.sources import Clip, read_manifest, write_manifest

from .kept import FRONT_END
from .pool import make_pool
from .spectrograms import Spectrograms
from .tasks import SMALL, TASKS, make

__all__ = ["CHOICES", "RESULTS", "Material", "Protocol", "Set"]

FRAMES = 128  # 1.3 s, as in pre-training
SPEECH = 64  # syllables are 0.3 to 0.4 s long, and up to 15 frames late


@dataclass(frozen=True)
class Protocol:
    """Which folds an experiment may look at.

    Attributes:
        name: of the experiment.
        tested: folds that encoders are tested on; each task's own `held_out` for None.
        unseen: folds whose clips are no part of it at all.
    """

    name: str
    tested: tuple[str, ...] | None = None
    unseen: tuple[str, ...] = ()

    def tests(self, task: str) -> tuple[str, ...]:
        """The folds of a task that encoders are tested on, and never pre-trained on."""
        return TASKS[task].held_out if self.tested is None else self.tested


RESULTS = Protocol("results")
"""Tested once everything is settled: fold 0, or all of a task whose clips no pre-training sees."""
CHOICES = Protocol("choices", ("1",), ("0",))
"""To choose by: tested on fold 1, in none of its pre-trainings either; fold 2 validates, 3 and 4 train. No clip of fold
0 is in any of it, so that what is chosen is not chosen by what it will be tested on."""


@dataclass(frozen=True)
class Set:
    """A task as an experiment sees it.

    Attributes:
        task: its name.
        manifest: with absolute paths, of the folds that may be seen.
        clips: the manifest's.
        tested: folds to test on, one after the other.
        frames: how much of a clip is encoded.
    """

    task: str
    manifest: Path
    clips: tuple[Clip, ...]
    tested: tuple[str, ...]
    frames: int

    @cached_property
    def rounds(self) -> list[probe.Round]:
        """Indices of training, validation and test clips of each round."""
        return probe.folds_of(self.clips, self.tested)

    @cached_property
    def classes(self) -> NDArray[np.int64]:
        """Of all clips, as numbers."""
        labels = sorted({clip.label for clip in self.clips})
        return np.array([labels.index(clip.label) for clip in self.clips], dtype=np.int64)

    @cached_property
    def groups(self) -> tuple[str, ...]:
        """Of the test clips, in the rounds' order."""
        return tuple(self.clips[index].group or self.clips[index].name for *_, test in self.rounds for index in test)

    @cached_property
    def key(self) -> dict[str, Any]:
        """What results depend on."""
        lines = [f"{clip.path.name} {clip.label} {clip.split} {clip.group}" for clip in self.clips]
        return {
            "task": self.task,
            "version": TASKS[self.task].version,
            "clips": digest(lines),
            "tested": self.tested,
            "frames": self.frames,
        }

    def hits(self, correct: Sequence[float]) -> list[float]:
        """How many of each group's test clips are right, groups in `sorted` order: all that intervals need."""
        _, of = np.unique(np.asarray(self.groups), return_inverse=True)
        return [round(float(value), 4) for value in np.bincount(of, np.asarray(correct, dtype=float))]

    def description(self) -> dict[str, Any]:
        """For reports: groups and how many test clips each has."""
        names, counts = np.unique(np.asarray(self.groups), return_counts=True)
        classes = len(set(self.classes.tolist()))
        return {"groups": names.tolist(), "counts": counts.tolist(), "classes": classes, "clips": len(self.clips)}


def digest(lines: Sequence[str]) -> str:
    """Of lines of text, in their order."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Material:
    """What an experiment works with.

    Attributes:
        sets: its tasks, by name.
        pretraining: clips, each file once: all that may be seen and are tested by none.
        kept: log-mels of all clips.
    """

    sets: dict[str, Set]
    pretraining: tuple[Clip, ...]
    kept: Spectrograms

    @classmethod
    def prepare(
        cls, protocol: Protocol, tasks: Sequence[str], cache: Path, small: bool = False, pool: bool = False
    ) -> Material:
        """Make the tasks, write their manifests, compute log-mels; what the cache has is taken from there.

        Args:
            protocol, tasks: which folds of which tasks.
            cache: folder.
            small: a part of each task, and of the pool, for a trial.
            pool: pre-train on the sound that no task has too (`pool`).

        Errors: `CorpusError`, `SoundFontError`, `AudioError`.
        """
        found = {task: read_manifest(make(task, cache, 0, SMALL if small else None)) for task in tasks}
        further = [replace(clip, path=clip.path.resolve()) for clip in read_manifest(make_pool(cache))] if pool else []
        if small:
            further = further[:: max(1, len(further) // SMALL)]
        every = list({clip.path.resolve(): clip for clips in (*found.values(), further) for clip in clips}.values())
        kept = Spectrograms.of(every, FRONT_END, FRAMES, cache=cache)
        folder = cache / "evidence" / protocol.name
        folder.mkdir(parents=True, exist_ok=True)
        sets = {}
        for task, clips in found.items():
            seen = [
                replace(clip, name=os.fspath(clip.path.resolve()), path=clip.path.resolve())
                for clip in clips
                if clip.split not in protocol.unseen
            ]
            manifest = folder / f"{task}{'-small' if small else ''}.csv"
            write_manifest(manifest, seen)
            frames = SPEECH if task in ("initials", "tones") else FRAMES
            sets[task] = Set(task, manifest, tuple(seen), protocol.tests(task), frames)
        tested = {clip.path for each in sets.values() for clip in each.clips if clip.split in each.tested}
        seen_once = {clip.path: clip for each in sets.values() for clip in each.clips if clip.path not in tested}
        return cls(sets, (*seen_once.values(), *further), kept)

    def of(self, task: str) -> Spectrograms:
        """The log-mels, as long as this task's clips."""
        return replace(self.kept, frames=self.sets[task].frames)

    @cached_property
    def hours(self) -> float:
        """How much pre-training sees, at most a crop of each clip."""
        lengths = self.kept.lengths[self.kept.rows(self.pretraining)]
        return float(np.minimum(lengths, self.kept.frames).sum()) * FRONT_END.hop / 3600

    @cached_property
    def key(self) -> dict[str, Any]:
        """What pre-training depends on."""
        about = {name: self.kept.about[name] for name in ("version", "front_end", "shifts")}
        return {**about, "clips": digest([f"{clip.path.name} {clip.split}" for clip in self.pretraining])}
