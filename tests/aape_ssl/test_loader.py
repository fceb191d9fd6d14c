"""Batches depend on (seed, epoch, index) alone: not on workers, processes or interruptions; bad files are reported."""

import math
import pickle
import shutil

import numpy as np
import pytest
import soundfile
import torch

from aape_ssl.demo import command as demo
from aape_ssl.sound import loader
from aape_ssl.sound.audio import AUDIOSET128, FRONT_ENDS, M2D80
from aape_ssl.sound.loader import ClipLoader, Crops, TooManyFailedError, features
from aape_ssl.sound.sources import find

BUNDLED = find(demo.bundled_clips()[0].parent)
AUGMENTED = {"mix": 0.4, "resize_crop": 0.6}


@pytest.fixture
def folder(tmp_path):
    """24 short clips, some shorter than a crop."""
    rng = np.random.default_rng(torch.initial_seed() % 2**31)
    for n in range(24):
        samples = 0.1 * rng.standard_normal(3000 + 500 * n)
        soundfile.write(tmp_path / f"{n:02}.wav", samples, 16000, subtype="FLOAT")
    return tmp_path


def crops(source, **options):
    clips = source if isinstance(source, list) else find(source)
    return Crops(clips, options.pop("front_end", AUDIOSET128), options.pop("frames", 32), **options)


def equal(one, other):
    return len(one) == len(other) and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(one, other, strict=True)
    )


def epochs(batches, count):
    return [batch for _ in range(count) for batch in batches]


@pytest.mark.parametrize("name", FRONT_ENDS)
def test_workers_and_threads_change_no_bit(name):
    """On the bundled clips, with everything that is random; with two threads here, where workers have one."""
    torch.set_num_threads(2)  # tests/aape_ssl/conftest.py sets it back
    data = crops(BUNDLED, front_end=FRONT_ENDS[name], frames=100, **AUGMENTED)
    alone, two = (epochs(ClipLoader(data, 2, workers=workers), 2) for workers in (0, 2))
    assert equal(alone, two)
    assert alone[0]["log_mel"].shape == (2, 1, FRONT_ENDS[name].mel_bins, 100)
    assert alone[0]["log_mel"].dtype == torch.float32
    assert alone[0]["index"].dtype == torch.int64
    assert not equal(alone[:3], alone[3:])  # epochs differ
    assert not equal(alone, epochs(ClipLoader(crops(BUNDLED, frames=100, seed=1), 2), 2))


def test_one_thread_loads_here_too(folder, monkeypatch):
    """Whether sums of several threads differ depends on their size: none are shared out."""
    threads, plain = [], loader.features
    monkeypatch.setattr(loader, "features", lambda *given: threads.append(torch.get_num_threads()) or plain(*given))
    torch.set_num_threads(2)
    list(ClipLoader(crops(folder), 12))
    assert threads == [1, 1]
    assert torch.get_num_threads() == 2


def test_each_epoch_has_every_clip_once(folder):
    batches = ClipLoader(crops(folder), 5)
    assert len(batches) == 4
    seen = [torch.cat([batch["index"] for batch in batches]) for _ in range(3)]
    for indices in seen:
        assert len(indices) == len(indices.unique()) == 20
    assert not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize(
    ("given", "before", "after"), [*((given, 0, 0) for given in (0, 1, 4, 5, 7, 8)), (6, 0, 2), (6, 2, 0)]
)
def test_resuming_changes_no_bit(folder, given, before, after):
    """Stopped after any number of batches, an epoch's last included; 4 batches an epoch, two epochs and a half."""
    data = crops(folder, **AUGMENTED)

    def run(batches, count):
        got = []
        while len(got) < count:
            for batch in batches:
                got.append(batch)
                if len(got) == count:
                    break
        return got

    whole = run(ClipLoader(data, 6), 10)
    first = ClipLoader(data, 6, workers=before)
    start = run(first, given)
    state = pickle.loads(pickle.dumps(first.state_dict()))
    second = ClipLoader(data, 6, workers=after)
    second.load_state_dict(state)
    assert equal(start + run(second, 10 - given), whole)


