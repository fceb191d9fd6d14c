"""Records of finished pieces as tables: which belong together, means, intervals, differences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .intervals import Estimate, estimate, mean_over_tasks
from .results import Record, identity

__all__ = ["Board", "Column", "difference", "markdown", "percent", "select"]

Floats = NDArray[np.float64]


def select(records: Iterable[Record], steps: int | None = None) -> tuple[list[Record], int]:
    """The records that compare, and how many do not: they were made with other steps, stems, clips or folds.

    Of each row's configuration, each task's clips and the recipe the last that was recorded is kept, or the last of so
    many steps of pre-training.
    """
    found = list(records)
    if steps is not None:
        found = [record for record in found if record["key"].get("recipe", {"steps": steps})["steps"] == steps]
    last: dict[str, str] = {}

    def parts(record: Record) -> Iterable[tuple[str, str]]:
        key = record["key"]
        yield "version", str(key["version"])
        if "configuration" in key:
            yield f"configuration {record['row']}", identity(key["configuration"])
        if "set" in key:
            yield f"set {record['task']}", identity(key["set"])
        if "recipe" in key:
            recipe = {
                name: value for name, value in key["recipe"].items() if name not in ("epochs", "tuning_batch_size")
            }
            yield "recipe", identity(recipe)
            yield "pretraining", identity(key["pretraining"])
            if record["what"] == "tuned":
                yield "tuning", identity(key["recipe"])

    for record in found:
        last |= dict(parts(record))
    kept = [record for record in found if all(last[name] == value for name, value in parts(record))]
    return kept, len(found) - len(kept)


Column = tuple[str, str, str]
"""What, method and task."""


@dataclass(frozen=True)
class Cell:
    """Of one row in one column: hits (seeds, groups), and which seeds."""

    seeds: tuple[int, ...]
    hits: Floats


class Board:
    """Accuracies of rows and columns.

    A row is (name, kind); a column (what, method, task), shifts being (f"shift {s}", fitted, task).

    Attributes:
        cells: by row and column.
        counts: by task, clips of each group.
        rows: in the order in which they came.
        tasks: likewise.
    """

    def __init__(self, records: Iterable[Record]) -> None:
        gathered: dict[tuple[str, str], dict[Column, dict[int, list[float]]]] = {}
        self.counts: dict[str, Floats] = {}
        for record in records:
            if "hits" not in record:
                continue
            task, row = record["task"], (record["row"], record["kind"])
            self.counts[task] = np.array(record["set"]["counts"], dtype=float)
            for method, hits in record["hits"].items():
                shifted = record["what"] == "shifts"
                for shift, each in enumerate(hits if shifted else [hits]):
                    column = (f"shift {shift}" if shifted else record["what"], method, task)
                    gathered.setdefault(row, {}).setdefault(column, {})[record["seed"]] = each
        self.cells = {
            row: {
                column: Cell(tuple(sorted(of)), np.array([of[seed] for seed in sorted(of)]))
                for column, of in columns.items()
            }
            for row, columns in gathered.items()
        }
        self.rows, self.tasks = list(gathered), list(self.counts)

    def has(self, row: tuple[str, str], columns: Sequence[Column]) -> bool:
        """Whether a row has all of these columns."""
        return all(column in self.cells.get(row, {}) for column in columns)

    def mean(self, row: tuple[str, str], columns: Sequence[Column]) -> Estimate | None:
        """Mean over columns, over the seeds that all of them have; None where one is missing."""
        if not columns or not self.has(row, columns):
            return None
        cells = [self.cells[row][column] for column in columns]
        return self._estimate([_of_seeds(cell, _common(cells)) for cell in cells], columns)

    def difference(self, row: tuple[str, str], other: tuple[str, str], columns: Sequence[Column]) -> Estimate | None:
        """How much better a row is than another: paired seed by seed, clip by clip; None where one is missing."""
        if not columns or not (self.has(row, columns) and self.has(other, columns)):
            return None
        cells = [self.cells[each][column] for each in (row, other) for column in columns]
        seeds = _common(cells)
        pairs = zip(cells[: len(columns)], cells[len(columns) :], strict=True)
        return self._estimate([_of_seeds(ours, seeds) - _of_seeds(theirs, seeds) for ours, theirs in pairs], columns)

    def _estimate(self, hits: list[Floats], columns: Sequence[Column]) -> Estimate | None:
        if not len(hits[0]):
            return None
        counts = [self.counts[task] for *_, task in columns]
        if len({task for *_, task in columns}) == 1:
            # of one task's clips, as in a mean over shifts: groups are drawn once
            return estimate(np.mean(hits, 0), counts[0])
        return mean_over_tasks(hits, counts)


def _common(cells: Sequence[Cell]) -> tuple[int, ...]:
    return tuple(sorted(set.intersection(*(set(cell.seeds) for cell in cells))))


def _of_seeds(cell: Cell, seeds: Sequence[int]) -> Floats:
    return cell.hits[[cell.seeds.index(seed) for seed in seeds]]


def percent(found: Estimate | None) -> str:
    """49.6 (46.1 to 53.0); with the number of seeds where it is one."""
    if found is None:
        return ""
    return f"{100 * found.mean:.1f} ({100 * found.low:.1f} to {100 * found.high:.1f})"


def difference(found: Estimate | None) -> str:
    """+3.1 (−0.5 to +6.7), bold where the interval excludes 0."""
    if found is None:
        return ""
    text = f"{100 * found.mean:+.1f} ({100 * found.low:+.1f} to {100 * found.high:+.1f})".replace("-", "−")
    return f"**{text}**" if found.low > 0 or found.high < 0 else text


def markdown(title: str, heads: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    """A table; rows without any cell are left out. "" without rows."""
    lines = [f"| {name} | {' | '.join(cells)} |" for name, cells in rows if any(cells)]
    if not lines:
        return ""
    return "\n".join([f"**{title}**", "", f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|", *lines])
