"""The GPU benchmark as one command: stem and SBLU beside their peers, with the figures the project aims at.

python -m benchmarks.gpu --out build/gpu

Writes gpu.json and gpu.md, and rewrites them after every part, so that a run cut short loses only what it had not
reached; autotune.json holds the launch configurations found. Every part runs whatever became of those before it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from aape_kernels.backends import BACKENDS

from .cases import Problem, Sizes, Truth, truth
from .check import BOUNDS, DIRECTIONS, WrongOutput, check, runner
from .environment import describe_gpu
from .gpu_cases import BATCHES, MODES, QUICK, floor_bytes, problem_of, work_of
from .gpu_clock import Clock, graph_of, kernel_times
from .gpu_search import SEARCHED, compile_ahead, searching
from .gpu_table import figures, render
from .measure import spread
from .memory import held_bytes, peak_bytes
from .peers import CONV2D, Peer, peers

__all__ = ["main"]


def _brief(error: Exception) -> str:
    """Its type and first line."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


class Run:
    """One run: the device, its clock, and what has been measured so far."""

    def __init__(self, device: torch.device, out: Path, quick: bool, budget: float) -> None:
        self.device, self.out, self.quick = device, out, quick
        self.deadline = time.monotonic() + budget
        self.started = time.monotonic()
        self.sizes, self.batches = (QUICK, (2,)) if quick else (Sizes(), BATCHES)
        self.clock = Clock(device, seconds=0.0, min_rounds=3) if quick else Clock(device)
        machine = describe_gpu(device)
        missing = machine["missing_backends"]["embed"]
        self.backends = [name for name, one in BACKENDS.items() if name not in missing and one.device == device.type]
        self.data: dict[str, Any] = {
            "machine": machine, "sizes": str(self.sizes), "batches": list(self.batches), "backends": self.backends,
            "copy_bytes_per_second": None, "rows": [], "tuned": [], "configurations": [], "precision": [],
            "kernels": [], "figures": [], "faults": [],
        }  # fmt: skip
        self._problems: dict[tuple[str, str, int], Problem] = {}
        self._truths: dict[tuple[str, str, int, str], Truth] = {}

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.started:6.1f} s] {text}", flush=True)

    def fault(self, text: str) -> None:
        self.say(f"FAILED: {text}")
        self.data["faults"].append(text)

    def save(self) -> None:
        """Both files as of now."""
        self.data["figures"] = figures(self.data)
        (self.out / "gpu.json").write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
        (self.out / "gpu.md").write_text(render(self.data), encoding="utf-8")

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """One part: what goes wrong in it is a fault, and the next one runs."""
        self.say(name)
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.fault(f"{name}: {_brief(error)}")
        self.save()

    def problem(self, op: str, mode: str, batch: int) -> Problem:
        """Kept for one case only: a batch of 64 is large."""
        key = op, mode, batch
        if key not in self._problems:
            self._problems.clear()
            self._truths.clear()
            self._problems[key] = problem_of(op, mode, self.sizes, batch, self.device)
        return self._problems[key]

    def truth(self, op: str, mode: str, batch: int, formula: str) -> Truth:
        """The float64 result of one case."""
        problem = self.problem(op, mode, batch)
        key = op, mode, batch, formula
        if key not in self._truths:
            self._truths[key] = truth(problem, formula)
        return self._truths[key]

    def peers(self, op: str, mode: str, batch: int) -> list[Peer]:
        """Those of a case: compiled ones only where a figure asks for them, as each takes half a minute to compile."""
        dtype = torch.bfloat16 if mode == "bfloat16" else torch.float32
        asked = op == "sblu" and mode == "float32" and batch == max(self.batches) and not self.quick
        chosen = [peer for peer in peers(op, self.device, dtype) if asked or not peer.compiled]
        # complex numbers have no 16 bits
        return [peer for peer in chosen if dtype == torch.float32 or "complex" not in peer.name]

    def row(self, peer: Peer, op: str, mode: str, direction: str, batch: int) -> dict[str, Any]:
        """Check one peer and time it. A wrong one raises `WrongOutput`."""
        problem = self.problem(op, mode, batch)
        if peer.compiled:
            torch.compiler.reset()  # every one starts from nothing, as where it was compiled ahead
        work = work_of(peer, problem, mode)
        errors = check(work, direction, problem, self.truth(op, mode, batch, peer.formula))
        call = runner(work, direction, problem.cotangent)
        row: dict[str, Any] = {"op": op, "mode": mode, "direction": direction, "batch": batch, "peer": peer.name}
        plain = runner(work_of(CONV2D, problem, mode), direction, problem.cotangent) if op == "stem" else None
        if plain is not None:
            conv, mine = self.clock.times(plain, call)
            row["conv2d_ms"] = spread(conv)
            row["ratio"] = spread([a / b for a, b in zip(mine, conv, strict=True)])
        else:
            (mine,) = self.clock.times(call)
            row["floor_bytes"] = floor_bytes(problem)
        given = [problem.x, *problem.parameters.values(), *work.wrt.values()]
        graph_ms, why = self.graph(call)
        conv_ms = None if plain is None or graph_ms is None else self.graph(plain)[0]
        return row | {
            "ms": spread(mine),
            "rounds": len(mine),
            "graph_ms": graph_ms,
            "no_graph": why,
            "graph_ratio": None if conv_ms is None or graph_ms is None else graph_ms["median"] / conv_ms["median"],
            "peak_bytes": peak_bytes(call, self.device),
            "held_bytes": None if direction == "forward" else held_bytes(work.forward, given),
            "errors": errors,
        }

    def graph(self, call: Callable[[], object]) -> tuple[dict[str, float] | None, str | None]:
        """Milliseconds of the call as a CUDA graph, or why there are none."""
        if self.device.type != "cuda":
            return None, "no CUDA device"
        try:
            (times,) = self.clock.times(graph_of(call))
            return spread(times), None
        except Exception as error:  # PyTorch raises whatever the call met
            torch.cuda.synchronize()
            return None, _brief(error)

    def rows(self, into: str, op: str, mode: str, batch: int, chosen: list[Peer]) -> None:
        """The rows of one case, both directions."""
        for direction in DIRECTIONS:
            for peer in chosen:
                try:
                    row = self.row(peer, op, mode, direction, batch)
                except WrongOutput as error:
                    self.fault(f"{peer.name}, {mode}, batch {batch}: {error}")
                    row = {"op": op, "mode": mode, "direction": direction, "batch": batch, "peer": peer.name,
                           "refused": str(error)}  # fmt: skip
                except Exception as error:
                    traceback.print_exc()
                    self.fault(f"{peer.name}, {op}, {mode}, {direction}, batch {batch}: {_brief(error)}")
                    continue
                self.data[into].append(row)
                if "ms" in row:
                    graph = "" if row["graph_ms"] is None else f", as a graph {row['graph_ms']['median']:.3f} ms"
                    self.say(f"  {op}, {mode}, {direction}, B{batch}, {peer.name}: {row['ms']['median']:.3f} ms{graph}")

    def ours(self, op: str) -> list[Peer]:
        """This package's GPU backends."""
        names = {f"{'AaPE' if op == 'stem' else 'sblu'}, {backend}" for backend in self.backends}
        return [peer for peer in peers(op, self.device) if peer.name in names]

    def in_time(self, part: str) -> bool:
        """Whether there is time for one more part; a part left out is a fault."""
        if time.monotonic() < self.deadline:
            return True
        self.fault(f"{part}: not run, the time for the benchmark was over")
        self.save()
        return False

    def everything(self) -> None:
        """All parts, the figures' own rows first."""
        largest = max(self.batches)
        with self.part("copy bandwidth"):
            self.data["copy_bytes_per_second"] = self.clock.copy_bandwidth()
            self.say(f"  {self.data['copy_bytes_per_second'] / 1e9:.0f} GB/s")
        if self.device.type == "cuda":
            if not self.backends:
                self.fault(f"no GPU backend can run here: {self.data['machine']['missing_backends']['embed']}")
            if not self.quick:
                with self.part("compiling ahead"):
                    self.say(f"  {compile_ahead(self.device, largest, 'triton' in self.backends)}")
        cases = [
            (op, mode, batch) for batch in sorted(self.batches, reverse=True) for op in MODES for mode in MODES[op]
        ]
        for op, mode, batch in cases:
            if self.in_time(f"{op}, {mode}, batch {batch}"):
                with self.part(f"{op}, {mode}, batch {batch}"):
                    self.rows("rows", op, mode, batch, self.peers(op, mode, batch))
        if self.device.type != "cuda":
            return
        for op, mode in (("stem", "bfloat16"), ("sblu", "float32")):
            if self.in_time(f"kernels of {op}"):
                with self.part(f"kernels of {op}, {mode}, batch {largest}"):
                    self.kernels(op, mode, largest)
        if "triton" not in self.backends:
            return
        if self.in_time("float32 as tf32x3"):
            with self.part("float32 as tf32x3"):
                self.precision(largest)
        if self.in_time("AAPE_AUTOTUNE=1"):
            with self.part("AAPE_AUTOTUNE=1"):
                self.tuned(largest)

    def kernels(self, op: str, mode: str, batch: int) -> None:
        """The kernels of one call of each of this package's backends, and of Conv2d beside a stem."""
        problem = self.problem(op, mode, batch)
        for peer in [*self.ours(op), *([CONV2D] if op == "stem" else [])]:
            for direction in DIRECTIONS:
                found = kernel_times(runner(work_of(peer, problem, mode), direction, problem.cotangent))
                name = f"{peer.name}, {op}, {mode}, {direction}, batch {batch}"
                if found:
                    self.data["kernels"].append({"call": name, "kernels": found})
                else:
                    self.say(f"  {name}: the profiler has seen no kernel")

    def precision(self, batch: int) -> None:
        """Time and error of Triton's float32 products, exact and as three of TF32: to decide between them."""
        from aape_kernels.backends.triton import launch

        for op in MODES:
            problem = self.problem(op, "float32", batch)
            (peer,) = (peer for peer in self.ours(op) if peer.name.endswith("triton"))
            for direction in DIRECTIONS:
                for precision in ("ieee", "tf32x3"):
                    with mock.patch.object(launch, "_precision", lambda device, chosen=precision: chosen):
                        # as wrong as it may be: the error is what is asked for
                        free = (float("inf"), float("inf"))
                        with mock.patch.dict(BOUNDS, dict.fromkeys(BOUNDS, free)):
                            work = work_of(peer, problem, "float32")
                            errors = check(work, direction, problem, self.truth(op, "float32", batch, peer.formula))
                        call = runner(work, direction, problem.cotangent)
                        (times,) = self.clock.times(call)
                        graph_ms, _ = self.graph(call)
                    one = {"peer": peer.name, "direction": direction, "batch": batch, "precision": precision,
                           "ms": spread(times), "graph_ms": graph_ms, "errors": errors}  # fmt: skip
                    self.data["precision"].append(one)
                    self.say(f"  {peer.name}, {direction}, {precision}: {one['ms']['median']:.3f} ms, {errors}")

    def tuned(self, batch: int) -> None:
        """This package's Triton rows again, each kernel with the fastest configuration that a search finds."""
        file = self.out / "autotune.json"
        file.unlink(missing_ok=True)
        for op, mode in SEARCHED:
            with searching(file) as chosen:
                own = [peer for peer in self.ours(op) if peer.name.endswith("triton")]
                self.rows("tuned", op, mode, batch, own)
            for (kernel, rows, _), found in chosen.items():
                sizes = {name: getattr(found, name) for name in ("tokens", "num_warps", "num_stages")}
                self.data["configurations"].append({"kernel": kernel, "rows": rows, "of": f"{op}, {mode}", **sizes})


