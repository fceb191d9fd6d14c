"""The front end against its formulas, and the measures of modulation against analysis."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from aape_ssl.sound import audio
from aape_ssl.sound.audio import AUDIOSET128, FRONT_ENDS, M2D80, AudioError, measure

FRAME = 0.01  # s


def tone(hz: float, seconds: float, rate: int = audio.SAMPLE_RATE) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hz * np.arange(int(seconds * rate)) / rate)


def kaldi_by_hand(waveform: np.ndarray) -> np.ndarray:
    """Kaldi's HTK-compatible log-mel filter bank, 128 bins from 20 Hz to 8 kHz, in float64."""
    x = waveform - waveform.mean()
    frames = np.lib.stride_tricks.sliding_window_view(x, 400)[::160]
    frames = frames - frames.mean(1, keepdims=True)
    previous = np.concatenate([frames[:, :1], frames[:, :-1]], axis=1)
    power = np.abs(np.fft.rfft((frames - 0.97 * previous) * np.hanning(400), 512)) ** 2  # [T, 257]

    def mel(hz):
        return 1127 * np.log(1 + hz / 700)

    edges = np.linspace(mel(20), mel(8000), 130)
    position = (mel(np.arange(257) * 16000 / 512)[:, None] - edges[:-2]) / (edges[1] - edges[0])  # 0, 1, 2: a triangle
    triangles = np.clip(np.minimum(position, 2 - position), 0, None)
    return np.log(np.maximum(power @ triangles, 2.0**-23)).T


def test_log_mel_is_kaldis():
    waveform = 0.1 * torch.randn(16000)
    got = AUDIOSET128.log_mel(waveform)
    assert got.shape == (128, 98)
    assert got.dtype == torch.float32
    assert got.is_contiguous()
    np.testing.assert_allclose(got.numpy(), kaldi_by_hand(waveform.double().numpy()), atol=5e-3)
    assert torch.equal(got, AUDIOSET128.log_mel(waveform))  # no dither


def mel_by_hand(waveform: np.ndarray) -> np.ndarray:
    """M2D's log-mel, 80 Slaney filters of area 1 from 50 Hz to 8 kHz, in float64."""
    x = np.pad(waveform, 200, mode="reflect")
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    power = np.abs(np.fft.rfft(np.lib.stride_tricks.sliding_window_view(x, 400)[::160] * window)) ** 2  # [T, 201]
    top = 15 + 27 * math.log(8) / math.log(6.4)  # 8 kHz in mel
    mel = np.linspace(50 * 3 / 200, top, 82)
    edges = np.where(mel < 15, mel * 200 / 3, 1000 * np.exp(math.log(6.4) * (mel - 15) / 27))
    hz = 40 * np.arange(201)[:, None]
    rise = (hz - edges[:-2]) / (edges[1:-1] - edges[:-2])
    fall = (edges[2:] - hz) / (edges[2:] - edges[1:-1])
    triangles = np.clip(np.minimum(rise, fall), 0, None) * 2 / (edges[2:] - edges[:-2])
    return np.log(power @ triangles + 2.0**-23).T


def test_log_mel_is_m2ds():
    waveform = 0.1 * torch.randn(16000)
    got = M2D80.log_mel(waveform)
    assert got.shape == (80, 101)
    assert got.is_contiguous()
    np.testing.assert_allclose(got.numpy(), mel_by_hand(waveform.double().numpy()), atol=5e-3)


@pytest.mark.parametrize("name", FRONT_ENDS)
@pytest.mark.parametrize("samples", [100, 400, 3000, 3041, 3200])
def test_a_batch_is_its_clips(name, samples):
    front_end = FRONT_ENDS[name]
    waveforms = 0.1 * torch.randn(2, 3, samples) + torch.randn(2, 3, 1)
    got = front_end.log_mel(waveforms)
    one_by_one = torch.stack([front_end.log_mel(waveform) for waveform in waveforms.flatten(0, 1)])
    assert got.is_contiguous()
    torch.testing.assert_close(got, one_by_one.view_as(got), atol=1e-4, rtol=0)


