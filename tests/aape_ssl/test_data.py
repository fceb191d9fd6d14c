"""ClipData under Lightning's Trainer: the same batches whether interrupted or not, statistics, bad files listed."""

import math
import shutil
from dataclasses import replace

import pytest
import torch

from aape_ssl._lightning import LightningModule, Trainer
from aape_ssl.demo import command as demo
from aape_ssl.sound import audio
from aape_ssl.sound.audio import AUDIOSET128, M2D80
from aape_ssl.sound.data import ClipData
from aape_ssl.sound.sources import SourceError

pytestmark = pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")  # Lightning's own

CLIPS = demo.bundled_clips()


@pytest.fixture
def folder(tmp_path):
    """The bundled clips, twice each."""
    folder = tmp_path / "clips"
    folder.mkdir()
    for path in CLIPS:
        for copy in "ab":
            shutil.copy(path, folder / f"{path.stem}-{copy}.flac")
    return folder


class Recorder(LightningModule):
    """Keeps what it was given, and a checkpoint a step; trains one number, so that Lightning has something to do."""

    def __init__(self, root):
        super().__init__()
        self.root = root
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.batches = []

    def training_step(self, batch):
        self.batches.append({name: value.clone() for name, value in batch.items()})
        return self.weight * batch["log_mel"].mean()

    def on_train_batch_end(self, *_):
        self.trainer.save_checkpoint(self.root / f"step={self.global_step}.ckpt")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(root, data, steps, resume=None, **options):
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=root,
        **options,
    )
    model = Recorder(root)
    trainer.fit(model, data, ckpt_path=resume, weights_only=True)
    return model


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_training_gets_the_same_batches(folder, tmp_path, workers):
    """3 batches an epoch: stopped in the middle of the second, at its end, and in the third."""
    options = {"batch_size": 4, "frames": 64, "mix": 0.3, "statistics": "data", "workers": workers}
    whole = fit(tmp_path / "whole", ClipData(str(folder), **options), 8)
    assert len(whole.batches) == 8
    for step in (4, 6, 7) if workers == 0 else (5,):
        checkpoint = tmp_path / "whole" / f"step={step}.ckpt"
        resumed = fit(
            tmp_path / f"from-{step}", ClipData(str(folder), **options | {"workers": 2 - workers}), 8, checkpoint
        )
        assert len(resumed.batches) == 8 - step
        for got, expected in zip(resumed.batches, whole.batches[step:], strict=True):
            assert torch.equal(got["index"], expected["index"])
            assert torch.equal(got["log_mel"], expected["log_mel"])
        assert torch.equal(resumed.weight, whole.weight)


@pytest.mark.parametrize("limit", [2, 0.7])
def test_resumed_after_an_epoch_that_a_limit_ended(folder, tmp_path, limit):
    """2 of 3 batches an epoch: where it was cut is its end, not its middle."""
    options = {"batch_size": 4, "frames": 64, "workers": 0}
    whole = fit(tmp_path / "whole", ClipData(str(folder), **options), 6, limit_train_batches=limit)
    for step in (2, 3, 4):
        checkpoint = tmp_path / "whole" / f"step={step}.ckpt"
        resumed = fit(tmp_path / "again", ClipData(str(folder), **options), 6, checkpoint, limit_train_batches=limit)
        got, expected = ([batch["index"].tolist() for batch in run.batches] for run in (resumed, whole))
        assert got == expected[step:]


def test_other_statistics_than_a_run_began_with_are_refused(folder):
    state = ClipData(str(folder), statistics=(-4.0, 4.0)).state_dict()
    for same in ("preset", "data", (-4, 4), [-4.0, 4.0]):
        data = ClipData(str(folder), statistics=same)
        data.load_state_dict(state)
        assert (data.front_end.mean, data.front_end.std) == (-4, 4)
    with pytest.raises(
        ValueError, match=r"statistics: the checkpoint was made with \(-4.0, 4.0\), this run has \(0.0, 1"
    ):
        ClipData(str(folder), statistics=(0.0, 1.0)).load_state_dict(state)


