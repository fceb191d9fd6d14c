"""Probes: above chance where there is something to find, at chance where there is not, blind to the test fold."""

import numpy as np
import pytest
import torch

from aape_ssl.demo import command as demo
from aape_ssl.evaluation import probe
from aape_ssl.evaluation.embedding import statistics
from aape_ssl.sound.audio import AUDIOSET128
from aape_ssl.sound.sources import Clip, find

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
    (score,) = probe.evaluate("blobs", features, clips, ("linear",))
    assert score.accuracy > 0.9
    assert score.size == WIDTH
    assert len(score.correct) == len(clips)
    assert set(score.correct.tolist()) <= {0.0, 1.0}
    # cosine sees the scale of the features: kNN gets them without it
    (near,) = probe.evaluate("blobs", (features - features.mean(0)) / features.std(0), clips, ("knn",))
    assert near.accuracy > 0.9


def test_shuffled_labels_are_at_chance(rng):
    """Fixed numbers of clips per class and fold keep chance at 1/4; the bound is 4.5 standard deviations."""
    features, clips = blobs(rng)
    shuffled = rng.permutation([clip.label for clip in clips]).tolist()
    clips = clips_of(shuffled, [clip.split for clip in clips])
    bound = 4.5 * np.sqrt(0.25 * 0.75 / len(clips))
    for score in probe.evaluate("noise", features, clips, ("linear", "knn")):
        assert abs(score.accuracy - 0.25) < bound
        low, high = probe.interval(score.correct, score.groups)
        assert low < score.accuracy < high


def test_the_test_fold_is_not_looked_at(rng, monkeypatch):
    """Spoilt features and labels of the test fold change no probe."""
    features, clips = blobs(rng, spread=6.0)
    kept = []
    fit = probe.fit_logistic
    monkeypatch.setattr(probe, "fit_logistic", lambda *args: kept.append(fit(*args)) or kept[-1])
    (honest,) = probe.evaluate("a", features, clips, ("linear",), test=["3"])
    inside = np.array([clip.split == "3" for clip in clips])
    spoilt = np.where(inside[:, None], 1e3 * rng.standard_normal(features.shape), features).astype(np.float32)
    labels = ["c0" if hidden else clip.label for clip, hidden in zip(clips, inside, strict=True)]
    (other,) = probe.evaluate("b", spoilt, clips_of(labels, [c.split for c in clips]), ("linear",), test=["3"])
    before, after = kept
    assert before.strength == after.strength
    for part in ("weight", "bias", "mean", "scale"):
        np.testing.assert_array_equal(getattr(before, part), getattr(after, part))
    assert other.accuracy < honest.accuracy


def parts(rng, spread=8.0):
    """Training and validation of classes that overlap, in more features than help."""
    features, clips = blobs(rng, spread)
    features = np.concatenate([features, rng.standard_normal((len(features), 200)).astype(np.float32)], 1)
    y = np.array([int(clip.label[1]) for clip in clips])
    return (features[:120], y[:120]), (features[120:], y[120:])


