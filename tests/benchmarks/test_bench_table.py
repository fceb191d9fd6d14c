"""The table from a made-up run, the percentiles in it, and the allocator setting it prints."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import environment
from benchmarks.environment import PINNED, allocator, allocator_environment, cpu_model
from benchmarks.measure import spread
from benchmarks.table import main, render


def _figures(median: float) -> dict[str, float]:
    return {"p20": 0.9 * median, "median": median, "p80": 1.25 * median}


def _row(
    op: str, direction: str, batch: int, peer: str, seconds: float, ratio: float, baseline: bool
) -> dict[str, Any]:
    extra = {
        "op": op,
        "direction": direction,
        "batch": batch,
        "peer": peer,
        "baseline": baseline,
        "seconds": _figures(seconds),
        "conv2d_seconds": _figures(seconds / ratio),
        "ratio": _figures(ratio),
        "peak_bytes": 25_165_824,
        "held_bytes": None if direction == "forward" else 4_200_000,
    }
    return {"name": f"test_{op}", "extra_info": extra}


def _run(setting: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    about = {
        "device": "cpu",
        "cpu": "Some CPU",
        "capability": "AVX512",
        "cores": 2,
        "threads": 2,
        "load": 0.1,
        "allocator": setting,
        "torch": "2.13.0+cpu",
        "cuda": None,
        "python": "3.11.7",
        "aape_kernels": "0.1.0",
        "missing_backends": {"embed": {"cuda": "no CUDA here"}, "sblu": {}},
    }
    return {
        "machine_info": {"run": about},
        "commit_info": {"id": "0123456789abcdef", "dirty": True},
        "datetime": "2026-01-02T03:04:05+00:00",
        "benchmarks": rows,
    }


@pytest.fixture
def run() -> dict[str, Any]:
    seconds = {"op": "import", "seconds": _figures(0.01), "limit": 0.2}
    return _run(
        "pinned (glibc 2.36)",
        [
            _row("stem", "forward", 8, "Conv2d", 0.012, 1.0, True),
            _row("stem", "forward", 8, "AaPE, reference", 0.036, 3.0, False),
            _row("sblu", "forward + backward", 1, "direct sum, real (reference)", 0.006, 2.5, True),
            _row("sblu", "forward + backward", 1, "Horner, torch.compile", 0.0005, 0.25, True),
            _row("sblu", "forward + backward", 1, "sblu, cpu", 0.0001, 0.05, False),
            {"name": "test_import", "extra_info": seconds},
            {"name": "someone else's", "extra_info": {}},
        ],
    )


def _cells(text: str, peer: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {peer} "))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_figures(run: dict[str, Any]) -> None:
    text = render(run)
    assert _cells(text, "Conv2d") == ["Conv2d", "1.00", "12.00", "10.80–15.00", "12.00", "1.00", "25.2", "–"]
    assert _cells(text, "AaPE, reference")[1:6] == ["3.00", "36.00", "32.40–45.00", "12.00", "3.00"]
    assert _cells(text, "Horner, torch.compile")[1:] == ["0.25", "0.500", "0.450–0.625", "2.00", "1.00", "25.2", "4.2"]
    # against the fastest other peer, not against itself
    assert [_cells(text, "sblu, cpu")[column] for column in (1, 5)] == ["0.050", "0.20"]


def test_other_sizes_have_a_table_of_their_own(run: dict[str, Any]) -> None:
    row = _row("stem", "forward", 8, "AaPE, other", 0.002, 1.25, False)
    row["extra_info"]["sizes"] = "80 × 208, D = 768"
    text = render(run | {"benchmarks": [*run["benchmarks"], row]})
    heading, table = text.split("**stem, forward, batch 8, 80 × 208, D = 768**")
    assert _cells(table, "AaPE, other")[1:6] == ["1.25", "2.00", "1.80–2.50", "1.60", "–"]
    assert "| AaPE, other " not in heading


def test_a_summary_of_ratios_comes_first(run: dict[str, Any]) -> None:
    rows = [
        _row("stem", "forward", 8, "AaPE, cpu", 0.010, 0.8, False),
        _row("stem", "forward + backward", 8, "AaPE, cpu", 0.010, 0.9, False),
        _row("stem", "forward", 1, "AaPE, cpu", 0.010, 1.1, False),
    ]
    rows[2]["extra_info"]["sizes"] = "128 × 1024, D = 192"
    text = render(run | {"benchmarks": [*run["benchmarks"], *rows]})
    first, _, rest = text.partition("**stem, forward, batch 8**")
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in first.splitlines() if "AaPE, cpu;" in line
    ]
    assert lines == [
        ["AaPE, cpu; batch 8, 128 × 1024, D = 768", "0.80 (0.72–1.00)", "0.90 (0.81–1.12)"],
        ["AaPE, cpu; batch 1, 128 × 1024, D = 192", "1.10 (0.99–1.38)", "–"],
    ]
    assert "AaPE, cpu;" not in rest


def test_a_busy_machine_is_said_to_be(run: dict[str, Any]) -> None:
    assert "NOT IDLE" not in render(run)
    run["machine_info"]["run"]["load"] = 1.4
    assert "THE MACHINE WAS NOT IDLE (load 1.4)" in render(run)
    run["machine_info"]["run"]["load"] = None
    assert "NOT IDLE" not in render(run)


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="only Linux says what its processors do")
def test_what_others_keep_busy_is_counted_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what the last minute was like: a build that has just ended is no neighbour."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as spinning:
        time.sleep(0.5)
        alone = environment._load()
        spinning.kill()
    assert alone is not None
    assert alone > 0.5
    monkeypatch.setattr(environment, "_busy_seconds", lambda: None)
    monkeypatch.setattr(os, "getloadavg", lambda: (1.4, 0.0, 0.0))
    assert environment._load() == 1.4


def test_columns_can_be_counted_on_two_hands(run: dict[str, Any]) -> None:
    default = _run("default (glibc 2.36)", [_row("stem", "forward", 8, "Conv2d", 0.013, 1.0, True)])
    for line in render(run, default).splitlines():
        assert line.count("|") <= 10


def test_heading(run: dict[str, Any]) -> None:
    heading = render(run).split("\n\n")[0]
    for part in (
        "Some CPU",
        "AVX512",
        "threads: 2",
        "load 0.1",
        "2026-01-02",
        "torch 2.13.0+cpu",
        "pinned (glibc 2.36)",
    ):
        assert part in heading
    assert "0123456789, modified" in heading


def test_import_row_names_its_limit(run: dict[str, Any]) -> None:
    assert "median 0.010 s, p20–p80 0.009–0.013; within the limit of 0.2 s" in render(run)
    run["benchmarks"][-2]["extra_info"]["seconds"] = _figures(0.3)
    assert "OVER the limit of 0.2 s" in render(run)


def test_training_steps_by_stem(run: dict[str, Any]) -> None:
    rows = [
        {"stem": stem, "limit": limit, "seconds": _figures(seconds), "ratio": _figures(0.4 / seconds)}
        for stem, limit, seconds in (("conv", None, 0.4), ("AaPE, cpu", 0.95, 0.5), ("conv+mlp", None, 0.42))
    ]
    steps = {"op": "training step", "case": "laptop: D = 128", "batch": 32, "rows": rows}
    text = render(run | {"benchmarks": [{"name": "test_training_step", "extra_info": steps}]})
    assert "**pre-training step, laptop: D = 128**" in text
    assert _cells(text, "AaPE, cpu") == ["AaPE, cpu", "500.00", "450.00–625.00", "64.0", "0.800"]
    assert "AaPE, cpu: 0.800 × the samples/s of conv; UNDER the 0.95 that is asked for" in text
    assert text.count("asked for") == 1  # of the others nothing is
    rows[1]["ratio"] = _figures(0.96)
    assert "AaPE, cpu: 0.960 × the samples/s of conv; at least 0.95 is asked for" in render(
        run | {"benchmarks": [{"name": "test_training_step", "extra_info": steps}]}
    )


def test_the_loader_beside_training(run: dict[str, Any]) -> None:
    row = {
        "op": "loader",
        "clips": "384 wav",
        "workers": 2,
        "case": "batch 32",
        "seconds": _figures(0.002),
        "training_seconds": _figures(0.003),
        "ratio": _figures(1.5),
        "limit": 2.0,
    }
    text = render(run | {"benchmarks": [{"name": "test_loader", "extra_info": row}]})
    assert _cells(text, "384 wav") == ["384 wav", "2", "500", "400–556", "333.3", "1.50"]
    assert "384 wav: 1.50 × the samples/s of training; UNDER the 2 that is asked for" in text


def test_default_allocator_stands_beside(run: dict[str, Any]) -> None:
    default = _run("default (glibc 2.36)", [_row("stem", "forward", 8, "Conv2d", 0.021, 1.0, True)])
    text = render(run, default)
    assert "pinned (glibc 2.36), beside it default (glibc 2.36)" in text
    assert _cells(text, "Conv2d")[-1] == "1.00"
    assert _cells(text, "AaPE, reference")[-1] == "–"
    assert len(_cells(text, "sblu, cpu")) == 8


def test_fits_a_terminal_and_is_aligned(run: dict[str, Any]) -> None:
    default = _run("default (glibc 2.36)", run["benchmarks"][:2])
    for block in render(run, default).split("\n\n"):
        lines = block.splitlines()
        assert max(map(len, lines)) <= 120
        if lines[0].startswith("|"):
            assert len({len(line) for line in lines}) == 1


def test_missing_backends_are_named(run: dict[str, Any]) -> None:
    assert "not run: backend cuda: no CUDA here" in render(run)


def test_command_line(run: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(run))
    assert main([str(path), "--default-allocator", str(path)]) == 0
    assert "**stem, forward, batch 8**" in capsys.readouterr().out
    assert main([str(tmp_path / "absent.json")]) == 1
    assert "absent.json" in capsys.readouterr().err
    path.write_text("{}")
    assert main([str(path)]) == 1
    assert "expected the JSON of" in capsys.readouterr().err


def test_the_summary_as_a_picture(run: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, picture = tmp_path / "run.json", tmp_path / "costs.png"
    path.write_text(json.dumps(run))
    assert main([str(path), "--figure", str(picture)]) == 1  # it has none of this package's compiled stems
    assert "expected a run with rows of this package's stems" in capsys.readouterr().err
    assert not picture.exists()
    rows = [
        _row("stem", "forward", 8, "AaPE, cpu", 0.010, 0.8, False),
        _row("stem", "forward + backward", 1, "AaPE, cpu", 0.010, 1.1, False),
    ]
    path.write_text(json.dumps(run | {"benchmarks": rows}))
    assert main([str(path), "--figure", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "--default-allocator" in capsys.readouterr().out


def test_percentiles() -> None:
    assert spread([float(i) for i in range(11)]) == {"p20": 2.0, "median": 5.0, "p80": 8.0}
    assert spread([3.0, 1.0]) == pytest.approx({"p20": 1.4, "median": 2.0, "p80": 2.6})
    assert spread([4.0]) == {"p20": 4.0, "median": 4.0, "p80": 4.0}


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")
def test_restart_happens_once() -> None:
    pinned = allocator_environment("pinned", {"PATH": "x"})
    assert pinned == {"PATH": "x", **PINNED}
    assert allocator_environment("pinned", pinned) is None
    default = allocator_environment("default", pinned)
    assert default == {"PATH": "x"}
    assert allocator_environment("default", default) is None
    assert allocator(pinned).startswith("pinned")
    assert allocator(default).startswith("default")


def test_cpu_is_named() -> None:
    assert cpu_model()
