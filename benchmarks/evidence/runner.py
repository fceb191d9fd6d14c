"""Jobs in several processes, until all are done or the time is over; what `compare` and `study` have in common."""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from aape_ssl.evaluation.embedding import cache_folder
from aape_ssl.libraries import mend_torchvision
from aape_ssl.sound.audio import AudioError

mend_torchvision()  # lightning imports torchvision where it is installed

from .configurations import Configuration  # noqa: E402
from .corpora import CorpusError  # noqa: E402
from .learning import OutOfTimeError, Recipe  # noqa: E402
from .material import Material, Protocol  # noqa: E402
from .pieces import SHIFTED, TUNED, Job, Worker, environment, threads_of  # noqa: E402
from .results import Results  # noqa: E402
from .soundfont import SoundFontError  # noqa: E402
from .tasks import TASKS  # noqa: E402

__all__ = ["execute", "jobs_of", "parser", "prepare", "say"]

_worker: Worker | None = None  # of this process


def say(text: str) -> None:
    """At once, also into a pipe."""
    print(text, flush=True)


def parser(prog: str, about: str, steps: int, seeds: Sequence[int], tasks: Sequence[str]) -> argparse.ArgumentParser:
    """The options of all experiments."""
    found = argparse.ArgumentParser(prog=prog, description=about)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found.add_argument("--steps", type=int, default=steps, help="of pre-training (default: %(default)s)")
    found.add_argument("--epochs", type=int, default=8, help="of fine-tuning, at most (default: %(default)s)")
    found.add_argument(
        "--seeds", type=int, nargs="+", default=list(seeds), help="of pre-training (default: %(default)s)"
    )
    found.add_argument(
        "--tasks",
        nargs="+",
        default=list(tasks),
        choices=list(TASKS),
        metavar="TASK",
        help=f"of {', '.join(TASKS)} (default: {' '.join(tasks)})",
    )
    found.add_argument(
        "--tune", nargs="*", default=list(TUNED), metavar="TASK", help="tasks to fine-tune on (default: %(default)s)"
    )
    found.add_argument(
        "--shift", nargs="*", default=list(SHIFTED), metavar="TASK", help="tasks to shift (default: %(default)s)"
    )
    found.add_argument(
        "--jobs", type=int, default=cores, help="processes, which share the cores (default: %(default)s)"
    )
    found.add_argument("--accelerator", choices=["cpu", "cuda"], default="cpu", help="(default: %(default)s)")
    found.add_argument("--minutes", type=float, help="stop then; what is finished is kept (default: no limit)")
    found.add_argument("--small", action="store_true", help="400 clips a task, for a trial")
    found.add_argument(
        "--pool",
        action="store_true",
        help="pre-train on sound that no task has too, 8.8 h in all; results of their own",
    )
    found.add_argument(
        "--cache", type=Path, default=cache_folder(), help="packages, clips, encoders (default: %(default)s)"
    )
    found.add_argument(
        "--out",
        type=Path,
        help="results, a JSON object a line; pieces that it has are not done again (default: in the cache)",
    )
    found.set_defaults(cores=cores)
    return found


def prepare(args: argparse.Namespace, protocol: Protocol) -> Worker:
    """What does the jobs that `args` describe: tasks and log-mels are made here, once."""
    until = time.time() + 60 * args.minutes if args.minutes else float("inf")
    material = Material.prepare(protocol, args.tasks, args.cache, args.small, args.pool)
    for name, each in material.sets.items():
        tested = sum(len(test) for *_, test in each.rounds)
        say(f"{name}: {len(each.clips)} clips, {tested} to test on, in {len(set(each.groups))} groups")
    say(f"{len(material.pretraining)} clips to pre-train on, {material.hours:.1f} h")
    name = f"{protocol.name}{'-pool' if args.pool else ''}{'-small' if args.small else ''}"
    results = Results(args.out or args.cache / "evidence" / f"{name}.jsonl")
    recipe = Recipe(args.steps, epochs=args.epochs)
    threads = threads_of(args.jobs, args.cores)
    return Worker(
        material,
        recipe,
        results,
        args.cache / "evidence" / "encoders",
        name,
        tuple(args.tune),
        tuple(args.shift),
        args.accelerator,
        until,
        environment(threads, args.accelerator),
    )


def jobs_of(configurations: Sequence[Configuration], seeds: Sequence[int], untrained: bool = True) -> list[Job]:
    """Seed by seed, so that what a time limit leaves is whole for some seeds; what needs no training first.

    Random weights are those of the first seed.
    """
    found = [Job("statistics")]
    found += [Job("untrained", each, seed) for seed in seeds[:1] for each in configurations if untrained]
    return found + [Job("pretrained", each, seed) for seed in seeds for each in configurations]


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _start(worker: Worker, log_mels: str) -> None:
    global _worker
    # one that was killed cannot tell its processes to end
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # of each run Lightning says what devices there are
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    torch.set_num_threads(worker.environment["threads"])
    warnings.filterwarnings(
        "ignore", ".*(LeafSpec.*is deprecated|does not have many workers|number of training batches)"
    )
    kept = replace(worker.material.kept, log_mels=np.load(log_mels, mmap_mode="r"))
    _worker = replace(worker, material=replace(worker.material, kept=kept))


def _do(job: Job) -> list[str]:
    assert _worker is not None
    if time.time() > _worker.until:
        raise OutOfTimeError
    lines = []
    for line in _worker.do(job):
        say(line)
        lines.append(line)
    return lines


def execute(worker: Worker, jobs: Sequence[Job], processes: int) -> int:
    """Do the jobs; returns how many were not finished, each said in one line.

    A job that fails leaves the others alone.
    """
    done = {record["id"] for record in worker.results.records()}
    waiting = [job for job in jobs if worker.missing(job, done)]
    say(f"{len(jobs) - len(waiting)} of {len(jobs)} rows are there already")
    # the memory map, not what it holds, goes to the processes
    kept = worker.material.kept
    sent = replace(worker, material=replace(worker.material, kept=replace(kept, log_mels=np.empty(0, np.float32))))
    log_mels = str(getattr(kept.log_mels, "filename", ""))
    late, failed = 0, 0
    # threads of a forked process may wait for ever for those of its parent
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max(1, processes), context, _start, (sent, log_mels)) as pool:
        futures: dict[Future[list[str]], Job] = {pool.submit(_do, job): job for job in waiting}
        started, left = time.monotonic(), set(futures)
        while left:
            ended, left = wait(left, return_when=FIRST_COMPLETED)
            for future in ended:
                error = future.exception()
                if isinstance(error, OutOfTimeError):
                    late += 1
                elif error is not None:
                    failed += 1
                    say(f"{futures[future]}: failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
            minutes = (time.monotonic() - started) / 60
            say(f"{len(futures) - len(left)} of {len(futures)} rows after {minutes:.1f} minutes")
    if late:
        say(f"{late} rows are not finished, as the time was over; the same command goes on")
    return late + failed


def run(run_it: Callable[[], int], prog: str) -> int:
    """What a command returns: 0, or 1 with one line where something it needs cannot be had or a row is missing."""
    try:
        return min(run_it(), 1)
    except (CorpusError, SoundFontError, AudioError, OSError, ValueError) as error:
        print(f"{prog}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


def chosen(names: Sequence[str], among: dict[str, Configuration]) -> Iterator[Configuration]:
    """Configurations by name. Errors: `ValueError`."""
    for name in names:
        if name not in among:
            raise ValueError(f"stems: expected some of {', '.join(among)}, got {name!r}")
        yield among[name]
