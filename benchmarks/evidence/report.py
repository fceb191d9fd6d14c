"""Tables and figures of what `compare` and `study` have found so far.

    python -m benchmarks.evidence.report                   of the cache's results
    python -m benchmarks.evidence.report a.jsonl b.jsonl   of these files
    python -m benchmarks.evidence.report --figures docs    and docs/evidence.png, docs/evidence-shifts.png
    python -m benchmarks.evidence.report --beside a.jsonl b.jsonl    of both one table, of the stems that both have

Accuracy in %, mean over seeds, with a 95 % interval over groups of clips and seeds (`intervals`); AaPE against every
other stem, whoever wins. Nothing is trained.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from aape_ssl.evaluation.embedding import cache_folder

from .configurations import COMPARED
from .results import Record, Results
from .spectrograms import SHIFTS
from .tables import Board, Column, difference, markdown, percent, select

__all__ = ["comparison", "main", "setting"]

OURS = ("aape", "pretrained")
STATISTICS = ("log-mel statistics", "statistics")
NAMES = {
    "aape": "AaPE",
    "aape-complex": "AaPE, responses alone",
    "aape-fixed": "AaPE, fixed filters",
    "conv": "convolution",
    "conv+mlp": "convolution + MLP of AaPE's size",
}
TITLES = {
    ("frozen", "linear"): "Frozen, logistic regression",
    ("frozen", "knn"): "Frozen, 10 nearest neighbours",
    ("tuned", "tuned"): "Fine-tuned",
}


def called(row: tuple[str, str]) -> str:
    """What tables call a row."""
    name = NAMES.get(row[0], row[0])
    return f"random weights, {name}" if row[1] == "untrained" else name


def ordered(board: Board) -> list[tuple[str, str]]:
    """Pre-trained rows, random weights, statistics."""
    names = [*COMPARED, *dict.fromkeys(name for name, _ in board.rows if name not in COMPARED)]
    every = [(name, kind) for kind in ("pretrained", "untrained", "statistics") for name in names]
    return [row for row in every if row in board.cells]


def columns_of(board: Board, what: str, method: str) -> list[Column]:
    """One a task that has it, in the order of the tasks."""
    every = [(what, method, task) for task in board.tasks]
    return [column for column in every if any(column in cells for cells in board.cells.values())]


def comparison(board: Board) -> Iterator[str]:
    """Tables of accuracies and of differences."""
    excluded = total = 0
    for (what, method), title in TITLES.items():
        columns = columns_of(board, what, method)
        heads = [task for *_, task in columns] + ["mean"]
        rows = [
            (called(row), [*(percent(board.mean(row, [c])) for c in columns), percent(board.mean(row, columns))])
            for row in ordered(board)
        ]
        yield markdown(f"{title}: accuracy in % (95 % interval over seeds and groups of clips)", heads, rows)
        gains = []
        for other in ordered(board):
            if other == OURS:
                continue
            found = [*(board.difference(OURS, other, [c]) for c in columns), board.difference(OURS, other, columns)]
            gains.append((f"AaPE − {called(other)}", [difference(each) for each in found]))
            if other[1] == "pretrained":
                total += sum(each is not None for each in found)
                excluded += sum(each is not None and (each.low > 0 or each.high < 0) for each in found)
        yield markdown(f"{title}: AaPE against the others, paired by seed and clip", heads, gains)
    yield from shifts(board)
    if total:
        yield (
            f"Of {total} intervals of differences between pre-trained stems above (those over shifts apart) {excluded} "
            f"exclude 0 (bold); about {total / 20:.0f} would by chance if no stems differed."
        )


def shifts(board: Board) -> Iterator[str]:
    """By task: at shift 0, over all others, at the worst; probes fitted on clips as they are, and shifted."""
    pretrained = [row for row in ordered(board) if row[1] == "pretrained"]
    for task in board.tasks:
        at = {fit: [(f"shift {s}", fit, task) for s in range(SHIFTS)] for fit in ("unshifted", "shifted")}
        heads, ours, gains = [], [], []
        wanted: list[tuple[str, list[Column]]] = [
            ("fitted unshifted: at shift 0", at["unshifted"][:1]),
            ("at 1 to 15", at["unshifted"][1:]),
            ("fitted shifted: at 0 to 15", at["shifted"]),
        ]
        heads = [head for head, _ in wanted] + ["lowest of them"]
        for row in pretrained:
            cells = [percent(board.mean(row, columns)) for _, columns in wanted]
            each = [board.mean(row, [column]) for column in at["shifted"]]
            lowest = min((found.mean for found in each if found is not None), default=None)
            ours.append((called(row), [*cells, "" if lowest is None else f"{100 * lowest:.1f}"]))
            if row != OURS:
                found = [difference(board.difference(OURS, row, columns)) for _, columns in wanted]
                gains.append((f"AaPE − {called(row)}", [*found, ""]))
        yield markdown(f"Shifted by 0 to 15 frames, frozen, logistic regression: {task}", heads, ours + gains)


def beside(runs: Sequence[tuple[str, Board]]) -> Iterator[str]:
    """Of several runs, called so, the pre-trained stems that all have: accuracies and differences, run below run."""
    boards = [board for _, board in runs]
    rows = [row for row in ordered(boards[0]) if row[1] == "pretrained" and all(row in each.cells for each in boards)]
    for (what, method), title in TITLES.items():
        columns = columns_of(boards[0], what, method)
        columns = [column for column in columns if all(each.has(row, [column]) for each in boards for row in rows)]
        every = [*([column] for column in columns), columns]  # one by one, and their mean
        found = [
            (f"{called(row)}, {name}", [percent(board.mean(row, each)) for each in every])
            for row in rows
            for name, board in runs
        ]
        found += [
            (
                f"{called(rows[0])} − {called(other)}, {name}",
                [difference(board.difference(rows[0], other, each)) for each in every],
            )
            for other in rows[1:]
            for name, board in runs
        ]
        if columns:
            yield markdown(f"{title}: accuracy in %", [*(task for *_, task in columns), "mean"], found)


def setting(records: Sequence[Record], left_out: int) -> str:
    """How it was made."""
    trained = [record for record in records if record["what"] == "pretraining"]
    lines = []
    if trained:
        recipe, rates = trained[0]["key"]["recipe"], sorted(record["steps_per_second"] for record in trained)
        lines.append(
            f"{recipe['steps']} steps of {recipe['batch_size']} clips of {recipe['frames']} frames, seeds "
            f"{', '.join(map(str, sorted({record['seed'] for record in trained})))}; "
            f"{rates[0]:.1f} to {rates[-1]:.1f} steps/s."
        )
        if "hours" in trained[0]:
            lines.append(f"Pre-trained on {trained[0]['clips']} clips, {trained[0]['hours']:.1f} h.")
    tuned = [record for record in records if record["what"] == "tuned"]
    if tuned:
        recipe = tuned[0]["key"]["recipe"]
        lines.append(f"Fine-tuning: {recipe['epochs']} epochs of batches of {recipe['tuning_batch_size']}.")
    sets = {record["task"]: record["set"] for record in records if "set" in record}
    for task, each in sets.items():
        lines.append(
            f"{task}: {each['clips']} clips, {each['classes']} classes; {sum(each['counts'])} tested, in "
            f"{len(each['counts'])} groups."
        )
    machines = {tuple(record["environment"].items()) for record in records}
    lines += sorted(", ".join(f"{name} {value}" for name, value in machine) + "." for machine in machines)
    if left_out:
        lines.append(f"{left_out} pieces of other settings are left out.")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report; returns 0, or 1 with one line where there is nothing to report."""
    from .choices import study

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evidence.report", description="Tables of what was found so far."
    )
    parser.add_argument("files", type=Path, nargs="*", help="results (default: those in the cache)")
    parser.add_argument("--steps", type=int, help="of pre-training (default: those of the last run)")
    parser.add_argument("--figures", type=Path, metavar="DIR", help="write evidence.png and evidence-shifts.png there")
    parser.add_argument("--beside", action="store_true", help="of several experiments one table, stem by stem")
    parser.add_argument("--cache", type=Path, default=cache_folder(), help="(default: %(default)s)")
    args = parser.parse_args(argv)
    files = args.files or sorted((args.cache / "evidence").glob("*.jsonl"))
    experiments: dict[str, list[Record]] = {}
    for file in files:
        for record in Results(file).records():
            experiments.setdefault(record["key"]["experiment"], []).append(record)
    if not experiments:
        print("report: there are no results yet: python -m benchmarks.evidence.compare", file=sys.stderr)
        return 1
    runs: list[tuple[str, Board]] = []
    for name, records in experiments.items():
        kept, left_out = select(records, args.steps)
        board = Board(kept)
        if args.beside:
            trained = [record for record in kept if record["what"] == "pretraining"]
            if trained:
                seeds = len({record["seed"] for record in trained})
                steps = trained[0]["key"]["recipe"]["steps"]
                runs.append((f"{steps:,} steps, {seeds} seed{'s'[: seeds > 1]}", board))
            continue
        print(f"\n## {name}\n\n{setting(kept, left_out)}\n")
        for text in (study if name.startswith("choices") else comparison)(board):
            if text:
                print(f"{text}\n")
        if args.figures and name == "results":
            from .figures import accuracies, shift_curves

            for path in (accuracies(board, args.figures), shift_curves(board, args.figures)):
                print(f"written: {path}")
    for text in beside(runs) if runs else ():
        print(f"{text}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
