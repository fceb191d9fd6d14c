"""Labelled tasks made from real sound: trill rate, instrument family, Mandarin initials.

    python -m benchmarks.evidence.tasks trill family initials

Each is a folder in the cache with a manifest `file,label,fold,group` (`sources.read_manifest`). Folds never separate a
group: programs that share samples of the soundfont, or one base syllable. Both soundfont tasks have the same programs
in the same fold, so that a fold can be kept out of pre-training for both.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from aape_ssl.audio import SAMPLE_RATE
from aape_ssl.embedding import cache_folder
from aape_ssl.sources import Clip, write_manifest

from .corpora import SOUNDFONT, VOICE, CorpusError, fetch
from .soundfont import Note, SoundFontError, Synthesiser, components, samples_of

__all__ = ["FAMILIES", "FOLDS", "INITIALS", "TASKS", "TRILL_RATES", "grouped_folds", "main", "make"]

T = TypeVar("T")
FOLDS = 5
SMALL = 400  # clips of --small
PROGRAMS = 80  # General MIDI's melodic programs; above are pads, effects and percussion
TRILL_RATES = (2.0, 3.2, 5.0, 8.0, 12.5, 20.0, 31.0, 45.0)  # notes/s
FAMILIES = (
    *("piano", "chromatic percussion", "organ", "guitar", "bass"),
    *("strings", "ensemble", "brass", "reed", "pipe"),
)
INITIALS = "ㄅㄆㄇㄈㄉㄊㄋㄌㄍㄎㄏㄐㄑㄒㄓㄔㄕㄖㄗㄘㄙ"
SILENT = 1e-3  # peak below which a rendered clip is left out: the program does not play that note


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


def _rendered(
    scores: Callable[[Sequence[int], int], Iterator[Score]],
) -> Callable[[Path, Path, int, int | None], list[Clip]]:
    def task(cache: Path, folder: Path, seed: int, most: int | None) -> list[Clip]:
        import soundfile

        font = fetch(SOUNDFONT, cache)
        component = components({number: own for number, own in samples_of(font).items() if number < PROGRAMS})
        programs = list(component)
        groups = [f"program {component[number]}" for number in programs]
        families = [FAMILIES[number // 8] for number in programs]
        fold = dict(zip(programs, grouped_folds(families, groups, seed), strict=True))
        synthesiser = Synthesiser(font)
        clips = []
        for score in _some(list(scores(programs, seed)), seed, most):
            waveform = synthesiser.render(score.program, score.notes, score.seconds)
            if float(waveform.abs().max()) < SILENT:
                continue
            soundfile.write(folder / score.name, waveform.numpy(), SAMPLE_RATE, subtype="PCM_16")
            group = f"program {component[score.program]}"
            clips.append(Clip(score.name, folder / score.name, score.label, fold[score.program], group))
        return clips

    return task


def _initials(cache: Path, folder: Path, seed: int, most: int | None) -> list[Clip]:
    voice = fetch(VOICE, cache)
    paths = sorted(path for path in voice.glob("*/*.ogg") if path.parent.name[0] in INITIALS)
    groups = [path.parent.name.rstrip("12345") for path in paths]
    folds = grouped_folds([group[0] for group in groups], groups, seed)
    # relative to where the folder will stand, so that the cache can be moved
    names = [os.path.join("..", "..", path.relative_to(cache)) for path in paths]
    clips = map(Clip, names, paths, (group[0] for group in groups), folds, groups)
    return _some(list(clips), seed, most)


def _some(items: list[T], seed: int, most: int | None) -> list[T]:
    chosen = np.random.default_rng([seed]).permutation(len(items))[:most]
    return [items[index] for index in sorted(chosen.tolist())]


TASKS = {"trill": _rendered(trill_scores), "family": _rendered(family_scores), "initials": _initials}


def make(task: str, cache: Path | None = None, seed: int = 0, clips: int | None = None) -> Path:
    """The manifest of a task, made unless the cache has it.

    Args:
        task: a name in `TASKS`: "trill" (8 classes), "family" (10) or "initials" (21).
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
    target = cache / "tasks" / f"{task}-seed{seed}{'' if clips is None else f'-{clips}'}"
    if (target / "manifest.csv").exists():
        return target / "manifest.csv"
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f"{target.name}-") as name:
        folder = Path(name) / "task"
        folder.mkdir()
        write_manifest(folder / "manifest.csv", TASKS[task](cache, folder, seed, clips))
        shutil.rmtree(target, ignore_errors=True)
        os.replace(folder, target)
    return target / "manifest.csv"


def main(argv: Sequence[str] | None = None) -> int:
    """Make the tasks that `argv` names; one line each. Returns 0, or 1 where one could not be made."""
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
            print(make(task, args.cache, args.seed, SMALL if args.small else None), flush=True)
        except (CorpusError, SoundFontError, ValueError) as error:
            print(f"{task}: {error}", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