def test_state_loads_with_weights_only(folder, tmp_path):
    (folder / "03.wav").write_bytes(b"")
    batches = ClipLoader(crops(folder, max_failed=0.1), 4)
    list(batches)
    torch.save(batches.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    again = ClipLoader(crops(folder, max_failed=0.1), 4)
    again.load_state_dict(state)
    assert again.failed == {3: "is empty (0 bytes)"}


def test_an_epoch_left_early_is_over(folder):
    batches = ClipLoader(crops(folder), 6)
    first = next(iter(batches))
    assert not equal([first], [next(iter(batches))])
    assert batches.place["epoch"] == 1


@pytest.mark.parametrize(("limit", "taken"), [(2, 2), (9, 4), (0.5, 2), (1.0, 4)])
def test_whether_a_resumed_epoch_was_over_depends_on_its_limit(folder, limit, taken):
    """4 batches an epoch."""
    for given in range(1, taken + 1):
        first = ClipLoader(crops(folder), 6)
        for _ in zip(range(given), first, strict=False):
            pass
        second = ClipLoader(crops(folder), 6, limit=limit)
        second.load_state_dict(first.state_dict())
        next(iter(second))
        assert tuple(second.place.values()) == ((1, 1) if given == taken else (0, given + 1))


@pytest.mark.parametrize("change", [{"seed": 1}, {"size": 8}, {"drop": 1}])
def test_a_checkpoint_of_another_run_is_refused(folder, change):
    state = ClipLoader(crops(folder), 6).state_dict()
    clips = find(folder)[change.get("drop", 0) :]
    other = ClipLoader(crops(clips, seed=change.get("seed", 0)), change.get("size", 6))
    with pytest.raises(ValueError, match=r"the checkpoint was made with .*, this run has"):
        other.load_state_dict(state)


def test_two_processes_share_the_batches_of_one(folder):
    data = crops(folder)
    one = list(ClipLoader(data, 6))
    halves = [list(ClipLoader(data, 3, rank=rank, world=2)) for rank in (0, 1)]
    joined = [{name: torch.cat([a[name], b[name]]) for name in a} for a, b in zip(*halves, strict=True)]
    assert [batch["index"].tolist() for batch in joined] == [batch["index"].tolist() for batch in one]
    for a, b in zip(joined, one, strict=True):
        torch.testing.assert_close(a["log_mel"], b["log_mel"], atol=1e-5, rtol=0)


def test_global_generators_are_left_alone(folder):
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    list(ClipLoader(crops(folder, **AUGMENTED), 6))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()


def test_crops_are_pieces_of_the_clip(tmp_path):
    """A ramp tells where each crop was taken: anywhere, both ends included, and evenly."""
    soundfile.write(tmp_path / "ramp.wav", np.linspace(0, 0.9, 32000), 16000, subtype="FLOAT")
    soundfile.write(tmp_path / "short.wav", np.full(1000, 0.5), 16000, subtype="FLOAT")
    data = crops(tmp_path, waveforms=True, frames=98)  # 1 s: 15,920 samples
    batch = data.__getitems__([(epoch, 0) for epoch in range(200)])
    waveform = batch["waveform"]
    starts = waveform[:, 0] * 31999 / 0.9
    torch.testing.assert_close(waveform.diff(dim=1), torch.full((200, 15919), 0.9 / 31999), atol=1e-6, rtol=0)
    assert float(starts.min()) < 1000 < 15080 < float(starts.max())
    assert float(starts.mean()) == pytest.approx(16080 / 2, abs=4 * 16080 / math.sqrt(12 * 200))
    short = data.__getitems__([(0, 1)])["waveform"][0]
    assert short[:1000].tolist() == [0.5] * 1000
    assert not short[1000:].any()


@pytest.mark.parametrize("front_end", [AUDIOSET128, M2D80])
def test_on_the_device_or_in_workers(folder, front_end):
    in_workers, later = (crops(folder, front_end=front_end, waveforms=later, **AUGMENTED) for later in (False, True))
    keys = [(3, index) for index in range(8)]
    got = features(later.__getitems__(keys), front_end, 32)
    torch.testing.assert_close(got["log_mel"], in_workers.__getitems__(keys)["log_mel"], atol=1e-4, rtol=0)


def test_options_do_not_move_the_crops(folder):
    keys = [(0, index) for index in range(12, 24)]
    plain, augmented = (crops(folder, waveforms=True, **options).__getitems__(keys) for options in ({}, AUGMENTED))
    assert torch.equal(plain["waveform"], augmented["waveform"])
    assert (augmented["ratio"] < 0.4).all()
    assert len(augmented["ratio"].unique()) == 12
    box = augmented["box"]
    assert (box >= 0).all()
    assert (box[:, 1::2] >= 0.6).all()
    assert (box[:, ::2] + box[:, 1::2] <= 1 + 1e-6).all()


def test_mix_adds_powers():
    x, y = torch.randn(2, 3, 4, 5)
    got = loader.mix(x, y, torch.tensor([0.0, 0.25, 0.5]))
    ratio = torch.tensor([0.0, 0.25, 0.5]).view(3, 1, 1)
    torch.testing.assert_close(got, ((1 - ratio) * x.exp() + ratio * y.exp()).log())
    assert torch.equal(got[0], x[0])


def test_resize_crop_stretches_the_box():
    x = torch.randn(3, 8, 12)
    whole = torch.tensor([[0.0, 1.0, 0.0, 1.0]]).expand(3, 4)
    torch.testing.assert_close(loader.resize_crop(x, whole), x, atol=1e-5, rtol=0)

    def weights(position, size):  # of cubic convolution with a = −0.75, clamped at the ends
        row = torch.zeros(size)
        for tap in range(math.floor(position) - 1, math.floor(position) + 3):
            d = abs(position - tap)
            value = 1.25 * d**3 - 2.25 * d**2 + 1 if d <= 1 else -0.75 * (d**3 - 5 * d**2 + 8 * d - 4)
            row[min(max(tap, 0), size - 1)] += value
        return row

    box = torch.tensor([[0.25, 0.5, 0.1, 0.7], [0.0, 0.6, 0.4, 0.6], [0.4, 0.6, 0.0, 1.0]])
    for got, plane, (bottom, height, start, width) in zip(loader.resize_crop(x, box), x, box.tolist(), strict=True):
        rows = torch.stack([weights(8 * bottom + height * (n + 0.5) - 0.5, 8) for n in range(8)])
        columns = torch.stack([weights(12 * start + width * (n + 0.5) - 0.5, 12) for n in range(12)])
        torch.testing.assert_close(got, rows @ plane @ columns.T, atol=1e-4, rtol=0)


# --- files that cannot be decoded ---


def spoil(folder, *names):
    (folder / names[0]).write_bytes(b"")
    for name in names[1:]:
        (folder / name).write_bytes(b"RIFF" + bytes(60))


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_files_are_replaced_and_listed(folder, workers):
    spoil(folder, "05.wav", "11.wav")
    batches = ClipLoader(crops(folder, max_failed=0.1, **AUGMENTED), 6, workers=workers)
    got = list(batches)
    assert [len(batch["index"]) for batch in got] == [6] * 4
    for batch in got:
        indices = batch["index"].tolist()
        assert not {5, 11} & set(indices)
        assert len(set(indices)) == 6  # nothing twice in a batch: it would be its own negative
        assert batch.keys() == {"log_mel", "index"}
    assert batches.failed.keys() == {5, 11}
    lines = batches.report().splitlines()
    assert lines[0] == "2 of 24 clips could not be decoded:"
    assert lines[1] == "  05.wav: is empty (0 bytes)"
    assert lines[2].startswith("  11.wav: cannot be read as sound")
    assert len(batches.report(most=1).splitlines()) == 3
    # the others' crops are what they would be without the bad files
    good = crops(folder, max_failed=0.1, **AUGMENTED | {"mix": 0}).__getitems__([(0, 3)])["log_mel"]
    alone = crops([clip for clip in find(folder) if clip.name != "11.wav"], resize_crop=0.6)
    assert torch.equal(good, alone.__getitems__([(0, 3)])["log_mel"])


@pytest.mark.parametrize("bad", [3, 24])
def test_too_many_bad_files_stop(folder, bad):
    spoil(folder, *(f"{n:02}.wav" for n in range(bad)))
    with pytest.raises(
        TooManyFailedError, match="clips could not be decoded, more than the 2 that max_failed"
    ) as caught:
        epochs(ClipLoader(crops(folder, max_failed=0.1), 6), 2)
    assert "00.wav" in str(caught.value) or bad == 24
    epochs(ClipLoader(crops(folder, max_failed=0.125), 6), 2) if bad == 3 else None


@pytest.mark.parametrize("workers", [0, 2])
def test_silence_is_no_replacement_for_all(folder, workers):
    """However many may fail, there is nothing to train on when all do."""
    spoil(folder, *(f"{n:02}.wav" for n in range(24)))
    with pytest.raises(TooManyFailedError, match="24 of 24 clips could not be decoded, more than the 23 that"):
        next(iter(ClipLoader(crops(folder, max_failed=1), 6, workers=workers)))


def test_replacements_differ(folder):
    spoil(folder, *(f"{n:02}.wav" for n in range(12)))
    batch = crops(folder, max_failed=0.5).__getitems__([(0, index) for index in range(12)])
    assert sorted(batch["index"].tolist()) == list(range(12, 24))


def test_a_set_of_one_batch_fills_up(tmp_path):
    """Where every clip is in the batch, the replacement is one of them."""
    for n in range(3):
        shutil.copy(BUNDLED[n].path, tmp_path / f"{n}.flac")
    (tmp_path / "3.flac").write_bytes(b"")
    (batch,) = ClipLoader(crops(tmp_path, max_failed=0.5), 4)
    assert sorted(set(batch["index"].tolist())) == [0, 1, 2]


def test_bad_arguments(folder):
    for options in ({"frames": 0}, {"seed": -1}, {"mix": 1.5}, {"resize_crop": 0}, {"max_failed": math.nan}):
        (name,) = options
        with pytest.raises(ValueError, match=f"{name}: expected (a number in|an int, at least)"):
            crops(folder, **options)
    for name in ("frames", "seed"):
        with pytest.raises(ValueError, match=f"{name}: expected an int, at least [01], got True"):
            crops(folder, **{name: True})
    with pytest.raises(ValueError, match="workers: expected an int, at least 0, got True"):
        ClipLoader(crops(folder), 6, workers=True)
    with pytest.raises(ValueError, match="batch_size: expected at most the 24 clips there are, got 50 in all"):
        ClipLoader(crops(folder), 25, world=2)
    with pytest.raises(ValueError, match="batch_size: expected an int, at least 1, got 0"):
        ClipLoader(crops(folder), 0)
