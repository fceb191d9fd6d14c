"""The GPU benchmark as one command: stem and SBLU beside their peers, with the figures the project aims at.

python -m benchmarks.gpu --out build/gpu

Writes gpu.json and gpu.md, and rewrites them after every part, so that a run cut short loses only what it had not
reached; autotune.json holds the launch configurations found. Every part runs whatever became of those before it.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from aape_kernels.backends import BACKENDS, Call, reasons

from .cases import Problem, Sizes, Truth, truth
from .check import BOUNDS, DIRECTIONS, WrongOutput, check, runner
from .environment import cpu_model
from .gpu_clock import Clock, graph_of, kernel_times
from .gpu_table import COMPILED, figures, render
from .measure import spread
from .memory import held_bytes, peak_bytes
from .peers import CONV2D, Peer, Work, compile_static, peers

__all__ = ["main"]

ROOT = Path(__file__).parents[1]
# What a stem is timed in: all float32, all bfloat16, or float32 under bfloat16 autocast.
MODES = {"sblu": ("float32", "bfloat16"), "stem": ("float32", "bfloat16", "autocast bfloat16")}
BATCHES = (8, 64)
QUICK = Sizes(mel_bins=32, frames=64, dim=32, states=4, hidden=8)
WARMING = 80  # seconds that compiling ahead in other processes may take
SEARCHED = (("sblu", "float32"), ("sblu", "bfloat16"), ("stem", "float32"), ("stem", "bfloat16"))


def problem_of(op: str, mode: str, sizes: Sizes, batch: int, device: torch.device) -> Problem:
    """16 bits mean x, weights and output; decay and frequency of `sblu` stay float32, as the stem's are."""
    dtype = torch.bfloat16 if mode == "bfloat16" else torch.float32
    problem = Problem.make(op, sizes, batch, device, dtype)
    if op == "sblu":
        wide = {name: problem.parameters[name].float() for name in ("decay", "frequency")}
        problem = replace(problem, parameters=problem.parameters | wide)
    if mode.startswith("autocast"):
        problem = replace(problem, cotangent=problem.cotangent.bfloat16())
    return problem


def work_of(peer: Peer, problem: Problem, mode: str) -> Work:
    """The peer's work, under autocast if the mode says so."""
    work = peer.make(problem, compile_static)
    if not mode.startswith("autocast"):
        return work

    def forward() -> torch.Tensor:
        with torch.autocast(problem.x.device.type, dtype=torch.bfloat16):
            return work.forward()

    return replace(work, forward=forward)


def floor_bytes(problem: Problem) -> int:
    """Bytes that `sblu` cannot do without: every input read once, y written once (it is like the cotangent)."""
    given = [problem.x, *problem.parameters.values(), problem.cotangent]
    return sum(value.numel() * value.element_size() for value in given)


