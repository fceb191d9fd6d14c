"""Which sizes, and whether adapting pays: states, hidden units, adaptive and fixed filters, short and long patches.

    python -m benchmarks.evidence.study --accelerator cuda --jobs 8   all of it: much for a CPU
    python -m benchmarks.evidence.study --grid sizes --seeds 0        the sizes, with one seed
    python -m benchmarks.evidence.study --only s16-h64 s16-fixed      some rows
    python -m benchmarks.evidence.study --small --steps 10 --only s8-h16 s8-fixed

What it is tested on is fold 1; fold 0, which `compare` tests on, is in none of it, so that a choice made here is not
made by what it will be judged by (`material.CHOICES`). Drums, all of whose folds are held out there, are left out.
Otherwise all is as in `compare`. `choices` has the rule that picks the sizes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from . import report
from .configurations import adapting, sizes
from .material import CHOICES
from .runner import chosen, execute, jobs_of, parser, prepare, run, say

__all__ = ["main"]

STEPS = 600
PROG = "python -m benchmarks.evidence.study"
GRIDS = {"sizes": sizes, "adapting": adapting}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study and print its report; returns 0, or 1 with a line where something is missing."""
    tasks = ("trill", "family", "initials", "tones")
    options = parser(PROG, "Sizes and adapting.", STEPS, (0, 1, 2), tasks)
    options.add_argument("--grid", nargs="+", choices=list(GRIDS), default=list(GRIDS), help="(default: %(default)s)")
    options.add_argument("--only", nargs="+", metavar="NAME", help="these rows alone")
    options.set_defaults(shift=[])
    args = options.parse_args(argv)

    def go() -> int:
        every = {each.name: each for grid in args.grid for each in GRIDS[grid]()}
        configurations = list(chosen(args.only or list(every), every))
        worker = prepare(args, CHOICES)
        unfinished = execute(worker, jobs_of(configurations, args.seeds, untrained=False), args.jobs)
        say("")
        report.main([str(worker.results.path), "--steps", str(args.steps)])
        return unfinished

    return run(go, "study")


if __name__ == "__main__":
    sys.exit(main())
