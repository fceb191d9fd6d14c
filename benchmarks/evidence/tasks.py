"""Labelled tasks made from real sound: trill rate, instrument family, Mandarin initials and tones, drums.

    python -m benchmarks.evidence.tasks trill family initials tones drums

Each is a folder in the cache with a manifest `file,label,fold,group` (`sources.read_manifest`), and `left-out.csv`
(`file,why`) where something of its package is no part of it. Folds never separate a group: programs that share samples
of the soundfont, one base syllable, or drum kits of one origin. Both soundfont tasks have the same programs in the same
fold, and both tasks of speech the same clips, so that a fold can be kept out of pre-training for both.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from aape_ssl.evaluation.embedding import cache_folder
from aape_ssl.sound.audio import SAMPLE_RATE
from aape_ssl.sound.sources import Clip, read_manifest, write_manifest

from .corpora import DRUM_KITS, DRUM_KITS_OF_HYDROGEN, LMMS, SONIC_PI, SOUNDFONT, VOICE, CorpusError, fetch
from .drums import UNDECODABLE, recordings
from .soundfont import Note, SoundFontError, Synthesiser, components, samples_of

__all__ = [
    "FAMILIES",
    "FOLDS",
    "INITIALS",
    "TASKS",
    "TRILL_RATES",
    "Task",
    "grouped_folds",
    "keep",
    "left_out",
    "main",
    "make",
    "summary",
]

T = TypeVar("T")
FOLDS = 5
LEFT_OUT = "left-out.csv"
SMALL = 400  # clips of --small
PROGRAMS = 80  # General MIDI's melodic programs; above are pads, effects and percussion
TRILL_RATES = (2.0, 3.2, 5.0, 8.0, 12.5, 20.0, 31.0, 45.0)  # notes/s
FAMILIES = (
    *("piano", "chromatic percussion", "organ", "guitar", "bass"),
    *("strings", "ensemble", "brass", "reed", "pipe"),
)
INITIALS = "ㄅㄆㄇㄈㄉㄊㄋㄌㄍㄎㄏㄐㄑㄒㄓㄔㄕㄖㄗㄘㄙ"
TONES = {"": "1", "2": "2", "3": "3", "4": "4"}  # what a syllable's name ends in; the neutral tone, 1, is left out
SILENT = 1e-3  # peak below which a rendered clip is left out: the program does not play that note


Made = tuple[list[Clip], dict[str, str]]  # clips, and for each file that is left out the reason why
Maker = Callable[[Path, Path, int, int | None], Made]  # of cache, folder, seed, and how many clips at most


@dataclass(frozen=True)
class Task:
    """How a task is made.

    Attributes:
        version: to be raised whenever other clips, labels, groups or folds come out: caches are told apart by it.
        held_out: the folds that encoders are tested on; no pre-training may see their clips.
        make: (cache, folder, seed, most) -> clips, and why others are left out; renders into the folder.
    """

    version: int
    held_out: tuple[str, ...]
    make: Maker


@dataclass(frozen=True)
class Score:
    """What a clip is rendered from."""

    name: str
    label: str
    program: int
    notes: tuple[Note, ...]
    seconds: float


def grouped_folds(labels: Sequence[str], groups: Sequence[str], seed: int) -> list[str]:
    """For each item its fold, "0" to "4": whole groups, labels spread as evenly as that allows."""
    from sklearn.model_selection import StratifiedGroupKFold

    folds = np.empty(len(labels), dtype=int)
    split = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed).split(np.zeros(len(labels)), labels, groups)
    for fold, (_, test) in enumerate(split):
        folds[test] = fold
    return [str(fold) for fold in folds]


def trill_scores(programs: Sequence[int], seed: int) -> Iterator[Score]:
    """Two notes in turn, at one of `TRILL_RATES` ± 8 % notes a second, for 1.3 s; four clips a program and rate.

    The lower key is 48 to 71, the interval 1 to 7 semitones, the velocity 60 to 119, the phase any.
    """
    seconds = 1.3
    for program in programs:
        for number, nominal in enumerate(TRILL_RATES):
            for take in range(4):
                rng = np.random.default_rng([seed, program, number, take])
                rate = nominal * rng.uniform(0.92, 1.08)
                keys = int(rng.integers(48, 72)) + np.array([0, rng.integers(1, 8)])
                velocity = int(rng.integers(60, 120))
                starts = np.arange(-rng.uniform(), seconds * rate) / rate
                notes = [
                    (max(float(start), 0.0), float(start + 1 / rate), int(keys[n % 2]), velocity)
                    for n, start in enumerate(starts)
                ]
                yield Score(f"{program:03}-{nominal:g}-{take}.flac", f"{nominal:g}", program, tuple(notes), seconds)


def family_scores(programs: Sequence[int], seed: int) -> Iterator[Score]:
    """Single notes of 1.5 s, held for 1.2 s: keys 36 to 84 in whole tones, velocities 50, 80 and 110. No chance."""
    for program in programs:
        for key in range(36, 85, 2):
            for velocity in (50, 80, 110):
                name = f"{program:03}-{key}-{velocity}.flac"
                yield Score(name, FAMILIES[program // 8], program, ((0.0, 1.2, key, velocity),), 1.5)


def _rendered(scores: Callable[[Sequence[int], int], Iterator[Score]]) -> Maker:
    def task(cache: Path, folder: Path, seed: int, most: int | None) -> Made:
        import soundfile

        font = fetch(SOUNDFONT, cache)
        component = components({number: own for number, own in samples_of(font).items() if number < PROGRAMS})
        programs = list(component)
        groups = [f"program {component[number]}" for number in programs]
        families = [FAMILIES[number // 8] for number in programs]
        fold = dict(zip(programs, grouped_folds(families, groups, seed), strict=True))
        synthesiser = Synthesiser(font)
        clips, silent = [], {}
        for score in _some(list(scores(programs, seed)), seed, most):
            waveform = synthesiser.render(score.program, score.notes, score.seconds)
            if float(waveform.abs().max()) < SILENT:
                silent[score.name] = "silent: the program does not play these notes"
                continue
            soundfile.write(folder / score.name, waveform.numpy(), SAMPLE_RATE, subtype="PCM_16")
            group = f"program {component[score.program]}"
            clips.append(Clip(score.name, folder / score.name, score.label, fold[score.program], group))
        return clips, silent

    return task


def _in_cache(path: Path, cache: Path) -> str:
    """Relative to where the task's folder will stand, so that the cache can be moved."""
    return os.path.join("..", "..", path.relative_to(cache))


