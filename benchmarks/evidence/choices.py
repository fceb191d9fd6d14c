"""What the study says of sizes and of adapting, and which sizes the rule picks.

The rule, set before the study was run: of adaptive stems on patches of 16 × 16, the one of the fewest multiply-adds
(`configurations.multiply_adds` at D = 384) that is within one point of the best both frozen (logistic regression, mean
over tasks) and fine-tuned (mean over tasks); where no fine-tuning was run, frozen alone, which the report says.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .configurations import Configuration, adapting, multiply_adds, sizes
from .tables import Board, Column, difference, markdown, percent

__all__ = ["choice", "study"]

WITHIN = 0.01
DIM = 384  # of ViT-S
KINDS = {
    "frozen, logistic regression": ("frozen", "linear"),
    "kNN": ("frozen", "knn"),
    "fine-tuned": ("tuned", "tuned"),
}


def _columns(board: Board, what: str, method: str) -> list[Column]:
    every = [(what, method, task) for task in board.tasks]
    return [column for column in every if any(column in cells for cells in board.cells.values())]


def choice(board: Board, configurations: Sequence[Configuration]) -> tuple[Configuration | None, list[str]]:
    """What the rule picks, and by what it was judged; None where there is nothing to judge by."""
    candidates = [each for each in configurations if each.stem == "aape" and each.patch == (16, 16)]
    within = list(candidates)
    judged = []
    for name, (what, method) in KINDS.items():
        columns = _columns(board, what, method)
        if name == "kNN" or not columns:
            continue
        means = {each.name: board.mean((each.name, "pretrained"), columns) for each in candidates}
        known = [found.mean for found in means.values() if found is not None]
        if known:
            judged.append(name)
            within = [each for each in within if (m := means[each.name]) is not None and m.mean >= max(known) - WITHIN]
    picked = min(within, key=lambda each: multiply_adds(each, DIM), default=None)
    return (picked if judged else None), judged


def study(board: Board) -> Iterator[str]:
    """Tables of sizes, of adaptive against fixed filters, and of ways to adapt; then the choice."""
    grid = sizes()
    for patch in ((16, 16), (16, 32)):
        rows = [each for each in grid if each.patch == patch]
        yield _accuracies(board, f"Patches of {patch[0]} × {patch[1]}: accuracy in % on fold 1", rows)
    gains = []
    for patch in ((16, 16), (16, 32)):
        fixed = {each.options["num_states"]: each for each in grid if each.patch == patch and each.stem != "aape"}
        for each in grid:
            if each.patch == patch and each.stem == "aape":
                other = fixed[each.options["num_states"]]
                gains.append((f"{each.name} − {other.name}", _differences(board, each.name, other.name)))
    yield markdown("Adaptive against fixed filters, paired by seed and clip", list(KINDS), gains)
    ways = adapting()
    rows, gains = [], []
    for each in ways:
        base = f"s{each.options['num_states']}-h{each.options['encoder_dim']}{'-p32' if each.patch[1] == 32 else ''}"
        rows.append(each)
        gains.append((f"{each.name} − {base}", _differences(board, each.name, base)))
    yield _accuracies(board, "Ways to adapt: accuracy in % on fold 1", rows)
    yield markdown("Ways to adapt against the stem's own", list(KINDS), gains)
    picked, judged = choice(board, grid)
    if picked is not None:
        options = ", ".join(f"{name} = {value}" for name, value in picked.options.items())
        yield f"The rule (within one point of the best, {' and '.join(judged)}; fewest multiply-adds) picks {options}."


def _accuracies(board: Board, title: str, configurations: Sequence[Configuration]) -> str:
    tasks = _columns(board, "frozen", "linear")
    heads = ["multiply-adds, × convolution", *KINDS, *(f"frozen: {task}" for *_, task in tasks), "seeds"]
    rows = []
    for each in configurations:
        row = (each.name, "pretrained")
        if row not in board.cells:
            continue
        means = [board.mean(row, _columns(board, *kind)) for kind in KINDS.values()]
        seeds = str(max((found.seeds for found in means if found), default=0))
        cells = [f"{multiply_adds(each, DIM):.2f}", *map(percent, means)]
        rows.append((each.name, [*cells, *(percent(board.mean(row, [column])) for column in tasks), seeds]))
    return markdown(title, heads, rows)


def _differences(board: Board, name: str, other: str) -> list[str]:
    rows = (name, "pretrained"), (other, "pretrained")
    return [difference(board.difference(*rows, _columns(board, *kind))) for kind in KINDS.values()]