def refusal(name: str) -> str | None:
    """Why there is no device of that name; None if there is."""
    try:
        device = torch.device(name)
    except RuntimeError:
        return f"--device: expected cpu, cuda or cuda:N, got {name!r}"
    if device.type not in ("cpu", "cuda"):
        return f"--device: expected cpu, cuda or cuda:N, got {name!r}"
    if device.type == "cuda" and not torch.cuda.is_available():
        return f"--device {name}: this PyTorch ({torch.__version__}) sees no CUDA device"
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        return f"--device {name}: there are {torch.cuda.device_count()} CUDA devices"
    return None


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns 0, 1 if any part failed, or 2 where it could not start."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), metavar="FOLDER", help="default: %(default)s")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu for a trial (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, nothing compiled: to try the command itself")
    parser.add_argument(
        "--budget", type=float, default=180, metavar="SECONDS", help="no part starts later (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    why = refusal(options.device)
    if why is not None:
        print(f"{parser.prog}: {why}", file=sys.stderr)
        return 2
    device = torch.device(options.device)
    torch.backends.cudnn.allow_tf32 = False  # cuDNN's default would round the Conv2d stem's operands to 10 bits
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"{parser.prog}: --out {options.out}: {error.strerror}", file=sys.stderr)
        return 2
    run = Run(device, options.out, options.quick, options.budget)
    run.everything()
    run.save()
    print(render(run.data))
    return 1 if run.data["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
