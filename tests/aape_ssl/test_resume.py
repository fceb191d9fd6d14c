"""`aape-ssl pretrain` on real clips, killed and resumed: the same bits as never interrupted, with any workers."""

import csv
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import cli_case
import pytest
import torch
from ssl_case import assert_same_bits, last_checkpoint


def logged(out: Path, version: int) -> dict[int, dict[str, str]]:
    """Rows of one run's CSV log by their step."""
    with open(out / "csv" / f"version_{version}" / "metrics.csv", newline="") as file:
        return {int(row["step"]): row for row in csv.DictReader(file)}


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.exhaustive), 2])
def test_killed_and_resumed_is_never_interrupted(clips, tmp_path, accumulate):
    """Three batches an epoch: a checkpoint after the second of them, killed some steps later in another epoch."""
    options = {"trainer__accumulate_grad_batches": accumulate, "data__statistics": "data"}
    # from step 6 to the end it sleeps for 0.3 s at least
    seconds = random.Random(torch.initial_seed()).uniform(0, 0.25)
    deaths = {
        0: "[{class_path: cli_case.DieInStep, init_args: {step: 8}}]",
        2: f"[{{class_path: cli_case.DieByTheClock, init_args: {{step: 6, seconds: {seconds}}}}}]",
    }
    killed = {
        workers: cli_case.start(
            clips, tmp_path / str(workers), data__workers=workers, trainer__callbacks=death, **options
        )
        for workers, death in deaths.items()
    }
    assert cli_case.pretrain(clips, tmp_path / "whole", **options) == 0
    whole, rows = last_checkpoint(tmp_path / "whole"), logged(tmp_path / "whole", 0)
    assert whole["global_step"] == len(rows) == 12

    for workers, process in killed.items():
        out = tmp_path / str(workers)
        assert process.wait() == -signal.SIGKILL, cli_case.said(out).read_text()
        before = last_checkpoint(out)
        assert before["global_step"] in ([5] if workers == 0 else [5, 10]), seconds
        assert before["loader"]["given"] == 2

        assert cli_case.pretrain(clips, out, data__workers=workers, resume="true", **options) == 0
        assert_same_bits(last_checkpoint(out), whole)
        first, second = logged(out, 0), logged(out, 1)
        assert min(second) == before["global_step"]
        assert {**first, **second}.keys() == rows.keys()
        for step, row in [*first.items(), *second.items()]:
            assert row == rows[step]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_a_checkpoint(number, clips, tmp_path):
    out = tmp_path / "cut"
    run = cli_case.fork(clips, out, trainer__max_steps=10_000, checkpoint_every=5)
    deadline = time.monotonic() + 120
    while not (out / "last.ckpt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(run.pid, number)
    run.join(60)
    assert run.exitcode == 128 + number
    words = cli_case.said(out).read_text()
    step = torch.load(out / "last.ckpt", weights_only=True)["global_step"]
    assert f"stopped at optimiser step {step}; {out / 'last.ckpt'} is written" in words
    assert "Traceback" not in words
    assert len([line for line in words.splitlines() if line.startswith("aape-ssl:")]) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_the_first_step_ends_it_and_leaves_nothing(number, clips, tmp_path, capfd):
    before = signal.getsignal(number)
    callback = f"[{{class_path: cli_case.SignalBeforeTheStart, init_args: {{number: {int(number)}}}}}]"
    with pytest.raises(SystemExit) as end:
        cli_case.pretrain(clips, tmp_path / "run", trainer__callbacks=callback)
    assert end.value.code == 128 + number
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("aape-ssl")]
    assert said == [f"aape-ssl: {number.name}: ended before the first step"]
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(number) is before


def test_an_interrupt_while_libraries_are_imported_says_one_line():
    code = (
        "import signal, os, aape_ssl.cli as cli\n"
        "cli._ssl = lambda *given: os.kill(os.getpid(), signal.SIGINT)\n"
        "print(cli.main(['probe']))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.stdout, run.stderr) == ("130\n", "aape-ssl: interrupted\n")