class Run:
    """One run: the device, its clock, and what has been measured so far."""

    def __init__(self, device: torch.device, out: Path, quick: bool, budget: float) -> None:
        self.device, self.out, self.quick = device, out, quick
        self.deadline = time.monotonic() + budget
        self.started = time.monotonic()
        self.sizes, self.batches = (QUICK, (2,)) if quick else (Sizes(), BATCHES)
        self.clock = Clock(device, seconds=0.0, min_rounds=3) if quick else Clock(device)
        offered = reasons(Call("embed", device, torch.float32))
        self.backends = [name for name, why in offered.items() if why is None and BACKENDS[name].device == device.type]
        self.data: dict[str, Any] = {
            "machine": describe(device), "sizes": str(self.sizes), "batches": list(self.batches),
            "backends": self.backends, "missing_backends": {k: why for k, why in offered.items() if why is not None},
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
            self.fault(f"{name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
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
            return None, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"

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
                    text = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                    self.fault(f"{peer.name}, {op}, {mode}, {direction}, batch {batch}: {text}")
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
                self.fault(f"no GPU backend can run here: {self.data['missing_backends']}")
            if not self.quick:
                with self.part("compiling ahead"):
                    compile_ahead(self)
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


@contextlib.contextmanager
def searching(file: Path) -> Iterator[dict[tuple[str, int, str], Any]]:
    """AAPE_AUTOTUNE=1 with its cache in `file`; what was chosen, by kernel, tokens and key.

    A choice also holds while a graph is captured, when nothing can be searched.
    """
    from aape_kernels.backends.triton import configurations, launch

    chosen: dict[tuple[str, int, str], Any] = {}
    plain = launch.configuration

    def choose(kernel: str, rows: int, key: str, *rest: Any) -> Any:
        where = kernel, rows, key
        if where not in chosen:
            chosen[where] = plain(kernel, rows, key, *rest)
        return chosen[where]

    configurations._kept.cache_clear()
    try:
        with (
            mock.patch.dict(os.environ, AAPE_AUTOTUNE="1", AAPE_AUTOTUNE_CACHE=str(file)),
            mock.patch.object(launch, "configuration", choose),
        ):
            yield chosen
    finally:
        configurations._kept.cache_clear()


def compile_ahead(run: Run) -> None:
    """Compile in other processes what would otherwise be compiled one after the other: the compiled peers, and every
    configuration that a search tries. Their caches on disk serve the rows; what is not there in time is compiled later.
    """
    largest = max(run.batches)
    # Horner's forward is the same graph in both directions
    jobs = [*((COMPILED[0], direction) for direction in DIRECTIONS), (COMPILED[1], DIRECTIONS[1])]
    commands = [
        [sys.executable, "-m", "benchmarks.warm", str(run.device), str(torch.get_num_threads()),
         json.dumps([["sblu", peer, direction, largest]])]
        for peer, direction in jobs
    ]  # fmt: skip
    if "triton" in run.backends:
        parts = max(1, min(12, (os.cpu_count() or 1) - len(commands)))
        commands += [
            [sys.executable, "-m", "benchmarks.gpu", "--device", str(run.device), "--search-part", f"{k}/{parts}"]
            for k in range(parts)
        ]
    with tempfile.TemporaryFile() as log:
        workers = [subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT) for command in commands]
        until = time.monotonic() + WARMING
        late = failed = 0
        for worker in workers:
            try:
                failed += worker.wait(max(0.0, until - time.monotonic())) != 0
            except subprocess.TimeoutExpired:
                late += 1
                worker.kill()
                worker.wait()
        run.say(f"  {len(workers)} processes, {late} not in time, {failed} failed")
        if failed:
            log.seek(0)
            print(log.read()[-2000:].decode(errors="replace"), flush=True)


def search_part(device: torch.device, part: int, parts: int) -> None:
    """Compile every `parts`th configuration that a search tries, from the `part`th on, by one launch of each."""
    import triton

    from aape_kernels.backends.triton import configurations

    def once(launch: Callable[[], object], **_: Any) -> float:
        launch()
        torch.cuda.synchronize()
        return 1.0

    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(configurations, "CANDIDATES", configurations.CANDIDATES[part::parts]),
        mock.patch.object(triton.testing, "do_bench", once),
    ):
        for op, mode in SEARCHED:
            problem = problem_of(op, mode, Sizes(), max(BATCHES), device)
            name = "AaPE, triton" if op == "stem" else "sblu, triton"
            (peer,) = (peer for peer in peers(op, device) if peer.name == name)
            # a part may hold no configuration that fits: what it has compiled by then serves all the same
            with contextlib.suppress(ValueError), searching(Path(folder) / f"{op}-{mode}.json"):
                runner(work_of(peer, problem, mode), DIRECTIONS[1], problem.cotangent)()


def _said(*command: str) -> str | None:
    """The first line that a command prints, None if it cannot."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def describe(device: torch.device) -> dict[str, Any]:
    """Device, driver, versions and commit."""
    cuda = device.type == "cuda"
    commit = _said("git", "rev-parse", "--short=10", "HEAD")
    if commit is not None and _said("git", "status", "--porcelain") is not None:
        commit += ", modified"
    properties = torch.cuda.get_device_properties(device) if cuda else None
    driver = _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else None
    return {
        "device": properties.name if properties else cpu_model(),
        "capability": f"{properties.major}.{properties.minor}" if properties else None,
        "multiprocessors": properties.multi_processor_count if properties else None,
        "l2_bytes": getattr(properties, "L2_cache_size", None) if properties else None,
        "memory_bytes": properties.total_memory if properties else None,
        "driver": driver,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "aape_kernels": _version("aape-kernels"),
        "commit": commit or "unversioned",
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


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
    parser.add_argument("--search-part", metavar="K/N", help=argparse.SUPPRESS)  # its own child process
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
    if options.search_part:
        part, _, parts = options.search_part.partition("/")
        search_part(device, int(part), int(parts))
        return 0
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