def test_measure_is_the_mean_and_std_of_all_frames():
    waveforms = [0.1 * torch.randn(8000), 0.01 * torch.randn(3, 4000), torch.randn(100)]
    for front_end in FRONT_ENDS.values():
        values = torch.cat([front_end.log_mel(waveform).flatten() for waveform in waveforms])
        got = measure(front_end, iter(waveforms))
        assert got.mean == pytest.approx(float(values.double().mean()), rel=1e-6)
        assert got.std == pytest.approx(float(values.double().std(correction=0)), rel=1e-6)
        normalised = got.normalise(values)
        assert float(normalised.std()) == pytest.approx(1 / front_end.spread, rel=1e-3)


@pytest.mark.parametrize("waveforms", [[], [torch.zeros(399)], [torch.zeros(4000)]])
def test_measure_refuses_what_has_no_statistics(waveforms):
    with pytest.raises(ValueError, match="measure: expected"):
        measure(AUDIOSET128, waveforms)


@pytest.mark.parametrize("samples", [0, 1, 399, 400, 559, 560])
def test_frames_of_short_waveforms(samples):
    frames = max(0, (samples - 400) // 160 + 1)
    assert AUDIOSET128.log_mel(torch.randn(samples)).shape == (128, frames)


@pytest.mark.parametrize("name", FRONT_ENDS)
@pytest.mark.parametrize("shape", [(), (0, 4000), (2, 0, 4000), (0, 100)])
def test_no_waveform_at_all_is_named(name, shape):
    with pytest.raises(ValueError, match=r"waveform: expected shape \(..., samples\) of at least one waveform, got \("):
        FRONT_ENDS[name].log_mel(torch.zeros(shape))


@pytest.mark.parametrize("name", FRONT_ENDS)
@pytest.mark.parametrize("frames", [1, 3, 4, 16])
def test_seconds_is_the_shortest_waveform(name, frames):
    front_end = FRONT_ENDS[name]
    samples = round(front_end.seconds(frames) * audio.SAMPLE_RATE)
    assert front_end.log_mel(torch.randn(samples)).shape[1] >= frames
    assert front_end.log_mel(torch.randn(samples - 1)).shape[1] < frames


@pytest.mark.parametrize("name", FRONT_ENDS)
@pytest.mark.parametrize("hz", [440, 1000, 3300, 7000])
def test_tone_peaks_at_its_mel_bin(name, hz):
    log_mel = FRONT_ENDS[name].log_mel(torch.from_numpy(tone(hz, 0.5)).float())
    centres = FRONT_ENDS[name].centres()
    nearest = int((centres - hz).abs().argmin())
    peak = int(log_mel.mean(-1).argmax())
    assert abs(peak - nearest) <= 1
    assert abs(centres[peak] - hz) < max(16000 / 512, float(centres[nearest + 1] - centres[nearest]))


def test_silence_is_the_floor():
    assert AUDIOSET128.log_mel(torch.zeros(4000)).unique().tolist() == pytest.approx([AUDIOSET128.floor])


def test_normalise_is_audiosets():
    assert AUDIOSET128.normalise(torch.tensor([-4.268, -4.268 + 2 * 4.569])).tolist() == pytest.approx([0, 1], abs=1e-6)


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 48000, 96000])
def test_load_resamples(tmp_path, rate):
    path = tmp_path / "tone.wav"
    soundfile.write(path, tone(1000, 0.5, rate), rate, subtype="FLOAT")
    got = audio.load(path)
    assert got.dtype == torch.float32
    assert abs(len(got) - 8000) <= 1
    middle = slice(800, 7200)  # the resampler's ends ring
    np.testing.assert_allclose(got[middle].numpy(), tone(1000, 0.5)[middle], atol=2e-3)


