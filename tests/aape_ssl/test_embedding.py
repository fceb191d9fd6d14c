"""Embeddings: what is pooled, what is padding, and what ends up in the file."""

import math
import sys

import numpy as np
import pytest
import soundfile
import torch
from pyarrow import parquet

from aape_ssl.demo import command as demo
from aape_ssl.evaluation import commands
from aape_ssl.evaluation.embedding import cache_folder, cached, embed, embed_files, pool, statistics
from aape_ssl.saved.pretrained import AudioEncoder
from aape_ssl.sound import audio
from aape_ssl.sound.audio import AUDIOSET128, FRONT_ENDS, AudioError
from aape_ssl.sound.loader import Crops
from aape_ssl.sound.sources import Clip, find

CLIPS = find(demo.bundled_clips()[0].parent)


def patches(x):
    """An encoder without weights: the means of 32 × 16 patches and of their squares, D = 2."""
    blocks = x.unflatten(3, (-1, 16)).unflatten(2, (-1, 32))[:, 0].transpose(2, 3)  # [B, N_f, N_t, 32, 16]
    tokens = torch.stack([blocks.mean((3, 4)), blocks.square().mean((3, 4))], -1)
    return tokens.flatten(1, 2), tuple(tokens.shape[1:3])


def silent_flac(path, seconds):
    soundfile.write(path, np.zeros(int(seconds * 16000)), 16000)
    return Clip(path.name, path)


def test_pool_is_the_time_mean_of_concatenated_frequencies():
    tokens = torch.randn(3, 4 * 5, 7)
    expected = torch.stack(
        [torch.cat([torch.stack([clip[i * 5 + j] for j in range(5)]).mean(0) for i in range(4)]) for clip in tokens]
    )
    torch.testing.assert_close(pool(tokens, (4, 5)), expected)
    torch.testing.assert_close(pool(tokens, (4, 5), torch.tensor([5, 5, 5])), expected)
    first = tokens.view(3, 4, 5, 7)[:, :, :2].mean(2).flatten(1)
    torch.testing.assert_close(pool(tokens, (4, 5), torch.tensor([2, 2, 5]))[:2], first[:2])
    with pytest.raises(ValueError, match="tokens: expected 4 × 6 of them, got 20"):
        pool(tokens, (4, 6))


@pytest.mark.parametrize("name", FRONT_ENDS)
def test_embed_is_the_encoder_on_each_clip(name):
    front_end = FRONT_ENDS[name]
    frames = 16 * 8

    def encoder(x):
        assert x.shape[1:] == (1, front_end.mel_bins, frames)
        return patches(x[:, :, :64])

    got = embed(encoder, CLIPS, front_end, frames, batch_size=4)
    assert got.shape == (len(CLIPS), 2 * 2)
    assert got.dtype == np.float32
    for row, clip in zip(got, CLIPS, strict=True):
        waveform = clip.load()
        x = front_end.normalise(front_end.log_mel(torch.nn.functional.pad(waveform, (0, 32000))))[:, :frames]
        columns = min(8, math.ceil(len(waveform) / 2560))
        tokens, _ = patches(x[None, None, :64])
        expected = tokens.view(2, 8, 2)[:, :columns].mean(1).flatten()
        # at the end of the piece M2D's frames reflect it: the last frame of a cut clip is another one
        np.testing.assert_allclose(row, expected, atol=2e-2 if name == "m2d80" else 1e-3)
    np.testing.assert_allclose(got, embed(encoder, CLIPS, front_end, frames, batch_size=1), atol=1e-4)


def test_a_shift_delays_the_clip(tmp_path):
    delayed = []
    for clip in CLIPS:
        path = tmp_path / f"{clip.path.stem}.wav"
        soundfile.write(path, np.pad(clip.load().numpy(), (5 * 160, 0)), 16000, subtype="FLOAT")
        delayed.append(Clip(path.name, path))
    got = embed(patches, CLIPS, AUDIOSET128, 96, shift=5)
    np.testing.assert_allclose(got, embed(patches, delayed, AUDIOSET128, 96), atol=1e-3)
    assert np.abs(got - embed(patches, CLIPS, AUDIOSET128, 96)).max() > 0.01
    for shift in (-1, 96):
        with pytest.raises(ValueError, match=f"shift: expected at least 0 frames and fewer than 96, got {shift}"):
            embed(patches, CLIPS, AUDIOSET128, 96, shift=shift)


