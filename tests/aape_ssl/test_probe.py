"""Probes: above chance where there is something to find, at chance where there is not, blind to the test fold."""

import numpy as np
import pytest
import torch

from aape_ssl import demo, probe
from aape_ssl.audio import AUDIOSET128
from aape_ssl.embedding import statistics
from aape_ssl.sources import Clip, find

CLASSES, FOLDS, EACH, WIDTH = 4, 5, 12, 20


@pytest.fixture
def rng():
    return np.random.default_rng(torch.initial_seed() % 2**31)


def clips_of(labels, folds, groups=None):
    groups = groups or [f"g{n}" for n in range(len(labels))]
    rows = zip(labels, folds, groups, strict=True)
    return [Clip(f"{n}", None, label, fold, group) for n, (label, fold, group) in enumerate(rows)]


def blobs(rng, spread=1.0):
    """Gaussian classes in features of unequal scale and offset, evenly over the folds."""
    count = CLASSES * FOLDS * EACH
    y = np.arange(count) % CLASSES
    centres = 3 * rng.standard_normal((CLASSES, WIDTH))
    features = centres[y] + spread * rng.standard_normal((count, WIDTH))
    scale = 10 ** rng.uniform(-2, 2, WIDTH)
    features = features * scale + 3 * scale
    return features.astype(np.float32), clips_of(
        [f"c{k}" for k in y], [str(n // CLASSES % FOLDS) for n in range(count)]
    )


def test_separable_classes_are_found(rng):
    features, clips = blobs(rng)
    scores = probe.evaluate("blobs", features, clips, ("linear", "logistic"))
    for score in scores:
        assert score.accuracy > 0.9
        assert score.size == WIDTH
        assert len(score.correct) == len(clips)
    # cosine sees the scale of the features: kNN gets them without it
    (near,) = probe.evaluate("blobs", (features - features.mean(0)) / features.std(0), clips, ("knn",))
    assert near.accuracy > 0.9


def test_shuffled_labels_are_at_chance(rng):
    """Fixed numbers of clips per class and fold keep chance at 1/4; the bound is 4.5 standard deviations."""
    features, clips = blobs(rng)
    shuffled = rng.permutation([clip.label for clip in clips]).tolist()
    clips = clips_of(shuffled, [clip.split for clip in clips])
    bound = 4.5 * np.sqrt(0.25 * 0.75 / len(clips))
    for score in probe.evaluate("noise", features, clips, ("linear", "knn", "logistic")):
        assert abs(score.accuracy - 0.25) < bound
        low, high = probe.interval(score.correct, score.groups)
        assert low < score.accuracy < high


def test_the_test_fold_is_not_looked_at(rng, monkeypatch):
    """Spoilt features and labels of the test fold change no probe: same weights, same epoch."""
    features, clips = blobs(rng, spread=6.0)
    kept = []
    fit = probe.fit_linear
    monkeypatch.setattr(probe, "fit_linear", lambda *args: kept.append(fit(*args)) or kept[-1])
    (honest,) = probe.evaluate("a", features, clips, ("linear",), test=["3"])
    inside = np.array([clip.split == "3" for clip in clips])
    spoilt = np.where(inside[:, None], 1e3 * rng.standard_normal(features.shape), features).astype(np.float32)
    labels = ["c0" if hidden else clip.label for clip, hidden in zip(clips, inside, strict=True)]
    (other,) = probe.evaluate("b", spoilt, clips_of(labels, [c.split for c in clips]), ("linear",), test=["3"])
    assert len(kept) == 6
    for before, after in zip(kept[:3], kept[3:], strict=True):
        assert before.epoch == after.epoch
        assert torch.equal(before.weight, after.weight)
        assert torch.equal(before.mean, after.mean)
    assert len({fitted.epoch for fitted in kept[:3]}) > 1 or not torch.equal(kept[0].weight, kept[1].weight)
    assert other.accuracy < honest.accuracy


def test_the_epoch_is_the_best_on_validation(rng, monkeypatch):
    """Validation labels that nothing predicts well: the kept weights give the accuracy that is reported."""
    features, clips = blobs(rng, spread=8.0)
    y = np.array([int(clip.label[1]) for clip in clips])
    train, valid = slice(0, 120), slice(120, 200)
    fitted = probe.fit_linear((features[train], y[train]), (features[valid], y[valid]), CLASSES)
    assert (fitted.predict(features[valid]) == y[valid]).mean() == pytest.approx(fitted.accuracy)
    shorter = probe.fit_linear(
        (features[train], y[train]), (features[valid], y[valid]), CLASSES, epochs=fitted.epoch + 1, patience=1000
    )
    assert torch.equal(shorter.weight, fitted.weight)
    # against labels of chance the accuracy goes up and down: what is kept never does, and it ends
    noise = rng.integers(0, CLASSES, 80)
    parts = (features[train], y[train]), (features[valid], noise)
    best = [probe.fit_linear(*parts, CLASSES, lr=0.1, epochs=epochs).accuracy for epochs in range(1, 25)]
    assert best == sorted(best)
    orders = []
    shuffle = torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda *args, **options: orders.append(args) or shuffle(*args, **options))
    stopped = probe.fit_linear(*parts, CLASSES, lr=0.1, epochs=5000, patience=3)
    assert len(orders) == stopped.epoch + 1 + 3
    for part, expected in (("mean", features[train].mean(0)), ("scale", features[train].std(0))):
        np.testing.assert_allclose(getattr(fitted, part), expected, rtol=1e-4)


def test_constant_features_do_no_harm(rng):
    features, clips = blobs(rng)
    features[:, 3] = 7
    (score,) = probe.evaluate("blobs", features, clips, ("linear",))
    assert score.accuracy > 0.9


@pytest.mark.parametrize("k", [1, 5, 10])
def test_knn_is_the_slow_vote(rng, k):
    train = rng.standard_normal((60, 7)).astype(np.float32)
    labels = rng.integers(0, 4, 60)
    queries = rng.standard_normal((40, 7)).astype(np.float32) * 10 ** rng.uniform(-3, 3, (40, 1)).astype(np.float32)
    expected = []
    for query in queries:
        similarity = [
            float(query @ row) / (np.linalg.norm(query.astype(float)) * np.linalg.norm(row.astype(float)))
            for row in train.astype(float)
        ]
        nearest = sorted(range(60), key=lambda n: -similarity[n])[:k]
        votes = [sum(labels[n] == kind for n in nearest) for kind in range(4)]
        expected.append(votes.index(max(votes)))
    assert probe.knn((train, labels), queries, k).tolist() == expected
    with pytest.raises(ValueError, match="k: expected at most the 60 training clips there are, got 61"):
        probe.knn((train, labels), queries, 61)


def test_rounds_test_every_fold_once():
    clips = clips_of(list("ab" * 10), list("01234" * 4))
    rounds = probe.folds_of(clips)
    assert len(rounds) == 5
    assert sorted(np.concatenate([test for _, _, test in rounds]).tolist()) == list(range(20))
    for train, valid, test in rounds:
        assert sorted([*train, *valid, *test]) == list(range(20))
        assert {int(clips[n].split) for n in valid} == {(int(clips[test[0]].split) + 1) % 5}
    ((_, valid, test),) = probe.folds_of(clips, ["4"])
    assert {clips[n].split for n in test} == {"4"}
    ((train, valid, test),) = probe.folds_of(clips_of(list("aaaa"), ["train", "test", "valid", "train"]))
    assert (train.tolist(), valid.tolist(), test.tolist()) == ([0, 3], [2], [1])


@pytest.mark.parametrize(
    ("folds", "test", "reason"),
    [
        (["0", "", "1"], None, "clips: expected each to have a split or fold, 1 has none"),
        (
            ["train", "test", "test"],
            None,
            "expected splits train, valid and test, or at least 3 folds, got test, train",
        ),
        (["0", "1", "2"], ["5"], "test: expected folds among 0, 1, 2, got 5"),
    ],
)
def test_bad_folds(folds, test, reason):
    with pytest.raises(ValueError, match=reason):
        probe.folds_of(clips_of(list("abc"), folds), test)


def test_bad_features(rng):
    features, clips = blobs(rng)
    with pytest.raises(ValueError, match="features: expected finite ones of 240 clips"):
        probe.evaluate("x", features[1:], clips)
    features[3, 3] = np.nan
    with pytest.raises(ValueError, match="features: expected finite ones"):
        probe.evaluate("x", features, clips)


def test_interval_of_independent_clips_is_the_binomials(rng):
    correct = (rng.random(2000) < 0.7).astype(float)
    low, high = probe.interval(correct, [str(n) for n in range(2000)])
    half = 1.96 * correct.std() / np.sqrt(2000)
    assert low == pytest.approx(correct.mean() - half, abs=0.15 * half)
    assert high == pytest.approx(correct.mean() + half, abs=0.15 * half)


def test_interval_draws_whole_groups(rng):
    """Twenty groups, right or wrong as one: as wide as for twenty clips."""
    correct = np.repeat((np.arange(20) < 12).astype(float), 100)
    low, high = probe.interval(correct, [str(n // 100) for n in range(2000)])
    half = 1.96 * np.sqrt(0.6 * 0.4 / 20)
    assert high - low == pytest.approx(2 * half, rel=0.15)
    assert probe.interval(np.ones(10), list("aabbccddee")) == (1.0, 1.0)


def test_table_has_the_feature_size(rng):
    features, clips = blobs(rng)
    lines = probe.table(probe.evaluate("blobs", features, clips, ("knn",), test=["0"])).splitlines()
    assert len(lines) == 2
    assert lines[1].split()[:3] == ["blobs", "knn", str(WIDTH)]


def test_real_clips(tmp_path):
    """Pieces of the bundled clips are told apart by their statistics; which piece it was is the fold."""
    import soundfile

    for clip in find(demo.bundled_clips()[0].parent):
        waveform = clip.load()
        for fold, piece in enumerate(waveform.chunk(6)):
            soundfile.write(tmp_path / f"{fold}-{clip.path.stem}.wav", piece.numpy(), 16000, subtype="FLOAT")
    pieces = [Clip(clip.name, clip.path, clip.path.stem[2:], clip.name[0]) for clip in find(tmp_path)]
    features = statistics(pieces, AUDIOSET128)
    logistic, linear = probe.evaluate("statistics", features, pieces, ("logistic", "linear"))
    assert logistic.accuracy > 0.5  # chance: 1/6
    assert linear.accuracy > 0.5