def slow_fit(features, y, strength):
    """Weights (D + 1, classes) at which the objective's gradient vanishes, by Newton steps with the whole Hessian."""
    x = np.concatenate([features, np.ones((len(features), 1))], 1)
    target = np.eye(y.max() + 1)[y]
    w = np.zeros((x.shape[1], target.shape[1]))
    penalty = np.ones_like(w)
    penalty[-1] = 0  # the intercepts are free, and known up to what is common to them all
    for _ in range(50):
        p = np.exp(x @ w - (x @ w).max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        gradient = strength * x.T @ (p - target) + penalty * w
        between = p[:, :, None] * np.eye(p.shape[1]) - p[:, :, None] * p[:, None]
        hessian = strength * np.einsum("nd,nkl,ne->dkel", x, between, x).reshape(w.size, w.size)
        step = np.linalg.solve(hessian + np.diag(penalty.ravel()) + 1e-9 * np.eye(w.size), gradient.ravel())
        w = w - 0.5 * step.reshape(w.shape) if np.abs(step).max() > 0.1 else w - step.reshape(w.shape)
    assert np.abs(gradient).max() < 1e-6
    return w


def test_it_is_the_minimum_on_training_and_validation(rng):
    features, clips = blobs(rng, spread=8.0)
    y = np.array([int(clip.label[1]) for clip in clips])
    train, valid = (features[:120], y[:120]), (features[120:200], y[120:200])
    fitted = probe.fit_logistic(train, valid)
    seen = features[:200].astype(float)
    mean, scale = seen.mean(0), seen.std(0)
    np.testing.assert_allclose(fitted.mean, mean, rtol=1e-4)
    np.testing.assert_allclose(fitted.scale, scale, rtol=1e-4)
    expected = slow_fit((seen - mean) / scale, y[:200], fitted.strength)
    weight = fitted.weight.T
    np.testing.assert_allclose(weight, expected[:-1], atol=0.05 * np.abs(expected).max())
    tested = features[200:]
    scores = (tested - mean) / scale @ expected[:-1] + expected[-1]
    assert (fitted.predict(tested) == scores.argmax(1)).mean() > 0.9


@pytest.mark.parametrize("strength", probe.STRENGTHS)
def test_every_strength_converges(rng, strength):
    features, clips = blobs(rng, spread=8.0)
    y = np.array([int(clip.label[1]) for clip in clips])
    x = (features - features.mean(0)) / features.std(0)
    expected = slow_fit(x.astype(float), y, strength)[:-1]
    got = probe._solve(x, y, strength)
    np.testing.assert_allclose(got.weight.T, expected, atol=0.01 * np.abs(expected).max())


def test_validation_chooses_the_strength(rng):
    """Among models of the training clips alone, standardised by these; of equal ones the most regularised."""
    from sklearn.linear_model import LogisticRegression

    chosen = set()
    for spread in (2.0, 8.0, 16.0):
        train, valid = parts(rng, spread)
        mean, scale = train[0].mean(0), train[0].std(0)
        accuracies = [
            LogisticRegression(C=c, max_iter=20_000, tol=1e-7)
            .fit((train[0] - mean) / scale, train[1])
            .score((valid[0] - mean) / scale, valid[1])
            for c in probe.STRENGTHS
        ]
        fitted = probe.fit_logistic(train, valid)
        # another solver's rounding may turn a clip or two
        assert fitted.accuracy == pytest.approx(max(accuracies), abs=2.01 / len(valid[1]))
        assert accuracies[probe.STRENGTHS.index(fitted.strength)] >= max(accuracies) - 2.01 / len(valid[1])
        # labels as one of the models gives them: that one is chosen, or a more regularised one that gives the same
        for c in probe.STRENGTHS:
            given = probe._solve(*train, c).predict(valid[0])
            told = probe.fit_logistic(train, (valid[0], given))
            assert told.strength <= c
            assert told.accuracy > 0.98
            chosen.add(told.strength)
    assert len(chosen) >= 2


def test_a_probe_that_does_not_converge_is_not_used(rng, monkeypatch):
    monkeypatch.setattr(probe, "ITERATIONS", 2)
    with pytest.raises(
        ValueError, match=r"features: logistic regression with C = 0.0+1 does not converge: a derivative of"
    ):
        probe.fit_logistic(*parts(rng))


def test_two_classes_one_of_them_only_in_validation(rng):
    """Classes stay the numbers they are, also where training lacks the lowest one."""
    x = rng.standard_normal((90, 3)).astype(np.float32)
    y = np.repeat([1, 4, 0], 30)
    x += 20 * np.eye(3, dtype=np.float32)[np.repeat(range(3), 30)]
    fitted = probe.fit_logistic((x[:60], y[:60]), (x[60:], y[60:]))
    assert (fitted.predict(x) == y).all()


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
    ((_, valid, test),) = probe.folds_of(clips, ["4", "4"])
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
            "expected splits train, valid and test, or folds, got test, train",
        ),
        (
            ["train", "val", "test", "extra"],
            None,
            "expected splits train, valid and test, or folds, got extra, test, t",
        ),
        (["train", "val", "dev", "test"], None, "expected splits train, valid and test, or folds, got dev, test, t"),
        (["train", "0", "1", "2"], None, "expected splits train, valid and test, or folds, got 0, 1, 2, train"),
        (["0", "1", "0"], None, "or at least 3 folds, got 0, 1"),
        (["0", "1", "2"], ["5"], "test: expected folds among 0, 1, 2, got 5"),
    ],
)
def test_bad_folds(folds, test, reason):
    with pytest.raises(ValueError, match=reason):
        probe.folds_of(clips_of(list("abcd")[: len(folds)], folds), test)


