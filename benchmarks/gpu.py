"""The GPU benchmark: stem and SBLU beside their peers, the steps they are made of, and the figures the project aims at.

python -m benchmarks.gpu --out build/gpu                    the tables
python -m benchmarks.gpu --out build/gpu --part search      what searching launch configurations would gain
python -m benchmarks.gpu --out build/gpu --part precision   float32 products as three of TF32 beside exact ones

Writes gpu.json and gpu.md, gpu-search.json or gpu-precision.json, and rewrites them after every case, so that a run cut
short loses only what it had not reached. Every case runs whatever became of those before it.
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
from aape_kernels.backends.cuda import CudaKernels

from . import gpu_steps
from .cases import Problem, Truth, truth
from .check import BOUNDS, DIRECTIONS, WrongOutput, check, runner
from .environment import describe_gpu
from .gpu_cases import QUICK, USUAL, Case, cases, floor_bytes, problem_of
from .gpu_clock import Clock, graph_of, kernel_times
from .gpu_search import SEARCH_SECONDS, SEARCHED, compile_ahead, search_ahead, searching
from .gpu_table import figures, render
from .measure import spread
from .memory import held_bytes, peak_bytes
from .peers import CONV2D, Peer, peers, work_of

__all__ = ["main"]

FILES = {"tables": "gpu", "search": "gpu-search", "precision": "gpu-precision"}
# What is taken apart, too, as soon as it has been timed.
TAKEN_APART = (Case("stem", "bfloat16"), Case("sblu", "float32"), Case("stem", "float32"))


def _brief(error: Exception) -> str:
    """Its type and first line."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


