"""`aape-ssl pretrain` on real clips and bad ones, without clips, on a full disk, and from a damaged checkpoint."""

import errno
import shutil
from pathlib import Path

import cli_case
import numpy as np
import pytest
import soundfile
import torch
from ssl_case import assert_same_bits, last_checkpoint

from aape_ssl.demo import command as demo


def last_line(capsys) -> str:
    """What a run that failed said: one line of its own at the end, and no traceback."""
    error = capsys.readouterr().err
    own = [line for line in error.splitlines() if line.startswith("aape-ssl: ")]
    assert own == error.splitlines()[-1:]
    assert "Traceback" not in error
    return own[0]


@pytest.fixture
def spoilt(clips, tmp_path) -> Path:
    """The clips, five files that cannot be used, and an odd one that can."""
    folder = tmp_path / "spoilt"
    shutil.copytree(clips, folder)
    content = demo.bundled_clips()[0].read_bytes()
    (folder / "cut.flac").write_bytes(content[: len(content) // 10])
    (folder / "text.wav").write_text("not a sound\n")
    soundfile.write(folder / "empty.wav", np.zeros(0), 16_000)
    soundfile.write(folder / "nan.wav", np.full(8_000, np.nan), 16_000, subtype="FLOAT")
    soundfile.write(folder / "short.wav", np.full(20, 0.1), 16_000)  # less than one frame
    soundfile.write(folder / "silent.wav", np.zeros(8_000), 16_000)
    return folder


# --- clips ---


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_files_are_skipped_and_listed(spoilt, tmp_path, capsys, workers):
    """Three epochs: they meet every file."""
    assert cli_case.pretrain(spoilt, tmp_path / "run", data__max_failed=0.3, data__workers=workers) == 0
    lines = capsys.readouterr().err.splitlines()
    start = lines.index("5 of 18 clips could not be decoded:")
    listed = dict(line.strip().split(": ", 1) for line in lines[start + 1 :])
    assert listed.pop("cut.flac").startswith("cannot be read as sound (")
    assert listed.pop("text.wav").startswith("cannot be read as sound (")
    assert listed == {
        "empty.wav": "holds no samples",
        "nan.wav": "holds samples that are not finite",
        "short.wav": "is too short: expected 0.025 s, one frame, got 0.00125 s",
    }
    checkpoint = last_checkpoint(tmp_path / "run")
    assert checkpoint["global_step"] == 12
    assert len(checkpoint["loader"]["failed"]) == 5
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())


def test_too_many_bad_files_stop_a_run_that_goes_on_once_they_are_mended(clips, tmp_path, capsys):
    folder, out = tmp_path / "clips", tmp_path / "run"
    shutil.copytree(clips, folder)
    spoil = f"[{{class_path: cli_case.SpoilAt, init_args: {{step: 6, folder: {folder}}}}}]"
    assert cli_case.pretrain(folder, out, data__max_failed=0.2, trainer__callbacks=spoil) == 2
    line = last_line(capsys)
    assert "of 12 clips could not be decoded, more than the 2 that max_failed allows:" in line
    assert ".wav: is empty (0 bytes)" in line
    assert line.endswith(f"; the last good checkpoint is {out / 'last.ckpt'}")
    assert last_checkpoint(out)["global_step"] == 5

    shutil.copytree(clips, folder, dirs_exist_ok=True)
    assert cli_case.pretrain(folder, out, data__max_failed=0.2, resume="true") == 0
    assert cli_case.pretrain(clips, tmp_path / "whole", data__max_failed=0.2) == 0
    assert_same_bits(last_checkpoint(out), last_checkpoint(tmp_path / "whole"))


def test_nothing_can_be_decoded(tmp_path, capsys):
    """Whatever share may fail."""
    folder = tmp_path / "clips"
    folder.mkdir()
    for n in range(4):
        (folder / f"{n}.wav").write_text("not a sound\n")
    for share, allowed in ((0.05, 0), (1, 3)):
        assert cli_case.pretrain(folder, tmp_path / "run", data__max_failed=share) == 2
        assert f"4 clips could not be decoded, more than the {allowed} that max_failed allows" in last_line(capsys)


def test_a_manifest_names_a_missing_file(clips, tmp_path, capsys):
    manifest = tmp_path / "clips.csv"
    manifest.write_text("\n".join(["file", *map(str, sorted(clips.iterdir())), "gone.wav"]))
    assert cli_case.pretrain(manifest, tmp_path / "run", data__max_failed=0.1) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[-2:] == ["1 of 13 clips could not be decoded:", "  gone.wav: no such file"]
    assert cli_case.pretrain(manifest, tmp_path / "strict", data__max_failed=0) == 2
    assert "max_failed allows: gone.wav: no such file" in last_line(capsys)


@pytest.mark.parametrize(("there", "why"), [(True, "holds no clips"), (False, "there is no such file or folder")])
def test_no_clips(tmp_path, capsys, there, why):
    folder = tmp_path / "clips"
    if there:
        folder.mkdir()
        (folder / "notes.txt").write_text("no sound here\n")
    assert cli_case.pretrain(folder, tmp_path / "run") == 2
    line = last_line(capsys)
    assert line.startswith(f"aape-ssl: {folder}: ")
    assert why in line


# --- checkpoints ---


def test_a_full_disk_leaves_the_checkpoint_before_it(clips, tmp_path, capsys):
    """The second checkpoint fills it."""
    out, save, written = tmp_path / "run", torch.save, []

    def filling(content, file):
        written.append(file)
        if len(written) == 2:
            file.write(b"PK\x03\x04 half a checkpoint")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(content, file)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aape_ssl.saved.checkpoints.torch.save", filling)
        assert cli_case.pretrain(clips, out) == 2
    line = last_line(capsys)
    assert "last.ckpt: the checkpoint could not be written (OSError: [Errno 28] No space left on device)" in line
    assert line.endswith("; the one written before is kept, to resume from")
    assert list(out.glob("*.ckpt*")) == [out / "last.ckpt"]
    assert last_checkpoint(out)["global_step"] == 5
    assert cli_case.pretrain(clips, out, resume="true") == 0
    assert cli_case.pretrain(clips, tmp_path / "whole") == 0
    assert_same_bits(last_checkpoint(out), last_checkpoint(tmp_path / "whole"))


def test_a_checkpoint_that_cannot_be_read_is_left_as_it_is(clips, tmp_path, capsys, monkeypatch):
    """Cut short, or of another user, whose permissions root would not be held up by."""
    out, path = tmp_path / "run", tmp_path / "run" / "last.ckpt"
    assert cli_case.pretrain(clips, out, trainer__max_steps=5) == 0
    content = path.read_bytes()[:-1000]
    path.write_bytes(content)
    assert cli_case.pretrain(clips, out, resume="true") == 2
    assert f"aape-ssl: {path}: the checkpoint cannot be read (" in last_line(capsys)

    def forbidden(file, **_):
        raise PermissionError(errno.EACCES, "Permission denied", str(file))

    monkeypatch.setattr("aape_ssl.saved.checkpoints.torch.load", forbidden)
    assert cli_case.pretrain(clips, out, resume="true") == 2
    assert "the checkpoint cannot be read (PermissionError: [Errno 13] Permission denied: " in last_line(capsys)
    assert path.read_bytes() == content


def test_a_checkpoint_of_something_else_is_refused(clips, tmp_path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    torch.save({"state_dict": {}}, out / "last.ckpt")
    assert cli_case.pretrain(clips, out, resume="true") == 2
    assert "expected a checkpoint to resume from, it lacks pytorch-lightning_version, optimizer_states" in last_line(
        capsys
    )
    assert cli_case.pretrain(clips, tmp_path / "other", trainer__max_steps=2) == 0
    checkpoint = torch.load(tmp_path / "other" / "last.ckpt", weights_only=True)
    checkpoint["state_dict"].popitem()
    torch.save(checkpoint, out / "last.ckpt")
    assert cli_case.pretrain(clips, out, trainer__max_steps=2, resume="true") == 2
    assert "--resume: the checkpoint is of another model: Error(s) in loading state_dict" in last_line(capsys)


def test_resuming_as_another_run(clips, tmp_path, capsys):
    """What makes another run is refused; what may be changed on purpose is said."""
    out, same = tmp_path / "run", {"resume": "true", "trainer__max_steps": 5}
    assert cli_case.pretrain(clips, out, trainer__max_steps=5) == 0
    before = (out / "last.ckpt").read_bytes()
    assert cli_case.pretrain(clips, out, **same, data__mix=0.1) == 2
    assert "mix: the checkpoint was made with 0.3, this run has 0.1" in last_line(capsys)
    assert cli_case.pretrain(clips, out, **same, data__frames=16) == 2
    assert "frames: the checkpoint was made with 32, this run has 16" in last_line(capsys)
    assert (out / "last.ckpt").read_bytes() == before
    with pytest.warns(UserWarning, match="max_steps: the checkpoint was made with 5, this run has 6"):
        assert cli_case.pretrain(clips, out, **same | {"trainer__max_steps": 6}) == 0


def test_statistics_of_clips_that_cannot_be_decoded(tmp_path, capsys):
    (tmp_path / "bad.wav").write_text("not a sound\n")
    assert cli_case.pretrain(tmp_path, tmp_path / "run", data__statistics="data") == 2
    assert "none of 1 clips could be decoded: bad.wav: cannot be read as sound" in last_line(capsys)