def test_bad_features(rng):
    features, clips = blobs(rng)
    with pytest.raises(ValueError, match="features: expected finite ones of 240 clips"):
        probe.evaluate("x", features[1:], clips)
    with pytest.raises(ValueError, match="methods: expected linear or knn, got knn, logistic"):
        probe.evaluate("x", features, clips, ("knn", "logistic"))
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


def test_no_interval_of_one_group():
    with pytest.warns(UserWarning, match="groups: there is only 'all' among the test clips, so no interval"):
        assert np.isnan(probe.interval(np.array([1.0, 0.0]), ["all", "all"])).all()


def test_folds_that_are_numbers_are_in_their_order():
    folds = [str(n) for n in range(1, 12)]
    clips = clips_of(list("a" * 11), folds)
    assert [(clips[valid[0]].split, clips[test[0]].split) for _, valid, test in probe.folds_of(clips)] == [
        *zip(folds[1:] + folds[:1], folds, strict=True)
    ]


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
    (linear,) = probe.evaluate("statistics", features, pieces, ("linear",))
    assert linear.accuracy > 0.5  # chance: 1/6


@pytest.mark.parametrize(
    "names",
    [
        ("train", "val", "test"),
        ("Training", "VALIDATION", "Test"),
        ("train", "dev", "eval"),
        ("TRAIN", "valid", "testing"),
    ],
)
def test_usual_names_of_splits(names):
    train, valid, test = names
    clips = clips_of(list("aaaa"), [train, test, valid, train])
    ((trained, validated, tested),) = probe.folds_of(clips, [test])
    assert (trained.tolist(), validated.tolist(), tested.tolist()) == ([0, 3], [2], [1])


def test_groups_on_both_sides_are_warned_of():
    clips = clips_of(list("abab") * 3, ["0", "1", "2"] * 4, list("xyzx") * 3)
    with pytest.warns(UserWarning, match=r"groups: 3 of 3, such as 'x', have clips in more than one of"):
        probe.folds_of(clips)
    apart = clips_of(list("abc"), ["0", "1", "2"], ["x", "y", "z"])
    without = clips_of(list("abc"), ["0", "1", "2"], ["", "", ""])
    assert len(probe.folds_of(apart)) == len(probe.folds_of(without)) == 3


def test_labels_that_no_training_clip_has_are_warned_of(rng):
    labels, splits = list("ab" * 8 + "abc"), ["train"] * 14 + ["valid"] * 2 + ["test"] * 3
    features = rng.standard_normal((19, 4)).astype(np.float32)
    with pytest.warns(UserWarning, match="labels: 1 of 3, such as 'c', are validated or tested and are not among"):
        probe.evaluate("x", features, clips_of(labels, splits), ("knn",))


def test_clips_without_a_label_are_refused(rng):
    features = rng.standard_normal((6, 4)).astype(np.float32)
    with pytest.raises(ValueError, match="clips: expected a label for each, 4 has none"):
        probe.evaluate("x", features, clips_of(["a", "b", "a", "b", "", "a"], list("012012")))
