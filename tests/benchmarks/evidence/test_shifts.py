"""Probes on shifted clips: of an encoder that sees where content lies in a patch, and of one that does not."""

import numpy as np
import pytest
import soundfile
import torch

from aape_ssl.evaluation.probe import evaluate
from aape_ssl.sound.audio import AUDIOSET128
from aape_ssl.sound.sources import Clip
from benchmarks.evidence.shifts import right_by_shift
from benchmarks.evidence.spectrograms import Spectrograms, features

FRAMES, FOLDS, EACH = 32, 4, 15


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A click 40 ms or 110 ms after the beginning, among noise; as many of both in every fold."""
    folder = tmp_path_factory.mktemp("clicks")
    rng = np.random.default_rng(0)
    found = []
    for number in range(2 * FOLDS * EACH):
        late, fold = number % 2, number // 2 % FOLDS
        waveform = 1e-3 * rng.standard_normal(6000)
        at = (1760 if late else 640) + int(rng.integers(0, 80))
        waveform[at : at + 100] += 0.3 * rng.standard_normal(100)
        path = folder / f"{number}.wav"
        soundfile.write(path, waveform, 16000, subtype="FLOAT")
        found.append(Clip(path.name, path, "late" if late else "early", str(fold), f"g{number}"))
    return found


def by_place(x):
    """Energy of each frame of a patch: knows where in the patch a click is, and nothing of where the clip begins."""
    blocks = x[:, 0].mean(1).unflatten(1, (-1, 16))  # [B, N_t, 16]
    return blocks, (1, blocks.shape[1])


def from_the_start(x):
    """Energy of the frames after the clip's first one, wherever that is: nothing changes with the shift."""
    level = x[:, 0].mean(1)
    start = (level > float(AUDIOSET128.normalise(torch.tensor(AUDIOSET128.floor))) + 0.05).int().argmax(1)
    index = (start[:, None] + torch.arange(16)).clamp(max=level.shape[1] - 1)
    return level.gather(1, index).unsqueeze(1).expand(-1, 2, -1), (1, 2)


@pytest.fixture(scope="module")
def kept(clips, tmp_path_factory):
    return Spectrograms.of(clips, AUDIOSET128, FRAMES, cache=tmp_path_factory.mktemp("cache"))


def test_where_content_lies_matters_to_a_probe_that_saw_one_place(clips, kept):
    found = right_by_shift(by_place, kept, clips)
    assert {name: each.shape for name, each in found.items()} == dict.fromkeys(
        ("unshifted", "shifted"), (16, len(clips))
    )
    unshifted, shifted = (found[name].mean(1) for name in ("unshifted", "shifted"))
    assert unshifted[0] == 1
    assert unshifted[5] < 0.2  # early clicks come to lie where late ones were
    # the other probe saw all places: it is not misled there, and knows less of shift 0
    assert shifted[5] > 0.5
    assert shifted[0] < 0.8


def test_an_encoder_that_does_not_see_the_grid_loses_nothing(clips, kept):
    for each in right_by_shift(from_the_start, kept, clips, ["2", "0"]).values():
        assert each.shape == (16, len(clips) // 2)
        assert each.mean() > 0.95


def test_at_shift_0_it_is_the_probe_of_all_rows(clips, kept):
    found = right_by_shift(by_place, kept, clips, ["1"])
    (score,) = evaluate("", features(by_place, kept), clips, ("linear",), test=["1"])
    np.testing.assert_array_equal(found["unshifted"][0], score.correct)


def test_shifts_are_drawn_by_the_seed(clips, kept, monkeypatch):
    asked = []

    def spy(encoder, spectrograms, shift, rows, **options):
        asked.append(np.array(shift))
        return features(encoder, spectrograms, shift, rows, **options)

    monkeypatch.setattr("benchmarks.evidence.shifts.features", spy)
    for seed in (0, 0, 1):
        right_by_shift(by_place, kept, clips, ["1"], seed)
    drawn = [shift for shift in asked if shift.ndim]
    assert len(drawn) == 3
    assert (drawn[0] == drawn[1]).all()
    assert (drawn[0] != drawn[2]).any()
    assert set(drawn[0].tolist()) == set(range(16))
    assert [int(shift) for shift in asked if not shift.ndim][1:17] == list(range(16))
