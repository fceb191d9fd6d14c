"""Kept log-mels: what every shift looks at, that features are those of `embed`, and when they are made anew."""

import json
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch

from aape_ssl.evaluation.embedding import embed
from aape_ssl.sound.audio import AUDIOSET128, FRONT_ENDS, AudioError
from aape_ssl.sound.sources import Clip
from benchmarks.evidence.spectrograms import Spectrograms, features

FRAMES = 64


def patches(x):
    """An encoder without weights: the means of 16 × 16 patches and of their squares, D = 2."""
    blocks = x.unflatten(3, (-1, 16)).unflatten(2, (-1, 16))[:, 0].transpose(2, 3)
    tokens = torch.stack([blocks.mean((3, 4)), blocks.square().mean((3, 4))], -1)
    return tokens.flatten(1, 2), tuple(tokens.shape[1:3])


@pytest.fixture
def clips(tmp_path):
    """Longer than what is looked at, about as long, as long to the sample, of three patches, shorter than a frame."""
    rng = np.random.default_rng(0)
    found = []
    for samples in (30000, 10500, 10240, 7000, 400):
        path = tmp_path / f"{samples}.wav"
        soundfile.write(path, 0.3 * rng.standard_normal(samples) + 0.1, 16000, subtype="FLOAT")
        found.append(Clip(path.name, path))
    return found


@pytest.mark.parametrize("shift", [0, 1, 7, 15])
@pytest.mark.parametrize("name", FRONT_ENDS)
def test_shifted_features_are_those_of_the_delayed_waveform(clips, tmp_path, name, shift):
    front_end = FRONT_ENDS[name]
    kept = Spectrograms.of(clips, front_end, FRAMES, cache=tmp_path / "cache")
    assert kept.log_mels.shape == (5, front_end.mel_bins, FRAMES + 15)
    delayed = []
    for clip in clips:
        path = tmp_path / f"delayed-{clip.name}"
        soundfile.write(path, np.pad(clip.load().numpy(), (160 * shift, 0)), 16000, subtype="FLOAT")
        delayed.append(Clip(path.name, path))
    got = features(patches, kept, shift)
    # m2d80 reflects what is at the ends of the waveform: at its start, and where its last frame is cut
    close = {"atol": 0.05 if name == "m2d80" else 1e-4}
    np.testing.assert_allclose(got, embed(patches, clips, front_end, FRAMES, shift=shift), **close)
    np.testing.assert_allclose(got, embed(patches, delayed, front_end, FRAMES), **close)
    if shift:
        assert np.abs(got - features(patches, kept)).max() > 0.1


def test_content_moves_and_nothing_of_the_beginning_is_lost(clips, tmp_path):
    kept = Spectrograms.of(clips, AUDIOSET128, FRAMES, cache=tmp_path)
    rows = np.arange(5)
    still, own = kept.at(rows, np.zeros(5, int))
    assert still.shape == (5, 1, 128, FRAMES)
    np.testing.assert_allclose(own, [1, 1, 1, 7000 / 160 / FRAMES, 400 / 160 / FRAMES])
    moved, further = kept.at(rows, np.array([1, 3, 9, 15, 15]))
    for row, shift in enumerate((1, 3, 9, 15, 15)):
        assert torch.equal(moved[row, ..., shift:], still[row, ..., : FRAMES - shift])
        silence = moved[row, ..., : max(0, shift - 2)]  # two frames before the clip reach into it
        assert bool((silence == AUDIOSET128.normalise(torch.tensor(AUDIOSET128.floor))).all())
    np.testing.assert_allclose(further[3:], [(7000 / 160 + 15) / FRAMES, (400 / 160 + 15) / FRAMES])
    assert float(further.max()) == 1


def test_padding_is_left_out_at_every_shift(clips, tmp_path):
    """A clip of 43.75 frames reaches into the fourth column of patches from shift 5 on."""
    kept = Spectrograms.of(clips, AUDIOSET128, FRAMES, cache=tmp_path)
    for shift, columns in ((0, 3), (4, 3), (5, 4), (15, 4)):
        tokens, grid = patches(kept.at(np.array([3]), np.array([shift]))[0])
        expected = tokens.view(*grid, 2)[:, :columns].mean(1).flatten()
        np.testing.assert_allclose(features(patches, kept, shift, [3])[0], expected, rtol=1e-6)


