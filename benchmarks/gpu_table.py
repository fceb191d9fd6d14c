"""What `benchmarks.gpu` has measured, as Markdown, and the figures it was measured for."""

from __future__ import annotations

from typing import Any

from .table import _markdown as markdown

__all__ = ["figures", "render"]

Row = dict[str, Any]
EAGER = "direct sum, real (reference)"
COMPILED = ("direct sum, torch.compile", "Horner, torch.compile")
LEGEND = (
    "ms: median of single calls by CUDA events, launched from Python, caches overwritten before each. graph ms: the\n"
    "same call replayed as a CUDA graph, so without Python and launches. × Conv2d: median of the ratios to the Conv2d\n"
    "stem run just before each round, same batch, dtype and direction; graph × Conv2d: ratio of the medians. peak:\n"
    "most memory allocated in a call. held: kept for backward beyond inputs and weights. error: the largest relative\n"
    "one of output and gradients, against float64. Steps: a backend's kernel methods one by one as graphs, caches\n"
    "overwritten before each; floor: every tensor that one is given moved once, at the bandwidth of a copy. MB = 10⁶\n"
    "bytes."
)


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _median(row: Row | None, key: str) -> float | None:
    figures = None if row is None else row.get(key)
    return None if figures is None else figures["median"]


def _find(rows: list[Row], peer: str, op: str, mode: str, direction: str) -> Row | None:
    """A row of the case that the figures are stated for, the first of its kind."""
    wanted = (peer, op, mode, direction)
    named = (row for row in rows if (row["peer"], row["op"], row["mode"], row["direction"]) == wanted)
    return next(named, None)


def figures(data: dict[str, Any]) -> list[Row]:
    """What the project aims at on an H100, and what came of it, by calls and by graphs."""
    rows, both = data["rows"], "forward + backward"
    found: list[Row] = []

    def add(name: str, aim: str, got: float | None, met: bool | None) -> None:
        found.append({"figure": name, "aim": aim, "got": got, "met": met})

    def quotient(top: float | None, bottom: float | None) -> float | None:
        return None if top is None or not bottom else top / bottom

    for backend in data["backends"]:
        for key, how in (("ms", "calls"), ("graph_ms", "graphs")):
            ours = _find(rows, f"sblu, {backend}", "sblu", "float32", "forward")
            ms = _median(ours, key)
            share = None
            if ours is not None and ms is not None and data["copy_bytes_per_second"]:
                share = ours["floor_bytes"] / (1e-3 * ms) / data["copy_bytes_per_second"]
            name = f"{backend}, {how}: sblu forward float32, bandwidth at the counted floor over that of a copy"
            add(name, "≥ 0.70", share, None if share is None else share >= 0.70)

            mine = _median(_find(rows, f"sblu, {backend}", "sblu", "float32", both), key)
            eager = quotient(_median(_find(rows, EAGER, "sblu", "float32", both), key), mine)
            name = f"{backend}, {how}: sblu forward + backward float32, times faster than the eager direct sum"
            add(name, "≥ 10", eager, None if eager is None else eager >= 10)
            compiled = [_median(_find(rows, peer, "sblu", "float32", both), key) for peer in COMPILED]
            fastest = quotient(min((ms for ms in compiled if ms is not None), default=None), mine)
            name = f"{backend}, {how}: sblu forward + backward float32, times faster than the best compiled form"
            add(name, "≥ 2", fastest, None if fastest is None else fastest >= 2)

            for direction, limit in (("forward", 1.0), (both, 1.1)):
                row = _find(rows, f"AaPE, {backend}", "stem", "bfloat16", direction)
                ratio = _median(row, "ratio") if key == "ms" else (row or {}).get("graph_ratio")
                name = f"{backend}, {how}: stem {direction} bfloat16, time over Conv2d's"
                add(name, f"≤ {limit}", ratio, None if ratio is None else ratio <= limit)
    return found


def _cells(row: Row) -> list[str]:
    if "refused" in row:
        return [row["peer"], *["–"] * 8]
    return [
        row["peer"],
        _number(_median(row, "ms")),
        f"{_number(row['ms']['p20'])}–{_number(row['ms']['p80'])}",
        _number(_median(row, "graph_ms")),
        _number(_median(row, "ratio"), 2),
        _number(row["graph_ratio"], 2),
        _number(None if row["peak_bytes"] is None else row["peak_bytes"] / 1e6, 1),
        _number(None if row["held_bytes"] is None else row["held_bytes"] / 1e6, 1),
        f"{max(row['errors'].values()):.1e}",
    ]


CASE = ("op", "mode", "direction", "batch", "sizes")


def _table(rows: list[Row]) -> list[str]:
    header = ["peer", "ms", "p20–p80", "graph ms", "× Conv2d", "graph × Conv2d", "peak MB", "held MB", "error"]
    lines = []
    for case in dict.fromkeys(tuple(row[name] for name in CASE) for row in rows):
        members = [row for row in rows if tuple(row[name] for name in CASE) == case]
        op, mode, direction, batch, sizes = case
        lines += ["", f"**{op}, {mode}, {direction}, batch {batch}, {sizes}**", ""]
        lines += markdown(header, [_cells(row) for row in members])
    return lines


