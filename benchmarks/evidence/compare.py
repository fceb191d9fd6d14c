"""Stems side by side: pre-trained alike on the same real sound, frozen, fine-tuned and shifted; `make ssl`.

    python -m benchmarks.evidence.compare                                  all of it, then the report
    python -m benchmarks.evidence.compare --small --steps 10 --seeds 0     a trial
    python -m benchmarks.evidence.compare --accelerator cuda --jobs 8      on a GPU
    python -m benchmarks.evidence.compare --pool --steps 5000 --seeds 0 --stems aape conv    longer, on more sound

The stems are AaPE as it comes; with responses alone, without magnitudes; with filters that no patch moves; the plain
convolution; and the convolution plus an MLP branch of AaPE's size (`configurations.COMPARED`). Equal for all: data,
order, shifts, masks, steps, initial weights but the branch's, hyper-parameters (preset `laptop`, set before anything
was seen) and feature size. What is measured, and why that, `pieces` says. Fold 0 of every task, and all of a task with
too few groups, is in no pre-training; fold 1 chooses C, and the epoch of fine-tuning; folds 2 to 4 train.

Each finished piece is kept; the same command goes on where it was stopped, and does again only what other options, or
other code that says so, would change. Pieces come out to the same bits with as many threads, which is noted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from . import report
from .configurations import COMPARED
from .material import RESULTS
from .runner import chosen, execute, jobs_of, parser, prepare, run, say
from .tasks import TASKS

__all__ = ["STEPS", "main"]

STEPS = 500  # so that `make ssl` is done in an hour on two cores
PROG = "python -m benchmarks.evidence.compare"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison and print its report; returns 0, or 1 with a line where something is missing."""
    options = parser(PROG, "Stems side by side.", STEPS, (0, 1, 2), list(TASKS))
    options.add_argument("--stems", nargs="+", default=list(COMPARED), help="(default: %(default)s)")
    args = options.parse_args(argv)

    def go() -> int:
        configurations = list(chosen(args.stems, COMPARED))
        worker = prepare(args, RESULTS)
        unfinished = execute(worker, jobs_of(configurations, args.seeds), args.jobs)
        say("")
        report.main([str(worker.results.path), "--steps", str(args.steps)])
        return unfinished

    return run(go, "compare")


if __name__ == "__main__":
    sys.exit(main())