def test_padding_is_left_out(tmp_path):
    """A clip of 2 columns has the same embedding however many frames are asked for."""
    clip = Clip("loud", tmp_path / "loud.wav")
    soundfile.write(clip.path, 0.3 * np.random.default_rng(0).standard_normal(5120), 16000, subtype="FLOAT")
    short, long = (embed(patches, [clip], AUDIOSET128, frames) for frames in (32, 96))
    assert short.shape == long.shape
    # the last two of 32 frames reach beyond the clip in both cases
    np.testing.assert_allclose(short, long, atol=1e-3)


def test_statistics_are_mean_std_and_change():
    got = statistics(CLIPS, AUDIOSET128)
    assert got.shape == (len(CLIPS), 3 * 128)
    for row, clip in zip(got, CLIPS, strict=True):
        x = AUDIOSET128.log_mel(clip.load()).double().numpy()
        expected = np.concatenate([x.mean(1), x.std(1), np.abs(np.diff(x, axis=1)).mean(1)])
        np.testing.assert_allclose(row, expected, atol=1e-4)


def test_a_clip_that_cannot_be_decoded_is_named(tmp_path):
    bad = Clip("bad.flac", tmp_path / "bad.flac")
    for compute in (lambda clips: embed(patches, clips, AUDIOSET128, 32), lambda c: statistics(c, AUDIOSET128)):
        with pytest.raises(AudioError, match=r"^bad.flac: no such file$"):
            compute([CLIPS[0], bad])
    with pytest.raises(AudioError, match=r"short.flac: expected at least 2 frames, got 1"):
        statistics([silent_flac(tmp_path / "short.flac", 0.03)], AUDIOSET128)


def test_a_clip_shorter_than_a_frame_is_named(tmp_path):
    """What silence were added to would be an embedding of silence."""
    short = silent_flac(tmp_path / "short.flac", 0.01)
    said = r"is too short: expected 0.025 s, one frame, got 0.01 s"
    with pytest.raises(AudioError, match=rf"^short.flac: {said}"):
        embed(patches, [short], AUDIOSET128, 32)
    with pytest.raises(ValueError, match=rf"clips: none of the 1 could be used, such as short.flac: {said}"):
        embed_files(patches, [short], AUDIOSET128, 32, tmp_path / "x.npz")
    with pytest.raises(AudioError, match=said):
        Crops([short], AUDIOSET128, 32).waveform(0, 0.0)


def test_cache_is_for_these_clips_and_this_key(tmp_path):
    path, calls = tmp_path / "new" / "features.npz", []

    def compute(value):
        def run():
            calls.append(value)
            return np.full((2, 3), value, np.float32)

        return run

    for key, clips, value in (("a", CLIPS[:2], 1), ("a", CLIPS[:2], 2), ("b", CLIPS[:2], 3), ("b", CLIPS[2:4], 4)):
        got = cached(path, clips, key, compute(value))
        assert (got == (1 if value == 2 else value)).all()
    assert calls == [1, 3, 4]
    with np.load(path) as kept:
        assert str(kept["about"]) == "b"
    path.write_bytes(path.read_bytes()[:100])
    assert (cached(path, CLIPS[2:4], "b", compute(5)) == 5).all()
    assert [file.name for file in path.parent.iterdir()] == ["features.npz"]


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path):
    (tmp_path / "file").touch()
    path, features = tmp_path / "file" / "features.npz", np.ones((2, 3), np.float32)
    with pytest.warns(UserWarning, match=f"cache: {path}: cannot be written .*: these embeddings will be computed"):
        assert cached(path, CLIPS[:2], "key", lambda: features) is features


