"""`aape-ssl pretrain` through its command line."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ssl_case
import torch
import yaml

from aape_ssl.cli import main
from aape_ssl.training import pretraining as training
from aape_ssl.training.commands import PRESETS

CONFIG = {
    "model": {
        "size": [16, 1, 2],
        "patch_size": 4,
        "predictor_depth": 1,
        "predictor_heads": 2,
        "masks": {"num_masks": 2, "kind": "random"},
        "warmup_steps": 2,
    },
    "data": {"class_path": "ssl_case.Tensors"},
    "trainer": {
        "max_steps": 8,
        "accelerator": "cpu",
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "accumulate_grad_batches": 2,
    },
    "checkpoint_every": 2,
    "monitor_every": 4,
}


@pytest.fixture
def config(tmp_path) -> str:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return str(path)


def pretrain(config: str, out: Path, *arguments: str) -> int:
    return main(["pretrain", "--config", config, "--out", str(out), *arguments])


def test_a_run_and_what_it_leaves(config, tmp_path, capsys):
    assert pretrain(config, tmp_path / "run") == 0
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if "/" in line)
    assert {"train/loss", "tokens/teacher_rankme", "stem/branch_ratio"} <= rows.keys()
    checkpoint = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 8
    assert checkpoint["options"]["masks"]["num_masks"] == 2
    assert (tmp_path / "run" / "csv" / "version_0" / "metrics.csv").read_text().count("\n") > 4
    assert list((tmp_path / "run" / "tensorboard" / "version_0").glob("events.*"))
    # its configuration makes the same run again
    again = tmp_path / "run" / "csv" / "version_0" / "config.yaml"
    assert pretrain(str(again), tmp_path / "again") == 0
    other = torch.load(tmp_path / "again" / "last.ckpt", weights_only=True)
    assert all(torch.equal(value, other["state_dict"][name]) for name, value in checkpoint["state_dict"].items())


@pytest.mark.slow
@pytest.mark.exhaustive  # CI has those of test_resume.py
def test_killed_and_resumed(config, tmp_path):
    """From the command line, at a moment that the clock chooses."""
    assert pretrain(config, tmp_path / "whole") == 0
    killed = tmp_path / "killed"
    code = f"""
import time, torch
from aape_ssl import cli
from aape_ssl.training import pretraining as training
step = training.PretrainingModule.training_step
training.PretrainingModule.training_step = lambda *given: (time.sleep(0.05), step(*given))[1]
torch.set_num_threads({torch.get_num_threads()})
cli.main(["pretrain", "--config", {config!r}, "--out", {str(killed)!r}])
"""
    paths = [str(Path(ssl_case.__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not (killed / "last.ckpt").exists():
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert torch.load(killed / "last.ckpt", weights_only=True)["global_step"] < 8
    assert pretrain(config, killed, "--resume=true") == 0
    got, expected = (torch.load(folder / "last.ckpt", weights_only=True) for folder in (killed, tmp_path / "whole"))
    assert got["global_step"] == expected["global_step"] == 8
    assert all(torch.equal(value, expected["state_dict"][name]) for name, value in got["state_dict"].items())


def test_a_run_is_not_written_over(config, tmp_path, capsys):
    (tmp_path / "last.ckpt").write_text("precious")
    assert pretrain(config, tmp_path) == 2
    assert "last.ckpt is there already; --resume=true goes on from it" in capsys.readouterr().err
    assert (tmp_path / "last.ckpt").read_text() == "precious"


def test_errors_are_one_line(config, tmp_path, capsys, monkeypatch):
    def last_line(*arguments: str) -> str:
        assert pretrain(config, tmp_path / "run", *arguments) == 2
        return capsys.readouterr().err.splitlines()[-1]

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last.ckpt").write_text("hello")
    assert "last.ckpt: the checkpoint cannot be read" in last_line("--resume=true")
    (tmp_path / "run" / "last.ckpt").unlink()
    assert last_line("--preset", "huge").startswith("aape-ssl: --preset: expected one of base, laptop, got 'huge'")
    assert last_line("--model.masks.ratio=1.5").endswith("got 1.5")

    finite = training.PretrainingModule.training_step

    def step(self, batch, batch_idx):
        x = batch["log_mel"] * float("nan") if self.global_step == 3 else batch["log_mel"]
        return finite(self, {**batch, "log_mel": x}, batch_idx)

    monkeypatch.setattr(training.PretrainingModule, "training_step", step)
    line = last_line()
    assert line.startswith("aape-ssl: optimiser step 3, micro-batch 0: loss nan")
    assert line.endswith(f"the last good checkpoint is {tmp_path / 'run' / 'last.ckpt'}")


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_whole(preset, capsys):
    """Every option of a preset is one of the model's, the data's or the trainer's, and arguments override it."""
    with pytest.raises(SystemExit) as done:
        main(["pretrain", "--preset", preset, "--data.data=sounds", "--model.lr=0.5", "--print_config"])
    assert done.value.code in (0, None)
    printed = yaml.safe_load(capsys.readouterr().out)
    written = yaml.safe_load(PRESETS[preset].read_text())
    assert printed["model"]["lr"] == 0.5
    assert printed["model"]["masks"]["kind"] == written["model"]["masks"]["kind"]
    assert printed["data"]["init_args"]["data"] == "sounds"
    assert printed["trainer"]["max_steps"] == written["trainer"]["max_steps"]


def test_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lightning", None)  # as if it were not installed
    assert main(["pretrain"]) == 2
    assert capsys.readouterr().err == (
        'aape-ssl: pretrain needs lightning: pip install ".[ssl]" in a clone of the repository\n'
    )