def _syllables(cache: Path, seed: int) -> list[Clip]:
    """Spoken syllables labelled by initial and what stands for the tone."""
    paths = sorted(path for path in fetch(VOICE, cache).glob("*/*.ogg") if path.parent.name[0] in INITIALS)
    groups = [path.parent.name.rstrip("12345") for path in paths]
    folds = grouped_folds([group[0] for group in groups], groups, seed)
    return [
        Clip(_in_cache(path, cache), path, group[0] + path.parent.name.removeprefix(group), fold, group)
        for path, group, fold in zip(paths, groups, folds, strict=True)
    ]


def _initials(cache: Path, folder: Path, seed: int, most: int | None) -> Made:
    return _some([replace(clip, label=clip.label[0]) for clip in _syllables(cache, seed)], seed, most), {}


def _tones(cache: Path, folder: Path, seed: int, most: int | None) -> Made:
    # chosen before those of the neutral tone are left out: so many clips are of the same syllables as in _initials
    clips = _some(_syllables(cache, seed), seed, most)
    return (
        [replace(clip, label=TONES[clip.label[1:]]) for clip in clips if clip.label[1:] in TONES],
        {clip.name: "of the neutral tone" for clip in clips if clip.label[1:] not in TONES},
    )


def _drums(cache: Path, folder: Path, seed: int, most: int | None) -> Made:
    kits = [fetch(package, cache) for package in (DRUM_KITS_OF_HYDROGEN, DRUM_KITS)]
    found = list(recordings(kits, fetch(LMMS, cache), fetch(SONIC_PI, cache)))
    kept = [recording for recording in found if recording.label]
    groups = [recording.group for recording in kept]
    folds = grouped_folds([recording.label for recording in kept], groups, seed)
    clips = [
        Clip(_in_cache(recording.path, cache), recording.path, recording.label, fold, group)
        for recording, fold, group in zip(kept, folds, groups, strict=True)
    ]
    return _some(clips, seed, most), {_in_cache(each.path, cache): each.why for each in found if each.why}


