"""What is measured of one configuration and one seed, piece by piece.

Settled before anything was looked at:

- Frozen: the product's probes (`evaluation.probe`), "linear", a logistic regression whose C validation chooses, and
  "knn", on the teacher of every configuration and seed, and, of the first seed, on its weights before pre-training.
- Fine-tuned, the whole encoder, by `training.finetuning`: trill rate, which the method is about, and Mandarin initials.
  Initials and not drums: recorded speech, whose consonants are fast modulation; 76 syllables of the tested fold to draw
  intervals from, where drums have 13 kits in all; one round where drums need five; and 8 MB to fetch. In batches of 16:
  of 64, taken first, eight epochs of the small sets were too few steps, seen on the fold that choices are made on.
- Shifts by 0 to 15 frames against the patch grid, on trill rate and instrument family: one probe fitted on clips as
  they are, another on clips each shifted at random, both tested on all shifts.
- The statistics of log-mels, without any encoder, by the same logistic regression.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from aape_ssl.evaluation import embedding, probe
from aape_ssl.saved.pretrained import AudioEncoder, load
from aape_ssl.sound.audio import AUDIOSET128

from .configurations import Configuration
from .learning import Recipe, exported, finetune, pretrain, untrained
from .learning import dim as width
from .material import Material
from .results import Results, identity
from .shifts import right_by_shift
from .spectrograms import features

__all__ = ["SHIFTED", "TUNED", "Job", "Worker"]

VERSION = 1  # to be raised whenever code here or in `learning` changes what a piece comes out as
TUNED = ("trill", "initials")
SHIFTED = ("trill", "family")
SAID = ("seconds", "steps_per_second", "train/loss", "tokens/student_rankme", "linear", "knn", "tuned")


@dataclass(frozen=True)
class Job:
    """All pieces of one row.

    Attributes:
        kind: "statistics" of log-mels, an "untrained" encoder, or a "pretrained" one.
        configuration, seed: of the encoder.
    """

    kind: Literal["statistics", "untrained", "pretrained"]
    configuration: Configuration | None = None
    seed: int = 0

    def __str__(self) -> str:
        own = f"{self.configuration.name}, seed {self.seed}, " if self.configuration else ""
        return f"{own}{self.kind}"


@dataclass(frozen=True)
class Worker:
    """Does jobs, leaving out what `results` has.

    Attributes:
        material: clips and log-mels.
        recipe: of pre-training and fine-tuning.
        results: where pieces go.
        encoders: folder for pre-trained encoders, which fine-tuning and later calls start from.
        experiment: its name, for reports.
        tuned, shifted: tasks to fine-tune on, and to shift; those of them that the material has.
        accelerator: "cpu" or "cuda".
        until: when to stop, in seconds since the epoch.
        environment: what is noted with each piece: machine, versions, threads.
    """

    material: Material
    recipe: Recipe
    results: Results
    encoders: Path
    experiment: str
    tuned: tuple[str, ...]
    shifted: tuple[str, ...]
    accelerator: str
    until: float
    environment: Mapping[str, Any]

    def key(self, job: Job, what: str, task: str = "") -> dict[str, Any]:
        """All that a piece depends on."""
        key: dict[str, Any] = {"version": VERSION, "experiment": self.experiment, "what": what, "kind": job.kind}
        if task:
            key["set"] = self.material.sets[task].key
        if what in ("frozen", "shifts"):
            key["probe"] = [*probe.STRENGTHS, probe.TOLERANCE]
        if job.configuration is not None:
            key |= {"configuration": job.configuration.key(width()), "seed": job.seed}
            if job.kind == "pretrained":
                key |= {"recipe": self.recipe.key(what == "tuned"), "pretraining": self.material.key}
            else:
                key |= {"size": width(), "frames": self.recipe.frames}
        # as JSON reads it back
        return key

    def wanted(self, job: Job) -> list[tuple[str, str]]:
        """What and task of each of a job's pieces."""
        tasks = list(self.material.sets)
        found = [("frozen", task) for task in tasks]
        if job.kind == "pretrained":
            found = [("pretraining", ""), *found]
            found += [("shifts", task) for task in self.shifted if task in tasks]
            found += [("tuned", task) for task in self.tuned if task in tasks]
        return found

    def missing(self, job: Job, done: set[str]) -> list[tuple[str, str]]:
        """Those of which `done` lacks the id."""
        return [(what, task) for what, task in self.wanted(job) if identity(self.key(job, what, task)) not in done]

    def do(self, job: Job) -> Iterator[str]:
        """Do what is missing; a line a piece, as they come. Errors: `OutOfTimeError`."""
        missing = self.missing(job, {record["id"] for record in self.results.records()})
        if not missing:
            return
        encoder = None
        folder = self.encoders / f"{job}-{identity(self.key(job, 'pretraining'))}".replace(", ", "-").replace(" ", "")
        if job.kind == "untrained":
            assert job.configuration is not None
            encoder = exported(untrained(job.configuration, job.seed, self.recipe), self.recipe)
        elif job.kind == "pretrained":
            if ("pretraining", "") in missing or not folder.exists():
                found = self._pretrain(job, folder)
                if ("pretraining", "") in missing:
                    yield self._add(job, "pretraining", "", found)
            encoder = load(folder)
        device = "cuda" if self.accelerator == "cuda" else "cpu"
        if encoder is not None:
            encoder = encoder.to(device)
        fitted: dict[str, list[probe.LinearProbe]] = {}
        for what, task in missing:
            if what == "pretraining":
                continue
            started = time.monotonic()
            if what == "frozen":
                found = self._frozen(task, encoder, device, fitted)
            elif what == "shifts":
                assert encoder is not None
                found = self._shifts(task, encoder, device, fitted.get(task))
            else:
                found = self._tuned(task, folder, job.seed)
            yield self._add(job, what, task, {"seconds": round(time.monotonic() - started, 1), **found})

    def _add(self, job: Job, what: str, task: str, found: Mapping[str, Any]) -> str:
        row = job.configuration.name if job.configuration else "log-mel statistics"
        about = {"row": row, "seed": job.seed, "kind": job.kind, "what": what, "task": task}
        if task:
            found = {**found, "set": self.material.sets[task].description()}
        self.results.add(self.key(job, what, task), {**about, **found, "environment": dict(self.environment)})
        return f"{job}: {what} {task}".rstrip() + "".join(
            f", {name} {found[name]:.3g}" for name in SAID if name in found
        )

    def _pretrain(self, job: Job, folder: Path) -> dict[str, Any]:
        assert job.configuration is not None
        folder.parent.mkdir(parents=True, exist_ok=True)
        of = {"clips": len(self.material.pretraining), "hours": round(self.material.hours, 2)}
        return of | pretrain(
            job.configuration,
            job.seed,
            self.recipe,
            self.material.pretraining,
            self.material.kept,
            folder,
            self.accelerator,
            self.until,
        )

    def _frozen(
        self, task: str, encoder: AudioEncoder | None, device: str, fitted: dict[str, list[probe.LinearProbe]]
    ) -> dict[str, Any]:
        of, kept = self.material.sets[task], self.material.of(task)
        if encoder is None:
            x = embedding.statistics(of.clips, AUDIOSET128)
        else:
            x = features(encoder.tokens, kept, 0, kept.rows(of.clips), device=device)
        y = of.classes
        # as `probe.evaluate`, but that the probes are kept for the shifts
        fitted[task] = [probe.fit_logistic((x[train], y[train]), (x[valid], y[valid])) for train, valid, _ in of.rounds]
        right = {
            "linear": [fit.predict(x[test]) == y[test] for fit, (*_, test) in zip(fitted[task], of.rounds, strict=True)]
        }
        if encoder is not None:
            right["knn"] = [probe.knn((x[train], y[train]), x[test]) == y[test] for train, _, test in of.rounds]
        correct = {method: np.concatenate(parts) for method, parts in right.items()}
        return {
            "hits": {method: of.hits(each.tolist()) for method, each in correct.items()},
            "features": x.shape[1],
            "strengths": [fit.strength for fit in fitted[task]],
            **{method: float(each.mean()) for method, each in correct.items()},
        }

    def _shifts(
        self, task: str, encoder: AudioEncoder, device: str, fitted: list[probe.LinearProbe] | None
    ) -> dict[str, Any]:
        of, kept = self.material.sets[task], self.material.of(task)
        right = right_by_shift(encoder.tokens, kept, of.clips, of.tested, device=device, unshifted=fitted)
        return {"hits": {fit: [of.hits(each.tolist()) for each in shifts] for fit, shifts in right.items()}}

    def _tuned(self, task: str, folder: Path, seed: int) -> dict[str, Any]:
        of = self.material.sets[task]
        correct: list[bool] = []
        kept: list[tuple[float, int]] = []
        for fold in of.tested:
            tuned = finetune(
                folder, of.manifest, fold, seed, self.recipe, self.material.of(task), self.accelerator, self.until
            )
            correct += tuned.correct
            kept.append((tuned.valid, tuned.epoch))
        return {"hits": {"tuned": of.hits(correct)}, "kept": kept, "tuned": float(np.mean(correct))}


def threads_of(jobs: int, cores: int) -> int:
    """Threads of each of `jobs` processes."""
    return max(1, cores // jobs)


def environment(threads: int, accelerator: str) -> dict[str, Any]:
    """What a piece's last bits depend on beside its key."""
    from aape_kernels.doctor import cpu_model

    device = torch.cuda.get_device_name() if accelerator == "cuda" else cpu_model()
    return {"device": device, "torch": torch.__version__, "threads": threads, "accelerator": accelerator}
