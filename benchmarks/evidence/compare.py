"""Three stems side by side: pre-trained alike on the same real sound, then probed, beside what needs no training.

    python -m benchmarks.evidence.compare                      all of it; `make ssl`
    python -m benchmarks.evidence.compare --small --steps 20   a trial

Equal for the stems: data, order, crops, masks, steps, hyper-parameters (preset `laptop`, set before anything was seen)
and feature size. The stems are AaPE, the plain convolution, and the control: the convolution plus an MLP branch of
AaPE's size. Fold 0 of every task is in no pre-training; fold 1 chooses the epoch of a probe, folds 2 to 4 train it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from aape_ssl import embedding, pretrained, probe
from aape_ssl.audio import AudioError
from aape_ssl.commands import embed_clips
from aape_ssl.embedding import cache_folder
from aape_ssl.pretrained import AudioEncoder, load
from aape_ssl.sources import Clip, read_manifest, write_manifest

from .corpora import CorpusError
from .soundfont import SoundFontError
from .tasks import TASKS, make

__all__ = ["main"]

STEMS = ("aape", "conv", "conv+mlp")
TEST_FOLD = "0"
FRAMES = 128  # 1.3 s: the tasks' clips are 0.3 to 1.5 s long
PRESET = Path(pretrained.__file__).with_name("presets") / "laptop.yaml"


def say(text: str) -> None:
    """At once, also into a pipe."""
    print(text, flush=True)


def pretraining_manifest(tasks: dict[str, list[Clip]], folder: Path) -> Path:
    """All clips but those of the test fold, each file once."""
    clips = {clip.path.resolve(): clip for task in tasks.values() for clip in task if clip.split != TEST_FOLD}
    path = folder / "pretraining.csv"
    write_manifest(path, [Clip(str(file), file, "", clip.split, clip.group) for file, clip in clips.items()])
    return path


def pretrain(stem: str, manifest: Path, steps: int, seed: int, folder: Path, batch_size: int = 32) -> Path:
    """The checkpoint of one stem's run, which is resumed if it was cut short."""
    from aape_ssl.cli import main as aape_ssl

    out = folder / f"{stem.replace('+', '-')}-{steps}-seed{seed}"
    done = out / "last.ckpt"
    if done.exists() and torch.load(done, weights_only=True, mmap=True)["global_step"] >= steps:
        return done
    arguments = {
        "config": PRESET,
        "model.stem": stem,
        "model.warmup_steps": min(100, max(1, steps // 10)),
        "data.data": manifest,
        "data.frames": FRAMES,
        "data.batch_size": batch_size,
        "data.seed": seed,
        "seed_everything": seed,
        "trainer.max_steps": steps,
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
        "out": out,
        "resume": "true",
    }
    status = aape_ssl(["pretrain", *(f"--{name}={value}" for name, value in arguments.items())])
    if status:
        raise RuntimeError(f"pre-training with the stem {stem} ended with status {status}")
    return done


def random_weights(stem: str, seed: int) -> AudioEncoder:
    """An untrained encoder of the preset's sizes."""
    options: dict[str, Any] = yaml.safe_load(PRESET.read_text(encoding="utf-8"))["model"]
    torch.manual_seed(seed)
    return AudioEncoder(options["size"], stem, frames=FRAMES).eval()  # type: ignore[arg-type]  # one of STEMS


def compare(tasks: dict[str, list[Clip]], steps: int, seeds: Sequence[int], folder: Path) -> Iterator[probe.Score]:
    """Scores of every encoder on every task, as they come; names begin with the task's."""
    from aape_ssl.audio import FRONT_ENDS

    manifest = pretraining_manifest(tasks, folder)
    for task, clips in tasks.items():
        found = embedding.statistics(clips, FRONT_ENDS["audioset128"])
        yield from probe.evaluate(f"{task}: statistics", found, clips, ("logistic",), test=[TEST_FOLD])
    for seed in seeds:
        for stem in STEMS:
            started = time.monotonic()
            checkpoint = pretrain(stem, manifest, steps, seed, folder)
            say(f"{stem}, seed {seed}: {steps} steps in {time.monotonic() - started:.0f} s")
            for kind, path in (("pre-trained", checkpoint), ("random", None)):
                encoder = random_weights(stem, seed) if path is None else load(path)
                for task, clips in tasks.items():
                    name = f"{task}: {stem}, {kind}, seed {seed}"
                    yield from probe.evaluate(name, embed_clips(encoder, clips, FRAMES), clips, test=[TEST_FOLD])


def row(score: probe.Score) -> str:
    """Accuracy with its 95 % interval over groups."""
    low, high = probe.interval(score.correct, score.groups)
    return f"{score.name:<44} {score.method:<9} {score.size:>5} {score.accuracy:7.1%}  {low:6.1%} – {high:6.1%}"


def differences(scores: Sequence[probe.Score]) -> Iterator[str]:
    """AaPE against each other stem, pre-trained alike, clip by clip; the mean over seeds."""
    by_name = {(score.name, score.method): score for score in scores}
    for task in TASKS:
        for other in STEMS[1:]:
            for method in ("linear", "knn"):
                pairs = [
                    (score, by_name[theirs])
                    for (name, how), score in by_name.items()
                    if how == method
                    and name.startswith(f"{task}: {STEMS[0]}, pre-trained")
                    and (theirs := (name.replace(f": {STEMS[0]},", f": {other},"), method)) in by_name
                ]
                if pairs:
                    gain = np.mean([ours.correct - theirs.correct for ours, theirs in pairs], axis=0)
                    low, high = probe.interval(gain, pairs[0][0].groups)
                    what = f"{task}: {STEMS[0]} − {other}"
                    yield f"{what:<44} {method:<9} {'':>5} {gain.mean():+7.1%}  {low:+6.1%} – {high:+6.1%}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; returns 0, or 1 with one line where something it needs cannot be had."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evidence.compare", description="Three stems side by side."
    )
    parser.add_argument("--steps", type=int, default=600, help="of pre-training (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of pre-training (default: 0 1)")
    parser.add_argument(
        "--cache", type=Path, default=cache_folder(), help="packages, clips, runs (default: %(default)s)"
    )
    parser.add_argument("--small", action="store_true", help="400 clips a task, for a trial")
    args = parser.parse_args(argv)
    started = time.monotonic()
    try:
        tasks = {}
        for name in TASKS:
            tasks[name] = read_manifest(make(name, args.cache, 0, 400 if args.small else None))
            say(f"{name}: {len(tasks[name])} clips, {len({clip.label for clip in tasks[name]})} classes")
        folder = args.cache / ("compare-small" if args.small else "compare")
        folder.mkdir(parents=True, exist_ok=True)
        scores = []
        for score in compare(tasks, args.steps, args.seeds, folder):
            scores.append(score)
            say(row(score))
    except (CorpusError, SoundFontError, AudioError, RuntimeError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 1
    say("\nAaPE against the others, pre-trained alike (95 % intervals over groups of clips):")
    for line in differences(scores):
        say(line)
    say(f"\n{(time.monotonic() - started) / 60:.0f} minutes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