def _some(items: list[T], seed: int, most: int | None) -> list[T]:
    chosen = np.random.default_rng([seed]).permutation(len(items))[:most]
    return [items[index] for index in sorted(chosen.tolist())]


TASKS = {
    "trill": Task(1, ("0",), _rendered(trill_scores)),
    "family": Task(1, ("0",), _rendered(family_scores)),
    "initials": Task(1, ("0",), _initials),
    "tones": Task(1, ("0",), _tones),
    # few clips of 13 groups, and fold 0 may be one group: an interval over groups needs them all
    "drums": Task(1, tuple(map(str, range(FOLDS))), _drums),
}


def make(task: str, cache: Path | None = None, seed: int = 0, clips: int | None = None) -> Path:
    """The manifest of a task, made unless the cache has it.

    Args:
        task: a name in `TASKS`: "trill" (8 classes), "family" (10), "initials" (21), "tones" (4) or "drums" (10).
        cache: `embedding.cache_folder()` unless given.
        seed: of the clips and the folds.
        clips: at most so many, chosen at random; all unless given.

    Errors: `CorpusError`, `SoundFontError`; `ValueError` for another name or number.
    """
    if task not in TASKS:
        raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {task!r}")
    if seed < 0 or (clips is not None and clips < 1):
        raise ValueError(f"expected seed ≥ 0 and clips ≥ 1, got {seed} and {clips}")
    cache = cache or cache_folder()
    target = cache / "tasks" / f"{task}-v{TASKS[task].version}-seed{seed}{'' if clips is None else f'-{clips}'}"
    return keep(target, lambda folder: TASKS[task].make(cache, folder, seed, clips))


def keep(target: Path, maker: Callable[[Path], Made]) -> Path:
    """The manifest in a folder of the cache, with `left-out.csv` beside it; made whole by `maker` unless it is there.

    Args:
        target: the folder.
        maker: folder to write into -> clips, and why others are left out.
    """
    if (target / "manifest.csv").exists():
        return target / "manifest.csv"
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f"{target.name}-") as name:
        folder = Path(name) / "task"
        folder.mkdir()
        made, without = maker(folder)
        write_manifest(folder / "manifest.csv", made)
        with open(folder / LEFT_OUT, "w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([("file", "why"), *without.items()])
        shutil.rmtree(target, ignore_errors=True)
        os.replace(folder, target)
    return target / "manifest.csv"


def left_out(manifest: Path) -> dict[str, str]:
    """For each file of a task's package that is no part of the task, the reason why."""
    with open(manifest.with_name(LEFT_OUT), encoding="utf-8", newline="") as file:
        return {row["file"]: row["why"] for row in csv.DictReader(file)}


def summary(manifest: Path) -> list[str]:
    """How many clips, by class and by fold; how many files are left out and why, the undecodable ones by name."""
    clips, without = read_manifest(manifest), left_out(manifest)

    def counts(values: Iterable[str]) -> str:
        return ", ".join(f"{value} {count}" for value, count in sorted(Counter(values).items()))

    lines = [
        f"{len(clips)} clips in {len({clip.group for clip in clips})} groups: {counts(clip.label for clip in clips)}",
        f"folds: {counts(clip.split for clip in clips)}",
    ]
    if without:
        lines.append(f"left out: {counts(re.split(': | as ', why)[0] for why in without.values())}")
    return lines + [f"{file}: {why}" for file, why in without.items() if why.startswith(UNDECODABLE)]


def main(argv: Sequence[str] | None = None) -> int:
    """Make the tasks that `argv` names, and say what is in them. Returns 0, or 1 where one could not be made."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evidence.tasks", description="Labelled tasks from real sound."
    )
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"{', '.join(TASKS)} (default: all)")
    parser.add_argument("--cache", type=Path, help="folder for packages and clips (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of clips and folds (default: %(default)s)")
    parser.add_argument("--small", action="store_true", help=f"{SMALL} clips a task, for trying things")
    parser.set_defaults(cache=cache_folder())
    args = parser.parse_args(argv)
    status = 0
    for task in args.tasks or TASKS:
        try:
            manifest = make(task, args.cache, args.seed, SMALL if args.small else None)
            print(manifest, *(f"  {line}" for line in summary(manifest)), sep="\n", flush=True)
        except (CorpusError, SoundFontError, ValueError) as error:
            print(f"{task}: {error}", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
