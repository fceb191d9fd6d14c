"""`aape-ssl demo` from the command line's end: its table, its pictures, its exit status and what it imports."""

import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
from matplotlib import image

from aape_kernels import AaPE
from aape_kernels.backends import Call, cpu, reasons
from aape_ssl.cli import main
from aape_ssl.demo import command as demo
from aape_ssl.demo import picture
from aape_ssl.sound import audio


@pytest.fixture
def quick(monkeypatch):
    """Time as little as the demo ever does, and draw small."""
    monkeypatch.setattr(demo, "BUDGET", 0.0)
    monkeypatch.setattr(picture, "DPI", 40)


@pytest.fixture
def noise(tmp_path):
    """A writer of short noise clips."""

    def write(name: str, seconds: float = 0.4, rate: int = 16000, channels: int = 1):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        samples = 0.1 * np.random.default_rng(0).standard_normal((int(seconds * rate), channels))
        soundfile.write(path, samples, rate)
        return path

    return write


def rows(out: str) -> dict[str, list[str]]:
    """The table's rows by clip name (which must hold no space)."""
    lines = out.splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith("clip "))
    table = {}
    for line in lines[start + 1 :]:
        if not line:
            break
        name, *cells = line.split()
        table[name] = cells
    return table


def test_bundled_clips(tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    assert main(["demo", "--out", str(out)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    clips = demo.bundled_clips()
    assert len(clips) >= 5
    assert sum(clip.stat().st_size for clip in clips) < 600_000
    table = rows(captured.out)
    assert list(table) == [clip.stem for clip in clips]
    available = reasons(Call("embed", torch.device("cpu"), torch.float32))
    for name, why in available.items():
        assert (f"AaPE {name}" in captured.out) == (why is None)
        assert (f"not run: {name} ({why})" in captured.out) == (why is not None)
    columns = 2 + sum(why is None for why in available.values()) + 1 + 2  # seconds, tokens, speeds, Conv2d, "x %"
    assert all(len(cells) == columns for cells in table.values())

    shares = []
    for clip in clips:
        seconds, tokens, *speeds = (float(cell.replace(",", "")) for cell in table[clip.stem][:-1])
        waveform = audio.load(clip)
        assert seconds == pytest.approx(len(waveform) / 16000, abs=0.01)
        log_mel = audio.AUDIOSET128.log_mel(waveform)
        assert tokens == 8 * (log_mel.shape[1] // 16)
        assert min(speeds[:-1]) > 0
        assert speeds[-1] == pytest.approx(100 * audio.modulation_share(log_mel, 16), abs=0.06)
        shares.append(speeds[-1])
        pixels = image.imread(out / f"{clip.stem}.png")
        width = picture.width_inches(log_mel.shape[1] // 16)
        assert pixels.shape[:2] == (round(picture.HEIGHT * picture.DPI), round(width * picture.DPI))
        assert pixels.std() > 0.05  # something is drawn
    assert min(shares) < 20  # the clips span the range
    assert max(shares) > 90


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_own_files(noise, tmp_path, capsys, quick, suffix):
    path = noise(f"mine.{suffix}", seconds=1.0, rate=44100, channels=2)
    assert main(["demo", str(path), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "mine.png").exists()
    assert int(rows(capsys.readouterr().out)["mine"][1]) == 8 * 6


def test_a_longer_clip_says_how_much_was_analysed(noise, tmp_path, capsys, quick):
    path = noise("long.wav", seconds=2.0)
    assert main(["demo", str(path), "--seconds", "0.5", "--out", str(tmp_path)]) == 0
    assert rows(capsys.readouterr().out)["long"][:4] == ["0.5", "of", "2.0", "24"]


def test_bad_files_do_not_stop_the_others(noise, tmp_path, capsys, quick):
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "broken.flac").write_bytes(b"fLaC" + bytes(range(256)) * 4)
    soundfile.write(tmp_path / "silent.wav", np.zeros(8000), 16000)
    soundfile.write(tmp_path / "steady.wav", np.full(8000, 0.3), 16000)  # no sound either
    reasons = {
        tmp_path / "missing.wav": "no such file",
        tmp_path / "empty.wav": "empty",
        tmp_path / "broken.flac": "cannot be read",
        noise("short.wav", seconds=0.174): "too short: expected 0.175 s",
        tmp_path / "silent.wav": "silent",
        tmp_path / "steady.wav": "silent",
    }
    good = [noise("first.wav"), noise("last.wav", seconds=0.175)]
    out = tmp_path / "out"
    assert main(["demo", str(good[0]), *map(str, reasons), str(good[1]), "--out", str(out)]) == 1
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == len(reasons)
    for line, (path, reason) in zip(lines, reasons.items(), strict=True):
        assert str(path) in line
        assert reason in line
    assert sorted(path.name for path in out.iterdir()) == ["first.png", "last.png"]
    assert list(rows(captured.out)) == ["first", "last"]


def test_only_bad_files_leave_nothing_behind(noise, tmp_path, capsys):
    files = [tmp_path / "missing.wav", tmp_path / "text.wav", noise("short.wav", seconds=0.1)]
    files[1].write_text("no sound")
    out = tmp_path / "out"
    assert main(["demo", *map(str, files), "--out", str(out)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert [line.split(": ")[1] for line in captured.err.splitlines()] == [str(file) for file in files]
    assert not out.exists()


def test_half_silent_clip_has_a_finite_picture(tmp_path, capsys, quick):
    samples = 0.1 * np.random.default_rng(0).standard_normal(16000)
    samples[:8000] = 0
    soundfile.write(tmp_path / "half.wav", samples, 16000)
    assert main(["demo", str(tmp_path / "half.wav"), "--out", str(tmp_path)]) == 0
    assert "nan" not in capsys.readouterr().out
    assert np.isfinite(image.imread(tmp_path / "half.png")).all()


def test_equal_stems_keep_their_pictures(noise, tmp_path, capsys, quick):
    files = [noise("clip.wav"), noise("clip.flac", seconds=0.6), noise("CLIP.ogg"), noise("clip-2.wav")]
    assert main(["demo", *map(str, files), "--out", str(tmp_path / "out")]) == 0
    table = rows(capsys.readouterr().out)
    assert list(table) == ["clip", "clip-2", "CLIP-3", "clip-2-2"]
    assert table["clip-2"][1] == "24"
    assert {path.stem for path in (tmp_path / "out").iterdir()} == set(table)


def test_pages_keep_their_pictures_too(noise, tmp_path, capsys, quick, monkeypatch):
    """Whether the clip of two pages comes first or last; names that no page has stay as they are."""
    monkeypatch.setattr(picture, "PATCHES", 3)
    files = [noise("X.wav", seconds=0.8), noise("x-page2.wav"), noise("x-pages.wav"), noise("y-page2.wav")]
    for order, first in ((files, "X"), (files[::-1], "X-2")):
        out = tmp_path / first
        assert main(["demo", *map(str, order), "--out", str(out)]) == 0
        table = rows(capsys.readouterr().out)
        assert {first, "x-pages", "y-page2"} < table.keys()
        assert {path.stem for path in out.iterdir()} == {*table, f"{first}-page2"}
        assert len(table) == 4


def test_odd_names(noise, tmp_path, recwarn, quick):
    names = ["$x^$ is no formula.wav", "雨.wav", "a" * 200 + ".wav"]
    assert main(["demo", *(str(noise(name)) for name in names), "--out", str(tmp_path / "out")]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {name.replace(".wav", ".png") for name in names}
    assert not recwarn.list


def test_out_that_cannot_be_written(noise, tmp_path, capsys, quick):
    clip = noise("clip.wav")
    assert main(["demo", str(clip), "--out", str(clip)]) == 2
    assert capsys.readouterr().err.startswith(f"aape-ssl: --out {clip}: cannot be written")
    (tmp_path / "out" / "clip.png").mkdir(parents=True)
    assert main(["demo", str(clip), "--out", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert "clip.png: cannot be written" in captured.err
    assert captured.out == ""


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "ten"])
def test_bad_seconds(capsys, seconds):
    with pytest.raises(SystemExit) as caught:
        main(["demo", f"--seconds={seconds}"])
    assert caught.value.code == 2
    assert "positive number of seconds" in capsys.readouterr().err


ENVIRONMENTS = {
    "unknown backend": {"AAPE_BACKEND": "cudda"},
    "backend without kernels": {"AAPE_BACKEND": "cuda"},
    "instruction set": {"AAPE_CPU_ISA": "foo"},
    # the table has a column for the CPU backend whatever "auto" stands for
    "instruction set, backend named": {"AAPE_CPU_ISA": "foo", "AAPE_BACKEND": "reference"},
}


@pytest.mark.parametrize("variables", ENVIRONMENTS.values(), ids=ENVIRONMENTS.keys())
def test_environment_that_cannot_run(noise, monkeypatch, tmp_path, capsys, variables):
    if "AAPE_CPU_ISA" in variables and not cpu.NATIVE_BUILT:
        pytest.skip("AAPE_CPU_ISA is read by the native module, which was not built")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main(["demo", str(noise("clip.wav")), "--out", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"aape-ssl: {next(iter(variables))}: ")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert not (tmp_path / "out").exists()


def test_timing_leaves_the_stem_as_it_was(quick):
    stem = AaPE(embed_dim=16)
    rates = demo.tokens_per_second(stem, torch.randn(1, 1, 128, 64), ["reference"])
    assert len(rates) == 2
    assert min(rates) > 0
    assert stem.backend == "auto"


def test_demo_with_a_checkpoint(noise, tmp_path, capsys, quick):
    stem = AaPE(embed_dim=24, num_states=6)
    torch.save({"patch_embed." + name: value for name, value in stem.state_dict().items()}, tmp_path / "my.pt")
    clip = noise("clip.wav")
    assert main(["demo", str(clip), "--checkpoint", str(tmp_path / "my.pt"), "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "stem: my.pt (patch_embed)" in out
    assert "defaults" in out
    assert "untrained" not in out
    assert (tmp_path / "clip.png").exists()


def test_bad_checkpoint_is_one_line(tmp_path, capsys):
    path = tmp_path / "bad.pt"
    path.write_text("hello")
    assert main(["demo", "--checkpoint", str(path), "--out", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"aape-ssl: --checkpoint {path}: the checkpoint cannot be read")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert not (tmp_path / "out").exists()


# --- what is imported ---


def _modules_after(code: str) -> tuple[set[str], str]:
    script = f"import sys\ntry:\n    {code}\nexcept SystemExit:\n    pass\nprint('MODULES', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    out, _, modules = done.stdout.rpartition("MODULES ")
    return {name.partition(".")[0] for name in modules.split()}, out


@pytest.mark.parametrize("arguments", [["--help"], ["demo", "--help"]])
def test_help_imports_nothing_heavy(arguments):
    modules, out = _modules_after(f"from aape_ssl.cli import main; main({arguments})")
    assert "usage: aape-ssl" in out
    assert "aape_ssl" in modules
    assert not modules & {"torch", "numpy", "matplotlib", "torchaudio", "soundfile", "aape_kernels"}


def test_demo_does_not_import_lightning_or_pyplot(noise, tmp_path):
    clip = noise("clip.wav")
    code = f"from aape_ssl.cli import main; main(['demo', {str(clip)!r}, '--out', {str(tmp_path)!r}])"
    modules, out = _modules_after(f"{code}; print('PYPLOT', 'matplotlib.pyplot' in sys.modules)")
    assert "clip" in rows(out)
    assert "PYPLOT False" in out
    assert {"torch", "torchaudio", "matplotlib"} <= modules
    assert not modules & {"lightning", "pytorch_lightning", "jsonargparse", "timm", "transformers"}


def test_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "soxr", None)  # as if it were not installed
    assert main(["demo"]) == 2
    assert capsys.readouterr().err == (
        'aape-ssl: the demo needs soxr: pip install ".[demo]" in a clone of the repository\n'
    )