def test_load_averages_channels(tmp_path):
    both = np.stack([tone(500, 0.2), tone(900, 0.2), 0 * tone(1, 0.2)], axis=1)
    soundfile.write(tmp_path / "three.wav", both, 16000, subtype="FLOAT")
    np.testing.assert_allclose(audio.load(tmp_path / "three.wav").numpy(), both.mean(1), atol=1e-6)


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_load_reads_stereo_44_khz(tmp_path, suffix):
    path = tmp_path / f"tone.{suffix}"
    soundfile.write(path, np.stack(2 * [tone(1000, 1.0, 44100)], axis=1), 44100)
    got = audio.load(path)
    assert audio.duration(path) == pytest.approx(1.0, abs=0.06)  # mp3 pads
    assert len(got) == pytest.approx(16000, abs=1000)
    spectrum = np.abs(np.fft.rfft(got.numpy()[2000:10000]))
    assert np.argmax(spectrum) == 500  # 2 Hz a bin
    assert np.abs(got.numpy()).max() == pytest.approx(0.5, abs=0.05)


def test_load_stops_after_seconds(tmp_path):
    path = tmp_path / "tone.wav"
    soundfile.write(path, tone(1000, 2.0, 44100), 44100)
    assert len(audio.load(path, seconds=0.5)) == 8000
    assert len(audio.load(path, seconds=5)) == 32000


def test_load_reads_a_piece(tmp_path):
    path = tmp_path / "ramp.wav"
    soundfile.write(path, np.linspace(0, 0.5, 16000), 16000, subtype="FLOAT")
    whole = audio.load(path)
    for at, start in ((0.0, 0), (0.25, 3000), (1.0, 12000)):
        assert torch.equal(audio.load(path, seconds=0.25, at=at), whole[start : start + 4000])
    assert torch.equal(audio.load(path, seconds=2, at=0.7), whole)
    with open(path, "rb") as file:
        assert torch.equal(audio.load(file, seconds=0.25, at=1.0), whole[12000:])


def _bad_files(folder: Path) -> dict[Path, str]:
    (folder / "empty.wav").write_bytes(b"")
    (folder / "text.flac").write_text("no sound here\n" * 50)
    (folder / "folder.ogg").mkdir()
    (folder / "headerless.raw").write_bytes(bytes(1000))
    soundfile.write(folder / "nothing.wav", np.zeros(0), 16000)
    soundfile.write(folder / "nan.wav", np.array([0.1, np.nan, 0.1]), 16000, subtype="FLOAT")
    return {
        folder / "missing.wav": "no such file",
        folder / "empty.wav": "empty",
        folder / "text.flac": "cannot be read",
        folder / "folder.ogg": "directory",
        folder / "headerless.raw": "cannot be read",
        folder / "nothing.wav": "no samples",
        folder / "nan.wav": "not finite",
    }


def test_load_names_what_is_wrong(tmp_path):
    for path, reason in _bad_files(tmp_path).items():
        with pytest.raises(AudioError, match=reason) as caught:
            audio.load(path)
        assert "\n" not in str(caught.value)


def test_truncated_wav_is_a_shorter_clip(tmp_path):
    path = tmp_path / "cut.wav"
    soundfile.write(path, tone(500, 1.0), 16000)
    path.write_bytes(path.read_bytes()[: 44 + 2 * 9000])
    assert len(audio.load(path)) == 9000


