"""`aape-ssl demo` from the command line's end, and what its stems find in sound whose modulation is known."""

import math
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
from matplotlib import image

from aape_kernels import AaPE, sblu
from aape_kernels.backends import Call, reasons
from aape_ssl import audio, demo, picture, stems
from aape_ssl.cli import main

HOP = audio.AUDIOSET128.hop
SPACING = (50 - 3.125) / 32  # Hz between the untrained stem's states


def modulated_noise(hz: float, depth: float = 0.8, seconds: float = 2.0) -> torch.Tensor:
    t = torch.arange(int(seconds * audio.SAMPLE_RATE)) / audio.SAMPLE_RATE
    return 0.1 * torch.randn(len(t)) * (1 + depth * torch.sin(2 * math.pi * (hz * t + torch.rand(1))))


def untrained_responses(waveform: torch.Tensor) -> stems.Responses:
    stem = stems.untrained_stem()
    x = demo.Viewer(stem, "", trained=False).prepare(audio.AUDIOSET128.log_mel(waveform))
    return stems.respond(stem, x, HOP)


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


# --- what the stems find ---


@pytest.mark.parametrize("hz", [5, 25])
@pytest.mark.parametrize("depth", [0.5, 0.8])
def test_modulation_rates_are_told_apart(hz, depth):
    for _ in range(5):
        found = stems.strongest_frequency(untrained_responses(modulated_noise(hz, depth)))
        assert abs(found - hz) < SPACING


def test_slow_modulation_does_not_hide_fast_modulation():
    """Level changes of 30 dB at 1 Hz, below the band, leave 25 Hz the strongest."""
    waveform = modulated_noise(25)
    t = torch.arange(len(waveform)) / audio.SAMPLE_RATE
    found = stems.strongest_frequency(untrained_responses(waveform * 10 ** (0.75 * torch.sin(2 * math.pi * t))))
    assert abs(found - 25) < SPACING


def test_untrained_stem_is_a_fixed_bank():
    """Every patch has the same states, evenly over the alias-prone band, whatever the input; and it is seeded."""
    responses = untrained_responses(modulated_noise(8))
    assert (responses.hz == responses.hz[0, 0]).all()
    assert (responses.decay == responses.decay[0, 0]).all()
    expected = 3.125 + SPACING * (torch.arange(32) + 0.5)
    torch.testing.assert_close(responses.hz[0, 0], expected, atol=1e-3, rtol=0)
    assert all(
        torch.equal(*pair) for pair in zip(*(stems.untrained_stem().parameters() for _ in range(2)), strict=True)
    )


def test_untrained_stem_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    stems.untrained_stem()
    assert torch.equal(before, torch.get_rng_state())


def test_strongest_frequency_follows_a_moving_state():
    """State 1 has the most energy, 3 at 10 Hz and 1 at 20 Hz: 12.5 Hz."""
    energy = torch.tensor([[[2.0, 3.0], [0.0, 1.0]]])
    hz = torch.tensor([[[40.0, 10.0], [40.0, 20.0]]])
    assert stems.strongest_frequency(stems.Responses(energy, hz, torch.ones_like(hz))) == pytest.approx(12.5)
    silent = stems.Responses(torch.zeros_like(energy), hz, torch.ones_like(hz))
    assert math.isfinite(stems.strongest_frequency(silent))


@pytest.mark.parametrize("kernel", ["quadrature", "bilateral"])
@pytest.mark.parametrize("window", [16, 7])
def test_kernels_are_what_sblu_applies(kernel, window):
    """Their product with any input is sblu's response to it."""
    decay, frequency = torch.rand(3) + 0.05, 3 * torch.rand(3)
    h = stems.kernels(decay, frequency, window, kernel)
    x = torch.randn(1, 1, 1, window)
    every = (1, 1, 1, 3)
    y = sblu(x, decay.expand(every), frequency.expand(every), torch.ones(3, 1, 1), (1, window), kernel=kernel)
    torch.testing.assert_close(y[0, 0, 0], torch.einsum("spk,k->ps", h, x.flatten()))
    even, odd = (1, -1 if kernel == "quadrature" else 1)
    torch.testing.assert_close(h[:, 0], even * h[:, 0].flip(-1))
    torch.testing.assert_close(h[:, 1], odd * h[:, 1].flip(-1))


def test_distinct_states_are_a_half_width_apart():
    responses = untrained_responses(modulated_noise(20))
    states = picture.distinct_states(responses)
    assert 1 <= len(states) <= 4
    hz, width = responses.hz[0, 0, states], float(responses.decay[0, 0, 0]) / (2 * math.pi)
    assert hz[0] == responses.hz[0, 0, int(responses.energy.sum((0, 1)).argmax())]
    assert (hz[:, None] - hz).abs()[~torch.eye(len(hz), dtype=torch.bool)].min() >= width


# --- the command on its clips ---


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
    assert main(["demo", str(clip), "--out", str(tmp_path / "out")]) == 1
    captured = capsys.readouterr()
    assert "clip.png: cannot be written" in captured.err
    assert "pictures:" not in captured.out


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "ten"])
def test_bad_seconds(capsys, seconds):
    with pytest.raises(SystemExit) as caught:
        main(["demo", f"--seconds={seconds}"])
    assert caught.value.code == 2
    assert "positive number of seconds" in capsys.readouterr().err