def test_another_set_is_not_resumed(folder, tmp_path):
    fit(tmp_path / "a", ClipData(str(folder), batch_size=4, workers=0, frames=64), 2)
    next(folder.iterdir()).unlink()
    with pytest.raises(ValueError, match=r"clips: the checkpoint was made with '12 clips .*', this run has '11 clips"):
        fit(tmp_path / "b", ClipData(str(folder), batch_size=4, workers=0, frames=64), 4, tmp_path / "a/step=2.ckpt")


def test_bad_files_are_listed_when_training_ends(folder, tmp_path, capsys):
    (folder / "misc_crow-b.flac").write_bytes(b"")
    data = ClipData(str(folder), batch_size=4, workers=2, frames=64, max_failed=0.1)
    assert len(fit(tmp_path / "run", data, 6).batches) == 6
    lines = capsys.readouterr().err.splitlines()
    assert lines[-2:] == ["1 of 12 clips could not be decoded:", "  misc_crow-b.flac: is empty (0 bytes)"]


@pytest.mark.parametrize("name", ["audioset128", "m2d80"])
def test_statistics(folder, name):
    preset, given, measured = (
        ClipData(str(folder), front_end=name, frames=64, statistics=statistics, batch_size=12, workers=0)
        for statistics in ("preset", (-3.0, 2.0), "data")
    )
    batches = {data: next(iter(data.train_dataloader()))["log_mel"] for data in (preset, given, measured)}
    expected = {"audioset128": AUDIOSET128, "m2d80": M2D80}[name]
    assert preset.front_end == expected
    assert given.front_end == replace(expected, mean=-3.0, std=2.0)
    raw = batches[preset] * expected.spread * expected.std + expected.mean
    torch.testing.assert_close(batches[given], (raw + 3) / (expected.spread * 2), atol=1e-4, rtol=0)
    every = torch.cat([expected.log_mel(audio.load(path)).flatten() for path in CLIPS])
    assert measured.front_end.mean == pytest.approx(float(every.mean()), abs=1.5)  # other crops of the same sound
    assert measured.front_end.std == pytest.approx(float(every.std()), rel=0.25)


def test_on_the_device(folder):
    in_workers, later = (
        ClipData(str(folder), frames=64, batch_size=4, workers=0, mix=0.3, resize_crop=0.7, on_device=on_device)
        for on_device in (False, True)
    )
    expected, batch = (next(iter(data.train_dataloader())) for data in (in_workers, later))
    assert "log_mel" not in batch
    got = later.on_after_batch_transfer(batch)
    assert got.keys() == expected.keys()
    torch.testing.assert_close(got["log_mel"], expected["log_mel"], atol=1e-4, rtol=0)
    assert in_workers.on_after_batch_transfer(expected) is expected


def test_bad_arguments(folder, tmp_path):
    with pytest.raises(ValueError, match="front_end: expected one of audioset128, m2d80, got 'mfcc'"):
        ClipData(str(folder), front_end="mfcc")
    for statistics in ("none", (0.0, 0.0), (1.0,), (math.nan, 1.0), (0.0, math.inf), (-math.inf, 1.0)):
        with pytest.raises(ValueError, match="statistics: expected"):
            ClipData(str(folder), statistics=statistics)
    for name in ("frames", "batch_size", "workers"):
        for value in (True, 2.5):
            with pytest.raises(ValueError, match=rf"{name}: expected an int, at least [01], got {value}"):
                ClipData(str(folder), **{name: value})
    with pytest.raises(ValueError, match="splits: expected names"):
        ClipData(str(folder), splits="train").setup()
    with pytest.raises(SourceError, match="no such file or folder"):
        ClipData(str(tmp_path / "missing")).setup()