@pytest.mark.parametrize("rate", [16000, 44100])
def test_truncated_mp3_is_a_shorter_clip(tmp_path, rate):
    """Its header still tells of 10 s; pieces are of what there is, not silence that somebody adds."""
    path = tmp_path / "cut.mp3"
    soundfile.write(path, 0.1 * np.random.default_rng(0).standard_normal(10 * rate), rate)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert audio.duration(path) == 10
    there = audio.load(path, seconds=5)
    assert len(there) < 5 * 16000
    for at in (0.6, 1.0):
        assert len(audio.load(path, 2.0, at)) == 32000
    if rate == 16000:
        torch.testing.assert_close(audio.load(path, 2.0, 1.0), there[-32000:], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("suffix", "rate"),
    [*((suffix, rate) for suffix in ("mp3", "ogg", "opus") for rate in (8000, 16000, 48000)), ("mp3", 44100)],
)
def test_pieces_of_whole_files_are_read_once(tmp_path, monkeypatch, suffix, rate):
    """Headers of compressed files tell their length to the sample, wherever it falls between their own frames."""
    path = tmp_path / f"noise.{suffix}"
    kind = {"format": "OGG", "subtype": "OPUS"} if suffix == "opus" else {}
    soundfile.write(path, 0.1 * np.random.default_rng(0).standard_normal(3 * rate + 37), rate, **kind)
    read, pieces = audio._piece, []
    monkeypatch.setattr(audio, "_piece", lambda *given: pieces.append(given) or read(*given))
    for at in (0.3, 1.0):
        assert len(audio.load(path, 0.5, at)) == 8000
    assert len(pieces) == 2


def test_an_mp3_without_its_length_has_no_silence_at_its_end(tmp_path):
    """A whole one: its length is estimated from the file's size, of which a picture in front is a part."""
    path = tmp_path / "plain.mp3"
    kind = {"bitrate_mode": "CONSTANT", "compression_level": 0}
    soundfile.write(path, 0.1 * np.random.default_rng(0).standard_normal(48000), 16000, **kind)
    content = path.read_bytes()
    second = content.index(content[:2], content.index(b"Info"))  # the first frame only tells the length
    tag = b"ID3\x03\0\0\0\0\x7f\x7f"  # of 2^14 - 1 bytes
    path.write_bytes(tag + bytes(2**14 - 1) + content[second:])
    assert audio.duration(path) > 3.5
    assert len(audio.load(path, 0.5, 1.0)) == 8000


def test_a_decoder_that_lost_its_place_is_one_line(tmp_path, monkeypatch):
    """In some damaged mp3s libsndfile is beyond the end after a seek, and soundfile asks for less than nothing."""
    path = tmp_path / "tone.wav"
    soundfile.write(path, tone(500, 1.0), 16000)
    monkeypatch.setattr(soundfile.SoundFile, "tell", lambda sound: sound.frames + 5)
    with pytest.raises(AudioError, match="cannot be read as sound"):
        audio.load(path, 0.1, 0.5)


def test_share_of_two_sinusoids():
    """Amplitudes 1 below the band's edge and 2 above it: the share is 4/5, whatever the mean of each bin."""
    t = FRAME * torch.arange(1600, dtype=torch.float64)
    rows = torch.cos(2 * math.pi * 2 * t) + 2 * torch.cos(2 * math.pi * 7 * t + 1)
    log_mel = rows + 100 * torch.randn(20, 1, dtype=torch.float64)
    assert audio.modulation_share(log_mel, 16) == pytest.approx(0.8, abs=1e-3)
    assert audio.modulation_share(log_mel, 4) == pytest.approx(0.0, abs=1e-3)  # edge at 12.5 Hz


def test_share_at_the_edge():
    """ω = π/S_t itself is not aliased: of its three lines under the Hann window (4 : 1 : 1), only the upper one is."""
    edge = torch.cos(2 * math.pi * 3.125 * FRAME * torch.arange(1600, dtype=torch.float64))
    assert audio.modulation_share(edge.repeat(2, 1), 16) == pytest.approx(1 / 6, abs=2e-3)