class Run:
    """One run: the device, its clock, and what has been measured so far."""

    def __init__(self, device: torch.device, out: Path, quick: bool, budget: float, part: str = "tables") -> None:
        self.device, self.out, self.quick, self.part_name = device, out, quick, part
        self.started = time.monotonic()
        self.deadline = self.started + budget
        self.clock = Clock(device, seconds=0.0, min_rounds=3) if quick else Clock(device)
        machine = describe_gpu(device)
        missing = machine["missing_backends"]["embed"]
        self.backends = [name for name, one in BACKENDS.items() if name not in missing and one.device == device.type]
        sizes = QUICK if quick else USUAL
        self.data: dict[str, Any] = {
            "machine": machine, "spectrogram": f"{sizes.mel_bins} × {sizes.frames}", "backends": self.backends,
            "copy_bytes_per_second": None, "matmul_per_second": None, "rows": [], "steps": [], "kernels": [],
            "products": [], "tuned": [], "searches": [], "precision": [], "figures": [], "faults": [], "not_run": [],
        }  # fmt: skip
        self._problem: tuple[Case, Problem] | None = None
        self._truths: dict[str, Truth] = {}
        self._conv_graphs: dict[tuple[Case, str], dict[str, float] | None] = {}

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.started:6.1f} s] {text}", flush=True)

    def fault(self, text: str) -> None:
        self.say(f"FAILED: {text}")
        self.data["faults"].append(text)

    def save(self) -> None:
        """The files as of now."""
        self.data["figures"] = figures(self.data) if self.part_name == "tables" else []
        path = self.out / f"{FILES[self.part_name]}.json"
        path.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
        if self.part_name == "tables":
            path.with_suffix(".md").write_text(render(self.data), encoding="utf-8")

    @contextlib.contextmanager
    def section(self, name: str) -> Iterator[None]:
        """What goes wrong in it is a fault, and the next one runs."""
        self.say(name)
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.fault(f"{name}: {_brief(error)}")
        self.save()

    def problem(self, case: Case) -> Problem:
        """Kept for one case only: a batch of 64 is large."""
        if self._problem is None or self._problem[0].key != case.key:
            self._problem = None
            self._truths.clear()
            self._problem = case, problem_of(case, self.device)
        return self._problem[1]

    def truth(self, case: Case, formula: str) -> Truth:
        """The float64 result of one case."""
        problem = self.problem(case)
        if formula not in self._truths:
            self._truths[formula] = truth(problem, formula)
        return self._truths[formula]

    def peers(self, case: Case) -> list[Peer]:
        """Those of a case."""
        if not (case.others or case.compiled):
            return self.ours(case.op)
        dtype = torch.bfloat16 if case.mode == "bfloat16" else torch.float32
        chosen = [peer for peer in peers(case.op, self.device, dtype) if peer.compiled == case.compiled]
        # complex numbers have no 16 bits
        return [peer for peer in chosen if dtype == torch.float32 or "complex" not in peer.name]

    def ours(self, op: str) -> list[Peer]:
        """This package's GPU backends."""
        names = {f"{'AaPE' if op == 'stem' else 'sblu'}, {backend}" for backend in self.backends}
        return [peer for peer in peers(op, self.device) if peer.name in names]

    def row(self, peer: Peer, case: Case, direction: str) -> dict[str, Any]:
        """Check one peer and time it. A wrong one raises `WrongOutput`."""
        problem = self.problem(case)
        if peer.compiled:
            torch.compiler.reset()  # every one starts from nothing, as where it was compiled ahead
        work = work_of(peer, problem, case.mode)
        errors = check(work, direction, problem, self.truth(case, peer.formula))
        call = runner(work, direction, problem.cotangent)
        row: dict[str, Any] = case.key | {"direction": direction, "peer": peer.name}
        if case.op == "stem":
            plain = runner(work_of(CONV2D, problem, case.mode), direction, problem.cotangent)
            conv, mine = self.clock.times(plain, call)
            row["conv2d_ms"] = spread(conv)
            row["ratio"] = spread([a / b for a, b in zip(mine, conv, strict=True)])
            if (case, direction) not in self._conv_graphs:
                self._conv_graphs[case, direction] = self.graph(plain)[0]
        else:
            (mine,) = self.clock.times(call)
            row["floor_bytes"] = floor_bytes(problem)
        given = [problem.x, *problem.parameters.values(), *work.wrt.values()]
        graph_ms, why = self.graph(call)
        conv_ms = self._conv_graphs.get((case, direction))
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

    def rows(self, into: str, case: Case, chosen: list[Peer]) -> None:
        """The rows of one case, both directions."""
        for direction in DIRECTIONS:
            for peer in chosen:
                try:
                    row = self.row(peer, case, direction)
                except WrongOutput as error:
                    self.fault(f"{case}: {peer.name}: {error}")
                    row = case.key | {"direction": direction, "peer": peer.name, "refused": str(error)}
                except Exception as error:
                    traceback.print_exc()
                    self.fault(f"{case}: {peer.name}, {direction}: {_brief(error)}")
                    continue
                self.data[into].append(row)
                if "ms" in row:
                    graph = "" if row["graph_ms"] is None else f", as a graph {row['graph_ms']['median']:.3f} ms"
                    self.say(f"  {case}: {peer.name}, {direction}: {row['ms']['median']:.3f} ms{graph}")

    def in_time(self, what: str) -> bool:
        """Whether there is time for one more."""
        if time.monotonic() < self.deadline:
            return True
        self.say(f"not run, the time for the benchmark is over: {what}")
        self.data["not_run"].append(what)
        self.save()
        return False

    def ceilings(self) -> None:
        """What the card does at most."""
        with self.section("the card's ceilings"):
            self.data["copy_bytes_per_second"] = self.clock.copy_bandwidth()
            self.say(f"  copying {self.data['copy_bytes_per_second'] / 1e9:.0f} GB/s")
            self.data["matmul_per_second"] = self.clock.matmul_rate()
            self.say(f"  bfloat16 products {self.data['matmul_per_second'] / 1e12:.0f} TFLOP/s")

    def tables(self) -> None:
        """All cases, the figures' own rows first; what is slow or new to the project is taken apart in between."""
        self.ceilings()
        if self.device.type == "cuda" and not self.backends:
            self.fault(f"no GPU backend can run here: {self.data['machine']['missing_backends']['embed']}")
        for case in cases(self.quick):
            if self.in_time(str(case)):
                with self.section(str(case)):
                    self.rows("rows", case, self.peers(case))
                    if case.op == "stem" and not case.compiled:
                        self.by_products(case)
            apart = next((one for one in TAKEN_APART if one.key == case.key), None)
            if apart and self.device.type == "cuda" and not case.compiled and self.in_time(f"{case}, taken apart"):
                with self.section(f"{case}, taken apart"):
                    self.steps(case)
                    self.kernels(case)

    def by_products(self, case: Case) -> None:
        """Backend "cuda" without its kernel that makes tokens, as it is for most geometries."""
        with mock.patch.object(CudaKernels, "tokens", return_value=None):
            self.rows("products", case, [peer for peer in self.ours(case.op) if peer.name.endswith("cuda")])

    def steps(self, case: Case) -> None:
        """The steps of a forward and backward of each of this package's backends."""
        problem = self.problem(case)
        for peer in self.ours(case.op):
            kernels = gpu_steps.kernels_of(peer.name.rpartition(" ")[2])
            if kernels is None:
                continue
            with gpu_steps.recording(kernels) as steps:
                runner(work_of(peer, problem, case.mode), DIRECTIONS[1], problem.cotangent)()
            timed = [
                {"step": step.name, "ms": gpu_steps.times(self.clock, step), "floor_bytes": step.floor_bytes}
                for step in steps
            ]
            self.data["steps"].append({"call": f"{case}: {peer.name}", "steps": timed})

    def kernels(self, case: Case) -> None:
        """The kernels of one call of each of this package's backends, and of Conv2d beside a stem."""
        problem = self.problem(case)
        for peer in [*self.ours(case.op), *([CONV2D] if case.op == "stem" else [])]:
            for direction in DIRECTIONS:
                found = kernel_times(runner(work_of(peer, problem, case.mode), direction, problem.cotangent))
                name = f"{case}: {peer.name}, {direction}"
                if found:
                    self.data["kernels"].append({"call": name, "kernels": found})
                else:
                    self.say(f"  {name}: the profiler has seen no kernel")

    def precision(self) -> None:
        """Time and error of Triton's float32 products, exact and as three of TF32: to decide between them."""
        from aape_kernels.backends.triton import launch

        for case in (Case("stem", "float32"), Case("sblu", "float32")):
            if not self.in_time(f"{case}, products of float32"):
                continue
            with self.section(f"{case}, products of float32"):
                problem = self.problem(case)
                (peer,) = (peer for peer in self.ours(case.op) if peer.name.endswith("triton"))
                for direction in DIRECTIONS:
                    for precision in ("ieee", "tf32x3"):
                        with mock.patch.object(launch, "_precision", lambda device, chosen=precision: chosen):
                            # as wrong as it may be: the error is what is asked for
                            free = (float("inf"), float("inf"))
                            with mock.patch.dict(BOUNDS, dict.fromkeys(BOUNDS, free)):
                                work = work_of(peer, problem, case.mode)
                                errors = check(work, direction, problem, self.truth(case, peer.formula))
                            call = runner(work, direction, problem.cotangent)
                            (times,) = self.clock.times(call)
                            graph_ms, _ = self.graph(call)
                        one = {"peer": peer.name, "direction": direction, "precision": precision,
                               "ms": spread(times), "graph_ms": graph_ms, "errors": errors}  # fmt: skip
                        self.data["precision"].append(one)
                        self.say(f"  {peer.name}, {direction}, {precision}: {one['ms']['median']:.3f} ms, {errors}")

    def search(self) -> None:
        """This package's Triton rows as they are and with the fastest configuration that a search finds."""
        with self.section("compiling what is searched"):
            self.say(f"  {compile_ahead(search_ahead(self.device), SEARCH_SECONDS)}")
        file = self.out / "autotune.json"
        file.unlink(missing_ok=True)
        for case in SEARCHED:
            if not self.in_time(str(case)):
                continue
            with self.section(str(case)):
                own = [peer for peer in self.ours(case.op) if peer.name.endswith("triton")]
                self.rows("rows", case, own)
                with searching(file) as found:
                    self.rows("tuned", case, own)
                for one in found:
                    each = [{"tokens": c.tokens, "num_warps": c.num_warps, "num_stages": c.num_stages, "ms": ms}
                            for c, ms in one.times.items()]  # fmt: skip
                    self.data["searches"].append({"kernel": one.kernel, "of": str(case), "candidates": each})


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
    """The command line; returns 0, 1 if anything failed, 2 where it could not start, 3 if time was short for a part."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), metavar="FOLDER", help="default: %(default)s")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu for a trial (default: %(default)s)")
    parser.add_argument("--part", choices=FILES, default="tables", help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, nothing compiled: to try the command itself")
    parser.add_argument(
        "--budget", type=float, default=180, metavar="SECONDS", help="no case starts later (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    why = refusal(options.device)
    if why is None and options.part != "tables" and torch.device(options.device).type != "cuda":
        why = f"--part {options.part}: needs a CUDA device"
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
    run = Run(device, options.out, options.quick, options.budget, options.part)
    if options.part != "tables" and "triton" not in run.backends:
        print(f"{parser.prog}: --part {options.part}: the Triton backend does not run here", file=sys.stderr)
        return 2
    getattr(run, options.part)()
    run.save()
    print(render(run.data))
    faults, not_run = len(run.data["faults"]), len(run.data["not_run"])
    rows = sum(len(run.data[name]) for name in ("rows", "products", "tuned", "precision"))
    print(f"{rows} rows; {faults} failed or refused; {not_run} cases not run")
    return 1 if faults else 3 if not_run else 0


if __name__ == "__main__":
    sys.exit(main())
