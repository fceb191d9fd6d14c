"""Print the runs of `pytest benchmarks --benchmark-json=…` as one table.

python -m benchmarks.table pinned.json --default-allocator default.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = ["BUSY", "main", "ratios", "render", "summary"]

Row = dict[str, Any]
USUAL = "128 × 1024, D = 768"
OPS = ("stem", "sblu")
COLUMNS = ("peer", "× Conv2d", "median ms", "p20–p80", "Conv2d ms", "× best", "peak MB", "held MB")
DEFAULT_COLUMNS = ("default × Conv2d",)
LEGEND = (
    "Conv2d ms: the Conv2d stem run just before each round, same batch, sizes and direction; × Conv2d: median of the "
    "ratios\nto it. × best: that, over the best such ratio among the peers that are not this package's. peak: "
    "most memory\nallocated in a call, results included. held: kept for backward beyond inputs and weights. "
    "default: the ratio\nunder the default allocator. MB = 10⁶ bytes."
)

BUSY = 0.3  # processors in use at the start, above which figures are not to be trusted
PLAIN = ("Conv2d", "rearrange + Linear", "Conv2d + MLP", "products alone", "AaPE, reference", "AaPE, torch.compile")

STEP_COLUMNS = ("stem", "median ms", "p20–p80", "samples/s", "× conv")
LOADER_COLUMNS = ("clips", "workers", "samples/s", "p20–p80", "training samples/s", "× training")
STEP_LEGEND = "× conv: samples/s over the plain stem's in the same round, median over rounds; above 1 is faster."


def _rows(run: dict[str, Any]) -> list[Row]:
    """The rows this suite has written, in the order they ran."""
    return [bench["extra_info"] for bench in run["benchmarks"] if "op" in bench["extra_info"]]


def _case(row: Row) -> tuple[str, str, int, str | None]:
    return row["op"], row["direction"], row["batch"], row.get("sizes")


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3f}" if seconds < 1e-3 else f"{1e3 * seconds:.2f}"


def _mb(count: int | None) -> str:
    return "–" if count is None else f"{count / 1e6:.1f}"


def _best(rows: Iterable[Row]) -> float | None:
    """The ratio to Conv2d of the fastest peer that is not this package's."""
    return min((row["ratio"]["median"] for row in rows if row["baseline"]), default=None)


def _cells(row: Row, best: float | None, default: Row | None) -> list[str]:
    seconds, ratio = row["seconds"], row["ratio"]["median"]
    cells = [
        row["peer"],
        f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.3f}",
        _ms(seconds["median"]),
        f"{_ms(seconds['p20'])}–{_ms(seconds['p80'])}",
        _ms(row["conv2d_seconds"]["median"]),
        "–" if best is None else f"{ratio / best:.2f}",
        _mb(row["peak_bytes"]),
        _mb(row["held_bytes"]),
    ]
    if default is not None:
        cells.append(f"{default['ratio']['median']:.2f}")
    return cells


def _markdown(header: list[str], body: list[list[str]]) -> list[str]:
    """An aligned Markdown table: the first column to the left, numbers to the right."""
    widths = [max(len(line[i]) for line in [header, *body]) for i in range(len(header))]

    def line(cells: list[str]) -> str:
        aligned = [cells[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True)]
        return "| " + " | ".join(aligned) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2)] + ["-" * (w + 1) + ":" for w in widths[1:]]) + "|"
    return [line(header), rule, *map(line, body)]


def _verdict(ratio: float, limit: float) -> str:
    return f"at least {limit:g} is asked for" if ratio >= limit else f"UNDER the {limit:g} that is asked for"


def _training_step(row: Row) -> list[str]:
    """One model's steps by stem."""
    body, verdicts = [], []
    for step in row["rows"]:
        seconds, ratio = step["seconds"], step["ratio"]["median"]
        between = f"{_ms(seconds['p20'])}–{_ms(seconds['p80'])}"
        rate = f"{row['batch'] / seconds['median']:.1f}"
        body.append([step["stem"], _ms(seconds["median"]), between, rate, f"{ratio:.3f}"])
        if step["limit"] is not None:
            verdicts.append(f"{step['stem']}: {ratio:.3f} × the samples/s of conv; {_verdict(ratio, step['limit'])}")
    return ["", f"**pre-training step, {row['case']}**", "", *_markdown([*STEP_COLUMNS], body), "", *verdicts]


def _loaders(rows: list[Row]) -> list[str]:
    """The loader alone beside training alone."""
    body, verdicts = [], []
    for row in rows:
        per_clip, ratio = row["seconds"], row["ratio"]["median"]
        between = f"{1 / per_clip['p80']:.0f}–{1 / per_clip['p20']:.0f}"
        training = f"{1 / row['training_seconds']['median']:.1f}"
        loading = f"{1 / per_clip['median']:.0f}"
        body.append([row["clips"], str(row["workers"]), loading, between, training, f"{ratio:.2f}"])
        verdicts.append(f"{row['clips']}: {ratio:.2f} × the samples/s of training; {_verdict(ratio, row['limit'])}")
    return ["", f"**loader, {rows[0]['case']}**", "", *_markdown([*LOADER_COLUMNS], body), "", *verdicts]