def _steps(data: dict[str, Any]) -> list[str]:
    """Every backend's steps, with what moving their tensors would take."""
    lines = []
    for one in data["steps"]:
        body = []
        for step in one["steps"]:
            us, floor = 1e3 * step["ms"]["median"], None
            if data["copy_bytes_per_second"]:
                floor = 1e6 * step["floor_bytes"] / data["copy_bytes_per_second"]
            share = None if floor is None else floor / us
            body.append([step["step"], _number(us, 1), _number(floor, 1), _number(share, 2)])
        lines += ["", f"**Steps of {one['call']}, forward + backward**", ""]
        lines += markdown(["step", "µs", "floor µs", "floor / µs"], body)
    return lines


def _searches(data: dict[str, Any]) -> list[str]:
    """What each search chose beside what is usual, the first that it tried."""
    body = []
    for one in data["searches"]:
        if one["candidates"]:
            usual, best = one["candidates"][0], min(one["candidates"], key=lambda candidate: candidate["ms"])
            named = ["/".join(str(c[name]) for name in ("tokens", "num_warps", "num_stages")) for c in (usual, best)]
            body.append([one["kernel"], one["of"], named[0], _number(1e3 * usual["ms"], 1), named[1],
                         _number(1e3 * best["ms"], 1)])  # fmt: skip
    header = ["kernel", "of", "usual: tokens/warps/stages", "µs", "fastest", "µs"]
    return ["", "**Searched configurations**", "", *markdown(header, body)] if body else []


def render(data: dict[str, Any]) -> str:
    """The whole report."""
    machine = data["machine"]
    lines = [
        f"{machine['device']}, driver {machine['driver']}; {machine['cpu']}, {machine['cores']} cores",
        f"torch {machine['torch']} (CUDA {machine['cuda']}), Triton {machine['triton']}, Python {machine['python']}",
        f"aape_kernels {machine['commit']}; {machine['date']}; {data['spectrogram']}, "
        f"backends: {', '.join(data['backends']) or 'none'}",
    ]
    if data["copy_bytes_per_second"]:
        lines.append(f"copy bandwidth: {data['copy_bytes_per_second'] / 1e9:.0f} GB/s, read and written")
    if data["matmul_per_second"]:
        lines.append(f"bfloat16 product of 8192 × 8192: {data['matmul_per_second'] / 1e12:.0f} TFLOP/s")
    if data["faults"]:
        lines += ["", "**FAILED**", "", *(f"- {fault}" for fault in data["faults"])]
    if data["not_run"]:
        lines += ["", "**Not run, for want of time**", "", *(f"- {case}" for case in data["not_run"])]
    if data["figures"]:
        body = [
            [row["figure"], row["aim"], _number(row["got"], 2), {None: "–", True: "yes", False: "NO"}[row["met"]]]
            for row in data["figures"]
        ]
        lines += ["", "**Figures aimed at**", "", *markdown(["figure", "aim", "got", "met"], body)]
    lines += _table(data["rows"])
    for row in data["rows"]:
        if row["op"] == "sblu" and row["direction"] == "forward" and row["peer"].split(", ")[1] in data["backends"]:
            ms = _median(row, "graph_ms") or _median(row, "ms")
            if ms is not None:
                lines += [
                    "",
                    f"{row['peer']}, {row['mode']}, batch {row['batch']}, {row['sizes']}: "
                    f"{row['floor_bytes'] / 1e6:.1f} MB at least, "
                    f"{row['floor_bytes'] / ms / 1e6:.0f} GB/s",
                ]
    lines += _steps(data)
    if data["products"]:
        lines += [
            "",
            "## Tokens by a product, where one kernel makes them above",
            *_table(data["products"]),
        ]
    if data["tuned"]:
        lines += ["", "## With AAPE_AUTOTUNE=1", *_table(data["tuned"])]
    lines += _searches(data)
    if data["precision"]:
        body = [
            [one["peer"], one["direction"], one["precision"], _number(_median(one, "ms")),
             _number(_median(one, "graph_ms")), f"{one['errors']['output']:.1e}",
             f"{max((e for n, e in one['errors'].items() if n != 'output'), default=0):.1e}"]
            for one in data["precision"]
        ]  # fmt: skip
        header = ["peer", "direction", "products", "ms", "graph ms", "output error", "largest gradient error"]
        lines += ["", "## Products of float32 as three of TF32", "", *markdown(header, body)]
    for one in data["kernels"]:
        body = [[k["kernel"][:90], f"{k['launches']:g}", f"{k['us']:.1f}"] for k in one["kernels"]]
        body.append(
            ["all", f"{sum(k['launches'] for k in one['kernels']):g}", f"{sum(k['us'] for k in one['kernels']):.1f}"]
        )
        lines += ["", f"**Kernels of {one['call']}** (caches as the call before left them)", ""]
        lines += markdown(["kernel", "launches", "µs"], body)
    return "\n".join([*lines, "", LEGEND, ""])