def test_fewer_frames_of_the_same(clips, tmp_path):
    kept = replace(Spectrograms.of(clips, AUDIOSET128, FRAMES, cache=tmp_path), frames=32)
    for shift in (0, 6):
        got = features(patches, kept, shift)
        np.testing.assert_allclose(got, embed(patches, clips, AUDIOSET128, 32, shift=shift), atol=1e-4)


def test_rows_and_a_shift_for_each(clips, tmp_path):
    kept = Spectrograms.of(clips, AUDIOSET128, FRAMES, shifts=4, cache=tmp_path)
    rows = kept.rows([clips[3], Clip("by another name", clips[0].path), clips[3]])
    assert rows.tolist() == [3, 0, 3]
    got = features(patches, kept, [1, 0, 3], rows, batch_size=2)
    for row, clip, shift in zip(got, rows, (1, 0, 3), strict=True):
        np.testing.assert_allclose(row, features(patches, kept, shift)[clip], rtol=1e-6)
    with pytest.raises(KeyError, match=r"other\.wav"):
        kept.rows([Clip("other.wav", tmp_path / "other.wav")])
    for shift in (-1, 4, [0, 4, 0]):
        with pytest.raises(ValueError, match="shift: expected 0 to 3 frames, got"):
            features(patches, kept, shift, rows)


def test_made_once_for_each_content(clips, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    loaded = []
    load = Clip.load
    monkeypatch.setattr(Clip, "load", lambda clip, *args: loaded.append(clip.name) or load(clip, *args))
    first = Spectrograms.of(clips[3:], AUDIOSET128, FRAMES, cache=cache)
    assert len(loaded) == 2
    again = Spectrograms.of(clips[3:], AUDIOSET128, FRAMES, cache=cache)
    assert len(loaded) == 2
    np.testing.assert_array_equal(again.log_mels, first.log_mels)
    np.testing.assert_array_equal(again.lengths, [7000 / 160, 400 / 160])
    assert again.about == first.about
    # whatever the values depend on has its own
    Spectrograms.of(clips[3:], FRONT_ENDS["m2d80"], FRAMES, cache=cache)
    Spectrograms.of(clips[3:], AUDIOSET128, FRAMES + 16, cache=cache)
    Spectrograms.of(clips[3:], AUDIOSET128, FRAMES, 8, cache=cache)
    Spectrograms.of(clips[2:4], AUDIOSET128, FRAMES, cache=cache)
    assert len(loaded) == 10
    samples, rate = soundfile.read(clips[4].path)
    soundfile.write(clips[4].path, samples[::-1], rate, subtype="FLOAT")
    other = Spectrograms.of(clips[3:], AUDIOSET128, FRAMES, cache=cache)
    assert len(loaded) == 12
    assert not np.array_equal(other.log_mels[1], first.log_mels[1])
    # the caches say of what they are
    described = [json.loads(path.read_text()) for path in (cache / "spectrograms").glob("*.json")]
    assert len(described) == 6
    assert {entry["frames"] for entry in described} == {FRAMES, FRAMES + 16}
    assert {entry["front_end"] for entry in described} == {repr(FRONT_ENDS[name]) for name in FRONT_ENDS}
    assert all(entry["version"] and entry["clips"] == 2 and len(entry["lengths"]) == 2 for entry in described)


def test_a_clip_that_cannot_be_decoded_is_named_and_nothing_is_kept(clips, tmp_path):
    bad = Clip("drums/kick04.ogg", tmp_path / "kick04.ogg")
    bad.path.write_bytes(b"RIFF nothing")
    with pytest.raises(AudioError, match=r"^drums/kick04.ogg: cannot be read as sound"):
        Spectrograms.of([*clips, bad], AUDIOSET128, FRAMES, cache=tmp_path / "cache")
    assert list((tmp_path / "cache" / "spectrograms").iterdir()) == []


def test_half_a_cache_is_not_taken(clips, tmp_path):
    """Killed between its two files: the description is written last."""
    kept = Spectrograms.of(clips, AUDIOSET128, FRAMES, cache=tmp_path)
    (values,) = (tmp_path / "spectrograms").glob("*.npy")
    expected = np.array(kept.log_mels)
    values.with_suffix(".json").unlink()
    values.write_bytes(values.read_bytes()[:500])
    np.testing.assert_array_equal(Spectrograms.of(clips, AUDIOSET128, FRAMES, cache=tmp_path).log_mels, expected)