def _heading(run: dict[str, Any], default: dict[str, Any] | None) -> list[str]:
    about = run["machine_info"]["run"]
    commit = run.get("commit_info") or {}
    revision = str(commit.get("id") or "unversioned")
    revision = (revision if revision == "unversioned" else revision[:10]) + (
        ", modified" if commit.get("dirty") else ""
    )
    cuda = f" (CUDA {about['cuda']})" if about["cuda"] else ""
    where = "" if about["device"] == "cpu" else f"{about['device']}; "
    allocators = about["allocator"]
    if default is not None:
        allocators += f", beside it {default['machine_info']['run']['allocator']}"
    return [
        f"{where}{about['cpu']}, {about['capability']}, {about['cores']} cores; threads: {about['threads']}; "
        f"load {about['load']} at the start; {run['datetime'][:10]}",
        f"torch {about['torch']}{cuda}, Python {about['python']}, aape_kernels {about['aape_kernels']} ({revision})",
        f"allocator: {allocators}",
    ]


def ratios(run: dict[str, Any]) -> dict[tuple[str, str], dict[str, dict[str, float]]]:
    """Of this package's compiled stems, by peer and case, then direction: time over that of the Conv2d stem."""
    found: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
    for row in _rows(run):
        if row["op"] == "stem" and row["peer"] not in PLAIN:
            case = f"batch {row['batch']}, {row.get('sizes') or USUAL}"
            found.setdefault((row["peer"], case), {})[row["direction"]] = row["ratio"]
    return found


def summary(run: dict[str, Any]) -> list[str]:
    """`ratios` as a table: a line a case, `median (p20–p80)`."""
    directions = ("forward", "forward + backward")
    body = []
    for (peer, case), cells in ratios(run).items():
        shown = [cells.get(direction) for direction in directions]
        texts = ["–" if r is None else f"{r['median']:.2f} ({r['p20']:.2f}–{r['p80']:.2f})" for r in shown]
        body.append([f"{peer}; {case}", *texts])
    return ["**× Conv2d**", "", *_markdown(["stem", *directions], body)] if body else []


def warning(run: dict[str, Any]) -> list[str]:
    """A line where something else was running."""
    load = run["machine_info"]["run"]["load"] or 0.0
    said = f"THE MACHINE WAS NOT IDLE (load {load:.1f}): rows may be many times too slow, ratios included"
    return [said] if load > BUSY else []


def render(run: dict[str, Any], default: dict[str, Any] | None = None) -> str:
    """The table of one run, with the stems of a run under the default allocator beside it if there is one.

    Args:
        run, default: the JSON of `pytest benchmarks --benchmark-json`, parsed.

    Errors: `ValueError` for a file that this suite has not written.
    """
    if "run" not in run.get("machine_info", {}):
        raise ValueError("expected the JSON of `pytest benchmarks --benchmark-json=FILE`")
    rows = _rows(run)
    beside = {(*_case(row), row["peer"]): row for row in _rows(default) if row["op"] in OPS} if default else {}
    lines = [*_heading(run, default), *warning(run)]
    if ratios := summary(run):
        lines += ["", *ratios]
    for case in dict.fromkeys(_case(row) for row in rows if row["op"] in OPS):
        members = [row for row in rows if row["op"] in OPS and _case(row) == case]
        with_default = any((*case, row["peer"]) in beside for row in members)
        header = [*COLUMNS, *(DEFAULT_COLUMNS if with_default else ())]
        body = []
        for row in members:
            cells = _cells(row, _best(members), beside.get((*case, row["peer"])))
            body.append(cells + ["–"] * (len(header) - len(cells)))
        op, direction, batch, sizes = case
        lines += [
            "",
            f"**{op}, {direction}, batch {batch}{'' if sizes is None else ', ' + sizes}**",
            "",
            *_markdown(header, body),
        ]
    lines += ["", LEGEND] if any(row["op"] in OPS for row in rows) else []
    for row in rows:
        if row["op"] == "import":
            times = {name: f"{seconds:.3f}" for name, seconds in row["seconds"].items()}
            verdict = "within" if row["seconds"]["median"] <= row["limit"] else "OVER"
            lines += [
                "",
                f"`from aape_kernels import AaPE` beyond torch itself: median {times['median']} s, "
                f"p20–p80 {times['p20']}–{times['p80']}; {verdict} the limit of {row['limit']} s",
            ]
    steps = [row for row in rows if row["op"] == "training step"]
    for row in steps:
        lines += _training_step(row)
    lines += ["", STEP_LEGEND] if steps else []
    loaders = [row for row in rows if row["op"] == "loader"]
    lines += _loaders(loaders) if loaders else []
    missing = run["machine_info"]["run"]["missing_backends"].get("embed", {})
    lines += ["", *(f"not run: backend {name}: {why}" for name, why in missing.items())] if missing else []
    return "\n".join(lines)


def _load(path: Path) -> dict[str, Any]:
    run: dict[str, Any] = json.loads(path.read_text())
    return run


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="JSON written by `pytest benchmarks --benchmark-json=FILE`")
    parser.add_argument(
        "--default-allocator",
        type=Path,
        metavar="FILE",
        help="JSON of a second run, `pytest benchmarks --allocator default …`, whose figures go beside the first's",
    )
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw the summary there, too")
    options = parser.parse_args(arguments)
    try:
        second = None if options.default_allocator is None else _load(options.default_allocator)
        print(render(_load(options.run), second))
        if options.figure is not None:
            from .figure import draw

            draw(_load(options.run), options.figure)
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