def test_share_of_modulated_noise():
    """ln (1 + m cos θ)² = const + Σ_n (4 qⁿ/n) (−1)ⁿ⁺¹ cos nθ with q = m/(1 + √(1 − m²)), plus white noise of std σ.

    At 2 Hz the fundamental lies below 3.125 Hz and all harmonics above; of the noise 1 − 1/16 does.
    """
    depth, sigma = 0.8, 0.5
    q = depth / (1 + math.sqrt(1 - depth**2))
    harmonics = [(4 * q**n / n) ** 2 / 2 for n in range(1, 25)]
    expected = (sum(harmonics[1:]) + sigma**2 * 15 / 16) / (sum(harmonics) + sigma**2)

    theta = 2 * math.pi * (2 * FRAME * torch.arange(1600) + torch.rand(128, 1))
    log_mel = 2 * torch.log(1 + depth * torch.cos(theta)) + sigma * torch.randn(128, 1600)
    assert audio.modulation_share(log_mel, 16) == pytest.approx(expected, abs=5e-3)


def test_share_orders_real_modulation():
    """Noise through the whole front end: modulated at 1 Hz it has a smaller share than at 10 Hz."""
    shares = []
    for hz in (1, 10):
        t = torch.arange(4 * audio.SAMPLE_RATE) / audio.SAMPLE_RATE
        waveform = 0.1 * torch.randn(len(t)) * (1 + 0.9 * torch.sin(2 * math.pi * hz * t))
        shares.append(audio.modulation_share(AUDIOSET128.log_mel(waveform), 16))
    assert 0 < shares[0] < 0.75 < 0.9 < shares[1] < 1


@pytest.mark.parametrize("frames", [1, 2, 16, 17])
def test_share_of_nothing_is_zero(frames):
    assert audio.modulation_share(torch.full((8, frames), -3.0), 16) == 0.0


@pytest.mark.parametrize(("hz", "gain"), [(0.0, 0.0), (3.125, 0.5), (12.5, 1.0), (25.0, 1.0)])
def test_remove_level_gain(hz, gain):
    """Nothing of a steady level is left, half of what lies at the band's edge, all of what is well above."""
    t = FRAME * torch.arange(640, dtype=torch.float64)
    x = torch.cos(2 * math.pi * hz * t).repeat(3, 1)
    got = audio.remove_level(x, 16)
    middle = slice(16, -16)  # away from the ends, where the average has fewer frames
    torch.testing.assert_close(got[:, middle], gain * x[:, middle], atol=1e-9, rtol=0)


@pytest.mark.parametrize("frames", [16, 40])
def test_remove_level_at_the_ends(frames):
    level = torch.randn(5, 1).expand(5, frames)
    torch.testing.assert_close(audio.remove_level(level, 16), torch.zeros(5, frames), atol=1e-5, rtol=0)


def test_torchaudio_is_stubbed_only_where_it_does_not_import():
    """In a fresh interpreter each: a plain import that works is left alone, one that fails gets the stub."""
    plain = subprocess.run([sys.executable, "-c", "import torchaudio"], capture_output=True)
    code = (
        "import sys; from aape_ssl.sound.audio import import_kaldi; assert import_kaldi() is import_kaldi();"
        "import torchaudio; print(getattr(sys.modules['torchaudio._extension'], '__file__', None) is None)"
    )
    guarded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert guarded.returncode == 0, guarded.stderr
    assert guarded.stdout.strip() == str(plain.returncode != 0)


@pytest.mark.parametrize("loud", [1e13, 1e30])
def test_sound_far_beyond_full_scale_is_refused(tmp_path, loud):
    """Finite, but its powers are not."""
    soundfile.write(tmp_path / "loud.wav", np.random.randn(16000) * loud, 16000, subtype="FLOAT")
    with pytest.raises(audio.AudioError, match=r"holds samples far beyond full scale \(.*e\+"):
        audio.load(tmp_path / "loud.wav")
    soundfile.write(tmp_path / "less.wav", np.random.randn(16000) * 1e11, 16000, subtype="FLOAT")
    assert audio.AUDIOSET128.log_mel(audio.load(tmp_path / "less.wav")).isfinite().all()