def test_backend_from_the_environment_that_cannot_run(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("AAPE_BACKEND", "cudda")
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "AAPE_BACKEND" in capsys.readouterr().err


def test_timing_leaves_the_stem_as_it_was(quick):
    stem = AaPE(embed_dim=16)
    rates = demo.tokens_per_second(stem, torch.randn(1, 1, 128, 64), ["reference"])
    assert len(rates) == 2
    assert min(rates) > 0
    assert stem.backend == "auto"


# --- checkpoints ---


def trained(**options) -> AaPE:
    """A stem that looks trained: its encoder moves every state from patch to patch."""
    stem = AaPE(**options)
    with torch.no_grad():
        stem.encoder.w2.mul_(40)
    return stem


SIZES = [
    {},
    {"num_states": 5, "encoder_dim": 7, "embed_dim": 24, "bias": False},
    {"patch_size": (8, 12), "embed_dim": 24},
]


@pytest.mark.parametrize("options", SIZES)
@pytest.mark.parametrize("prefix", ["", "patch_embed.", "student.encoder.patch_embed."])
def test_checkpoint_round_trip(tmp_path, options, prefix):
    stem = trained(**options)
    state = {"head.weight": torch.zeros(2, 2), **{prefix + name: value for name, value in stem.state_dict().items()}}
    torch.save({"epoch": 3, "state_dict": state} if prefix else stem.state_dict(), tmp_path / "stem.pt")
    loaded, found = stems.load_stem(tmp_path / "stem.pt")
    assert found == prefix
    x = torch.randn(1, 1, 128, 96)
    assert torch.equal(loaded(x), stem(x))


def test_checkpoint_of_time_first_layout(tmp_path):
    stem = trained(patch_size=(12, 8), embed_dim=24, layout="TF")
    torch.save(stem.state_dict(), tmp_path / "stem.pt")
    loaded, _ = stems.load_stem(tmp_path / "stem.pt")
    x = torch.randn(1, 1, 96, 128)
    time_major = stem(x).view(1, 8, 16, 24)
    torch.testing.assert_close(loaded(x.mT).view(1, 16, 8, 24), time_major.transpose(1, 2))


def test_checkpoint_in_half_precision(tmp_path):
    stem = trained(embed_dim=24).bfloat16()
    torch.save(stem.state_dict(), tmp_path / "stem.pt")
    loaded, _ = stems.load_stem(tmp_path / "stem.pt")
    assert loaded.proj.weight.dtype == torch.float32
    assert torch.equal(loaded.proj.weight, stem.proj.weight.float())


def test_safetensors_checkpoint(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    stem = trained(embed_dim=24)
    safetensors.save_file(stem.state_dict(), tmp_path / "stem.safetensors")
    assert torch.equal(stems.load_stem(tmp_path / "stem.safetensors")[0].proj.weight, stem.proj.weight)


def test_demo_with_a_checkpoint(noise, tmp_path, capsys, quick):
    stem = trained(embed_dim=24, num_states=6)
    torch.save({"patch_embed." + name: value for name, value in stem.state_dict().items()}, tmp_path / "my.pt")
    clip = noise("clip.wav")
    assert main(["demo", str(clip), "--checkpoint", str(tmp_path / "my.pt"), "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "stem: my.pt (patch_embed)" in out
    assert "defaults" in out
    assert "untrained" not in out
    assert (tmp_path / "clip.png").exists()


def test_a_trained_stem_sees_normalised_input(tmp_path):
    stem = trained(embed_dim=24)
    log_mel = audio.AUDIOSET128.log_mel(modulated_noise(8))
    assert torch.equal(demo.Viewer(stem, "", True).prepare(log_mel), (log_mel + 4.268) / (2 * 4.569))


def _without(name: str) -> dict[str, torch.Tensor]:
    return {key: value for key, value in AaPE(embed_dim=8).state_dict().items() if key != name}


BAD_CHECKPOINTS = {
    "missing": (None, "no such file"),
    "garbage": (b"no checkpoint", "cannot be read|is no state dict"),
    "a list": ([torch.zeros(2)], "holds a list"),
    "another model": ({"conv.weight": torch.zeros(3)}, "holds no AaPE stem"),
    "a part missing": (_without("encoder.w2"), "lacks encoder.w2"),
    "two channels": (AaPE(in_chans=2, embed_dim=8).state_dict(), "2 input channels"),
    "unequal sizes": ({**AaPE(embed_dim=8).state_dict(), "encoder.b2": torch.zeros(3)}, "do not fit"),
    "wrong rank": ({**AaPE(embed_dim=8).state_dict(), "encoder.w1": torch.zeros(3)}, "do not fit"),
    "not finite": ({**_without("x"), "encoder.b2": torch.full((64,), math.nan)}, "not finite"),
    "code": (AaPE(embed_dim=8), "is no state dict"),
}


@pytest.mark.parametrize("case", BAD_CHECKPOINTS)
def test_bad_checkpoint(tmp_path, capsys, case):
    content, reason = BAD_CHECKPOINTS[case]
    path = tmp_path / "bad.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(stems.CheckpointError, match=reason):
        stems.load_stem(path)
    assert main(["demo", "--checkpoint", str(path), "--out", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"aape-ssl: --checkpoint {path}: ")
    assert captured.err.count("\n") == 1
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
    assert capsys.readouterr().err == 'aape-ssl: the demo needs soxr: pip install "aape-kernels[demo]"\n'