def test_cache_folder(monkeypatch, tmp_path):
    for name in ("AAPE_SSL_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "aape_ssl"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "aape_ssl"
    monkeypatch.setenv("AAPE_SSL_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"


# --- files ---


def read(path):
    if path.suffix == ".npz":
        with np.load(path) as kept:
            return dict(kept)
    columns = parquet.read_table(path).to_pydict()
    return {name: np.array(values) for name, values in columns.items()}


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_files_have_frame_and_clip_embeddings(tmp_path, suffix):
    empty = tmp_path / "empty.wav"
    empty.write_bytes(b"")
    clips = [*CLIPS[:3], Clip("empty.wav", empty), *CLIPS[3:]]
    tables = {}
    for level in ("clip", "frame"):
        out = tmp_path / f"{level}{suffix}"
        failed = embed_files(patches, clips, AUDIOSET128, 64, out, level, batch_size=3)
        assert failed == [("empty.wav", "is empty (0 bytes)")]
        tables[level] = read(out)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(["empty.wav", f"clip{suffix}", f"frame{suffix}"])
    assert tables["clip"].keys() == {"name", "embedding"}
    assert tables["clip"]["name"].tolist() == [clip.name for clip in CLIPS]
    assert tables["clip"]["embedding"].shape == (len(CLIPS), 8)
    frame = tables["frame"]
    for clip, row in zip(CLIPS, tables["clip"]["embedding"], strict=True):
        mine = frame["name"] == clip.name
        waveform = audio.load(clip.path)
        columns = math.ceil((len(waveform) - 240) / 2560)  # what the last frame alone reaches needs no window
        assert mine.sum() in (columns, math.ceil(len(waveform) / 2560))
        np.testing.assert_allclose(frame["time"][mine], 0.16 * (np.arange(mine.sum()) + 0.5), rtol=1e-6)
        np.testing.assert_allclose(frame["embedding"][mine].mean(0), row, atol=1e-4)
        # windows join without a seam
        x = AUDIOSET128.log_mel(torch.nn.functional.pad(waveform, (0, 16000)))[:, : 16 * int(mine.sum())]
        tokens, grid = patches(AUDIOSET128.normalise(x)[None, None])
        whole = tokens.view(*grid, 2).transpose(0, 1).flatten(1)
        np.testing.assert_allclose(frame["embedding"][mine], whole, atol=1e-3)


def test_windows_of_a_pre_training_of_odd_frames_lose_nothing(tmp_path):
    """Of 31 frames its encoder saw 16; each of the clip's columns is there, at its own time."""
    AudioEncoder((16, 1, 2), frames=31).save_pretrained(tmp_path / "encoder")
    clip, out = CLIPS[0], tmp_path / "x.npz"
    assert commands.embed(str(tmp_path / "encoder"), str(clip.path), out, level="frame", device="cpu") == 0
    times = read(out)["time"]
    assert len(times) == math.ceil((len(clip.load()) - 240) / 2560)
    np.testing.assert_allclose(times, 0.16 * (np.arange(len(times)) + 0.5), rtol=1e-6)


def test_failed_clips_of_one_name_are_two(tmp_path):
    bad = [Clip("a.tar/0.wav", tmp_path / folder / "a.tar", span=(0, 1)) for folder in "xy"]
    failed = embed_files(patches, [CLIPS[0], *bad], AUDIOSET128, 64, tmp_path / "a.npz")
    assert [name for name, _ in failed] == ["a.tar/0.wav", "a.tar/0.wav"]


def test_bad_outputs_are_refused_before_anything_is_encoded(tmp_path, monkeypatch):
    def never(x):
        raise AssertionError("encoded")

    (tmp_path / "there.npz").write_bytes(b"precious")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setattr("aape_ssl.evaluation.embedding.find_spec", lambda name: None)
    for out, level, reason in (
        ("there.npz", "clip", "out: .*there.npz exists already"),
        ("no/a.npz", "clip", "out: .* lies in a folder that is not there"),
        ("a.txt", "clip", "out: expected a .npz or .parquet file"),
        ("a.parquet", "clip", "out: writing .* needs pyarrow: pip install pyarrow"),
        ("a.npz", "token", "level: expected one of clip, frame, got 'token'"),
    ):
        with pytest.raises(ValueError, match=reason):
            embed_files(never, CLIPS, AUDIOSET128, 64, tmp_path / out, level)
    assert (tmp_path / "there.npz").read_bytes() == b"precious"
    with pytest.raises(ValueError, match="clips: none of the 1 could be used"):
        embed_files(never, [Clip("x", tmp_path / "x.wav")], AUDIOSET128, 64, tmp_path / "a.npz")


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(file, **table):
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("aape_ssl.evaluation.embedding.np.savez", full)
    with pytest.raises(OSError, match=r"a.npz: cannot be written \(No space left on device\)"):
        embed_files(patches, CLIPS[:1], AUDIOSET128, 64, tmp_path / "a.npz")
    assert not list(tmp_path.iterdir())


def test_a_file_that_was_recorded_again_is_embedded_again(tmp_path):
    def write(seed):
        samples = np.random.default_rng(seed).standard_normal(16000) * 0.1
        soundfile.write(tmp_path / "a.wav", samples, 16000)
        return [Clip("a.wav", tmp_path / "a.wav")]

    def features(clips):
        return cached(tmp_path / "c.npz", clips, "k", lambda: statistics(clips, AUDIOSET128))

    first = features(write(0))
    assert np.array_equal(features([Clip("a.wav", tmp_path / "a.wav")]), first)
    again = write(1)
    assert np.array_equal(features(again), statistics(again, AUDIOSET128))
    assert not np.array_equal(features(again), first)
