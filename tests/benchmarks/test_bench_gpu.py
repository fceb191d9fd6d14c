"""The GPU benchmark's command, tried on the CPU: what it writes, what it refuses, and the figures from made-up rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from aape_kernels.backends.fused import Kernels
from aape_kernels.geometry import PatchGrid
from benchmarks import gpu, gpu_cases, gpu_search, gpu_steps, peers
from benchmarks.cases import truth
from benchmarks.check import DIRECTIONS, WrongOutput, check
from benchmarks.gpu_cases import MODES, QUICK, Case, cases, floor_bytes, problem_of
from benchmarks.gpu_clock import Clock
from benchmarks.gpu_table import COMPILED, EAGER, figures, render

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
TRIAL = ["--device", "cpu", "--quick"]


@pytest.fixture(autouse=True)
def _settings() -> Any:
    """One thread, as tiny sizes spin on a second one; and what the command sets is put back."""
    threads, tf32 = torch.get_num_threads(), torch.backends.cudnn.allow_tf32
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = tf32


@pytest.mark.slow
def test_writes_every_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--out", str(tmp_path / "new" / "folder"), *TRIAL]) == 0
    printed = capsys.readouterr().out
    folder = tmp_path / "new" / "folder"
    assert sorted(path.name for path in folder.iterdir()) == ["gpu.json", "gpu.md"]
    data = json.loads((folder / "gpu.json").read_text())
    assert data["faults"] == []
    assert data["copy_bytes_per_second"] > 0
    assert data["matmul_per_second"] > 0
    assert data["machine"]["torch"] == torch.__version__
    timed = {(row["op"], row["mode"]) for row in data["rows"]}
    assert timed == {(op, mode) for op, modes in MODES.items() for mode in modes}
    for op, mode in timed:
        names = {row["peer"] for row in data["rows"] if (row["op"], row["mode"]) == (op, mode)}
        assert names >= ({"Conv2d", "rearrange + Linear", "AaPE, reference"} if op == "stem" else {EAGER})
    assert {row["direction"] for row in data["rows"]} == set(DIRECTIONS)
    for row in data["rows"]:
        assert row["ms"]["median"] > 0
        assert max(row["errors"].values()) <= (3e-5 if row["mode"] == "float32" else 1e-2)
        assert (row["held_bytes"] is None) == (row["direction"] == "forward")
        assert ("ratio" in row) == (row["op"] == "stem")
    table = (folder / "gpu.md").read_text()
    assert table in printed
    assert printed.endswith(f"\n{len(data['rows'])} rows; 0 failed or refused; 0 cases not run\n")
    for heading in (
        "**stem, autocast bfloat16, forward + backward, batch 2, both, D 32, S 4**",
        "**sblu, bfloat16, forward, batch 2, S 4**",
    ):
        assert heading in table
    assert "FAILED" not in table


@pytest.mark.slow
def test_a_wrong_peer_has_no_figure_and_the_rest_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = peers.linear_stem

    def wrong(problem: Any, compile_: Any) -> peers.Work:
        work = right(problem, compile_)
        return replace(work, forward=lambda: work.forward() * 1.1)

    monkeypatch.setattr(peers, "linear_stem", wrong)
    monkeypatch.setattr(gpu_cases, "MODES", {"stem": ("float32", "bfloat16")})
    assert gpu.main(["--out", str(tmp_path), *TRIAL]) == 1
    data = json.loads((tmp_path / "gpu.json").read_text())
    refused = [row for row in data["rows"] if "refused" in row]
    assert {row["peer"] for row in refused} == {"rearrange + Linear"}
    assert len(refused) == len(data["faults"]) == 4
    assert all("output: relative error 1.0e-01" in fault for fault in data["faults"])
    assert not any("ms" in row for row in refused)
    assert {row["peer"] for row in data["rows"] if "ms" in row} >= {"Conv2d", "AaPE, reference"}
    assert "**FAILED**" in (tmp_path / "gpu.md").read_text()
    assert "FAILED: stem, float32, batch 2, both, D 32, S 4: rearrange + Linear: " in capsys.readouterr().out


def test_what_fails_costs_its_own_part_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(problem: Any, compile_: Any) -> peers.Work:
        raise RuntimeError("out of everything\nand more lines")

    monkeypatch.setattr(peers, "linear_stem", broken)
    monkeypatch.setattr(gpu_cases, "MODES", {"stem": ("float32",)})
    monkeypatch.setattr(gpu.Clock, "copy_bandwidth", broken)
    assert gpu.main(["--out", str(tmp_path), *TRIAL]) == 1
    data = json.loads((tmp_path / "gpu.json").read_text())
    assert len(data["faults"]) == 3
    assert data["faults"][0].startswith("the card's ceilings: TypeError")
    assert data["faults"][1].endswith("RuntimeError: out of everything")
    assert {row["peer"] for row in data["rows"]} >= {"Conv2d", "AaPE, reference"}


def test_no_case_starts_late(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--out", str(tmp_path), "--budget", "0", *TRIAL]) == 3
    data = json.loads((tmp_path / "gpu.json").read_text())
    assert data["rows"] == data["faults"] == []
    assert "sblu, float32, batch 2, S 4" in data["not_run"]
    assert "**Not run, for want of time**" in (tmp_path / "gpu.md").read_text()
    assert capsys.readouterr().out.endswith("\n0 rows; 0 failed or refused; 5 cases not run\n")


def test_cases_are_all_different_and_the_figures_come_first() -> None:
    every = list(cases())
    assert len({str(case) for case in every}) == len(every)
    assert {(case.op, case.mode) for case in every} == {(op, mode) for op, modes in MODES.items() for mode in modes}
    assert every[:2] == [Case("stem", "bfloat16", others=True), Case("sblu", "float32", others=True)]
    stems = [case.sizes for case in every if case.op == "stem"]
    assert {sizes.features for sizes in stems} == {"both", "complex", "magnitude"}
    assert {sizes.states for sizes in stems} == {16, 32}
    assert {sizes.dim for sizes in stems} == {192, 768}
    keys = [case.key for case in every]
    assert all(case.key in keys for case in (*gpu.TAKEN_APART, *gpu_search.SEARCHED))
    # rows are told apart by their keys, but for those of other peers
    assert len({json.dumps(case.key) for case in every if not case.compiled}) == sum(not c.compiled for c in every)


@pytest.mark.parametrize("part", ["search", "precision"])
def test_parts_of_a_gpu_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str], part: str) -> None:
    assert gpu.main(["--out", str(tmp_path), "--part", part, *TRIAL]) == 2
    assert capsys.readouterr().err == f"python -m benchmarks.gpu: --part {part}: needs a CUDA device\n"


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("tpu", "--device: expected cpu, cuda or cuda:N, got 'tpu'"),
        ("meta", "--device: expected cpu, cuda or cuda:N, got 'meta'"),
        pytest.param(
            "cuda", "sees no CUDA device", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
        ),
    ],
)
def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str], device: str, message: str) -> None:
    assert gpu.main(["--out", str(tmp_path / "out"), "--device", device]) == 2
    said = capsys.readouterr()
    assert len(said.err.splitlines()) == 1
    assert message in said.err
    assert not said.out
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert gpu.main(["--out", str(tmp_path / "file"), *TRIAL]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
def test_make_gpu_refuses_at_once_without_a_gpu(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHON": sys.executable, "OUT": str(tmp_path / "out")}
    done = subprocess.run([ROOT / ".ci" / "gpu"], capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 2
    assert done.stderr == f"make gpu: this PyTorch ({torch.__version__}) sees no CUDA device\n"
    assert not done.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
def test_make_gpu_refuses_parts_that_it_does_not_have(tmp_path: Path) -> None:
    command = [ROOT / ".ci" / "gpu", "tests", "everything"]
    environment = os.environ | {"OUT": str(tmp_path / "out")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 2
    expected = "make gpu: expected some of tests large bench search sanitize precision, got everything\n"
    assert (done.stderr, done.stdout) == (expected, "")


def test_compiling_ahead_says_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in = tmp_path / "python"
    stand_in.write_text('#!/bin/sh\necho "$@"\n[ "$2" = benchmarks.warm ]\n')
    stand_in.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stand_in))
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert gpu_search.compile_ahead(gpu_search.peers_ahead(CPU), 60) == "3 processes, 0 not in time, 0 failed"
    assert not capsys.readouterr().out
    assert gpu_search.compile_ahead(gpu_search.search_ahead(CPU), 60) == "3 processes, 0 not in time, 3 failed"
    assert "-m benchmarks.gpu_search cpu 1 3\n" in capsys.readouterr().out
    stand_in.write_text("#!/bin/sh\nexec sleep 60\n")
    assert gpu_search.compile_ahead(gpu_search.peers_ahead(CPU), 0) == "3 processes, 3 not in time, 0 failed"


def test_a_search_is_recorded_and_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    from aape_kernels.backends.triton import configurations
    from aape_kernels.backends.triton.configurations import DEFAULTS, configuration

    monkeypatch.delenv("AAPE_AUTOTUNE", raising=False)
    monkeypatch.setattr(configurations, "_capability", lambda device: 9)
    monkeypatch.setattr(configurations, "_machine", lambda index: "Some GPU,")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    launched: list[Any] = []

    def clock(run: Any, warmup: int, rep: int) -> float:
        run()
        return 2.0 if len(launched) == 1 else 1.0 + len(launched) / 100

    monkeypatch.setattr(triton.testing, "do_bench", clock)
    plain = configurations.timed
    with gpu_search.searching(tmp_path / "autotune.json") as found:
        assert (os.environ["AAPE_AUTOTUNE"], os.environ["AAPE_AUTOTUNE_CACHE"]) == ("1", f"{tmp_path}/autotune.json")
        chosen = configuration("stem_fwd", 100, "S=32", torch.device("cuda", 0), launched.append)
    (one,) = found
    assert one.kernel == "stem_fwd"
    assert next(iter(one.times)) == DEFAULTS["stem_fwd", "small"]
    assert min(one.times, key=lambda configuration: one.times[configuration]) == chosen == launched[1]
    assert configurations.timed is plain
    assert "AAPE_AUTOTUNE" not in os.environ


class Adding(Kernels):
    """A backend of two kernels, one of which asks the other."""

    def gather(self, out: torch.Tensor) -> None:
        out.copy_(self.x.flatten(1))

    def overlap_add(self, windows: torch.Tensor, grad_x: torch.Tensor) -> None:
        self.gather(windows)
        grad_x.copy_(windows.view_as(grad_x))


def test_steps_are_recorded_and_can_be_taken_again() -> None:
    kernels = Adding(torch.randn(2, 1, 4, 8), 3, PatchGrid.make((4, 4), None, None), True, False)
    out, windows, grad = torch.empty(2, 32), torch.empty(2, 32), torch.empty(2, 1, 4, 8)
    plain = Adding.gather
    with gpu_steps.recording(Adding) as steps:
        kernels.gather(out)
        kernels.overlap_add(windows, grad_x=grad)
    assert Adding.gather is plain
    assert [step.name for step in steps] == ["gather", "overlap_add"]
    assert [step.floor_bytes for step in steps] == [4 * (64 + 64), 4 * (64 + 64)]
    out.zero_()
    assert gpu_steps.times(Clock(CPU, seconds=0.0, min_rounds=3), steps[0])["median"] > 0
    assert torch.equal(out, kernels.x.flatten(1))


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_gpu_backends_have_steps(backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton", reason="Triton is not installed")
    kernels = gpu_steps.kernels_of(backend)
    assert kernels is not None
    assert {"responses", "grad_states", "prologue"} <= vars(kernels).keys()
    assert gpu_steps.kernels_of("cpu") is None


def test_16_bit_outputs_have_bounds_of_their_own() -> None:
    problem = problem_of(Case("sblu", "bfloat16", 2, QUICK), CPU)
    assert {name: value.dtype for name, value in problem.parameters.items()} == {
        "decay": torch.float32, "frequency": torch.float32, "weight": torch.bfloat16
    }  # fmt: skip
    work, expected = peers.backend_sblu("reference")(problem, lambda function: function), truth(problem, "sblu")
    errors = check(work, DIRECTIONS[1], problem, expected)
    assert 1e-4 < errors["output"] <= 4e-3
    off = replace(work, forward=lambda: work.forward() * 1.01)
    with pytest.raises(WrongOutput, match=r"output: relative error .*, bound 4e-03"):
        check(off, DIRECTIONS[0], problem, expected)


def test_floor_counts_inputs_and_output_once() -> None:
    problem = problem_of(Case("sblu", "float32", 1), CPU)
    x, states, y, weight = 128 * 1024, 8 * 64 * 16, 8 * 64 * 2 * 16, 16 * 16
    assert floor_bytes(problem) == 4 * (x + 2 * states + y + weight)


def _row(op: str, mode: str, direction: str, peer: str, ms: float, graph: float, **more: Any) -> dict[str, Any]:
    def flat(value: float) -> dict[str, float]:
        return dict.fromkeys(("p20", "median", "p80"), value)

    return {
        "op": op, "mode": mode, "direction": direction, "batch": 64, "sizes": "S 32", "peer": peer, "ms": flat(ms),
        "graph_ms": flat(graph), "graph_ratio": None, "peak_bytes": 5_000_000, "held_bytes": None,
        "errors": {"output": 1e-6},
    } | more  # fmt: skip


def test_figures() -> None:
    forward, both = DIRECTIONS
    ratio = {"ratio": {"p20": 0.9, "median": 0.95, "p80": 1.0}, "graph_ratio": 1.2}
    about = ("device", "driver", "cpu", "cores", "torch", "cuda", "triton", "python", "commit", "date")
    data = {
        "machine": dict.fromkeys(about, "?"),
        "spectrogram": "?", "backends": ["triton"], "copy_bytes_per_second": 4e12, "matmul_per_second": 8e14,
        "rows": [
            _row("sblu", "float32", forward, "sblu, triton", 0.040, 0.016, floor_bytes=50_000_000),
            _row("sblu", "float32", both, "sblu, triton", 0.10, 0.05),
            _row("sblu", "float32", both, EAGER, 1.1, 0.4),
            _row("sblu", "float32", both, COMPILED[0], 0.5, 0.3),
            _row("sblu", "float32", both, COMPILED[1], 0.3, 0.09),
            _row("stem", "bfloat16", forward, "AaPE, triton", 0.1, 0.1, **ratio),
        ],
        "steps": [{"call": "a stem", "steps": [{"step": "gather", "ms": {"median": 0.02}, "floor_bytes": 40_000_000}]}],
        "searches": [{"kernel": "stem_fwd", "of": "a stem", "candidates": [
            {"tokens": 16, "num_warps": 4, "num_stages": 1, "ms": 0.05},
            {"tokens": 32, "num_warps": 8, "num_stages": 3, "ms": 0.04},
        ]}],
        "products": [], "tuned": [], "precision": [], "kernels": [], "faults": [], "not_run": [],
    }  # fmt: skip
    data["figures"] = figures(data)
    got = [(row["got"], row["met"]) for row in data["figures"]]
    calls, graphs = got[:5], got[5:]
    assert calls == [
        (pytest.approx(0.3125), False),  # 50 MB in 40 µs are 1.25 TB/s of 4
        (pytest.approx(11), True),
        (pytest.approx(3), True),
        (0.95, True),
        (None, None),  # no row
    ]
    assert graphs == [
        (pytest.approx(0.78125), True),
        (pytest.approx(8), False),
        (pytest.approx(1.8), False),
        (1.2, False),
        (None, None),
    ]
    text = render(data)
    assert "3125 GB/s" in text
    assert "800 TFLOP/s" in text
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert ["gather", "20.0", "10.0", "0.50"] in cells  # 40 MB at 4 TB/s
    assert ["stem_fwd", "a stem", "16/4/1", "50.0", "32/8/3", "40.0"] in cells
    assert "| triton, graphs: stem forward bfloat16, time over Conv2d's " in text
