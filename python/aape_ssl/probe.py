"""How good frozen embeddings are: a linear probe and kNN over folds, beside the statistics baseline.

After EVAR (time-mean of frequency-concatenated tokens, StandardScaler fitted on train, one linear layer, early
stopping on validation, three seeds) and X-ARES (kNN, k = 10). The test fold is seen once, by a finished probe.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .sources import Clip

__all__ = [
    "LinearProbe",
    "Score",
    "evaluate",
    "fit_linear",
    "folds_of",
    "interval",
    "knn",
    "logistic",
    "table",
]

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Round = tuple[Ints, Ints, Ints]  # indices of train, validation and test clips


@dataclass(frozen=True)
class LinearProbe:
    """Standardisation and one linear layer.

    Attributes:
        mean, scale: (D) of the training features.
        weight, bias: (classes, D), (classes).
        epoch: the one whose weights these are, from 0.
        accuracy: of that epoch on validation.
    """

    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor
    epoch: int
    accuracy: float

    def predict(self, features: Floats) -> Ints:
        """Classes (n) of features (n, D)."""
        x = (torch.from_numpy(features) - self.mean) / self.scale
        classes: Ints = (x @ self.weight.T + self.bias).argmax(1).numpy()
        return classes


def fit_linear(
    train: tuple[Floats, Ints],
    validation: tuple[Floats, Ints],
    classes: int,
    seed: int = 0,
    *,
    lr: float = 1e-3,
    batch_size: int = 128,
    epochs: int = 200,
    patience: int = 20,
) -> LinearProbe:
    """Cross-entropy by Adam; the epoch of the best validation accuracy (of equal ones the least loss) is kept.

    Stops when `patience` epochs brought nothing better. Features (n, D) float32, classes (n) int64.
    """
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(train[0])
    x, held = (torch.from_numpy(scaler.transform(part[0]).astype(np.float32)) for part in (train, validation))
    y, held_y = (torch.from_numpy(part[1]) for part in (train, validation))
    generator = torch.Generator().manual_seed(seed)
    bound = x.shape[1] ** -0.5
    weight = torch.empty(classes, x.shape[1]).uniform_(-bound, bound, generator=generator).requires_grad_()
    bias = torch.zeros(classes, requires_grad=True)
    optimiser = torch.optim.Adam([weight, bias], lr)
    best, chosen, kept = (-1.0, 0.0), 0, (weight, bias)
    for epoch in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(batch_size):
            loss = torch.nn.functional.cross_entropy(x[rows] @ weight.T + bias, y[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        with torch.no_grad():
            logits = held @ weight.T + bias
            accuracy = float((logits.argmax(1) == held_y).float().mean())
            quality = (accuracy, -float(torch.nn.functional.cross_entropy(logits, held_y)))
        if quality > best:
            best, chosen, kept = quality, epoch, (weight.detach().clone(), bias.detach().clone())
        elif epoch - chosen >= patience:
            break
    mean, scale = (torch.from_numpy(part.astype(np.float32)) for part in (scaler.mean_, scaler.scale_))
    return LinearProbe(mean, scale, *kept, epoch=chosen, accuracy=best[0])


def knn(train: tuple[Floats, Ints], features: Floats, k: int = 10) -> Ints:
    """Classes (n) by the vote of the k training clips nearest by cosine; of equal votes the lower class.

    Errors: `ValueError` for fewer than k training clips.
    """
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.preprocessing import normalize

    if len(train[0]) < k:
        raise ValueError(f"k: expected at most the {len(train[0])} training clips there are, got {k}")
    # on unit rows the nearest by Euclid are the nearest by cosine; a row is a clip
    model = KNeighborsClassifier(k, algorithm="brute").fit(normalize(train[0]), train[1])
    classes: Ints = model.predict(normalize(features))
    return classes


def logistic(train: tuple[Floats, Ints], features: Floats) -> Ints:
    """Classes (n) by logistic regression on standardised features, C = 1: the statistics baseline's classifier."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model: Any = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000)).fit(*train)
    classes: Ints = model.predict(features)
    return classes


def folds_of(clips: Sequence[Clip], test: Sequence[str] | None = None) -> list[Round]:
    """Train, validation and test indices of each round.

    Where the splits are train, valid and test there is one. Otherwise each fold is tested once, the next one (of the
    last, the first) being validation and the others training; `test` keeps the rounds of these test folds.

    Errors: `ValueError` for fewer than three folds, a clip without one, or a test fold that is not there.
    """
    of = np.array([clip.split for clip in clips])
    names = sorted(set(of.tolist()))
    if "" in names:
        raise ValueError(f"clips: expected each to have a split or fold, {clips[of.tolist().index('')].name} has none")
    if names == ["test", "train", "valid"]:
        rounds = {"test": ("valid", ["train"])}
    elif len(names) < 3:
        raise ValueError(f"clips: expected splits train, valid and test, or at least 3 folds, got {', '.join(names)}")
    else:
        following = dict(zip(names, names[1:] + names[:1], strict=True))
        rounds = {name: (following[name], [n for n in names if n not in (name, following[name])]) for name in names}
    wanted = list(rounds) if test is None else list(test)
    if not set(wanted) <= set(rounds):
        raise ValueError(f"test: expected folds among {', '.join(rounds)}, got {', '.join(wanted)}")
    where = [(rounds[name][1], [rounds[name][0]], [name]) for name in wanted]
    return [(*(np.flatnonzero(np.isin(of, part)) for part in parts),) for parts in where]  # type: ignore[misc]


def interval(values: NDArray[Any], groups: Sequence[str], level: float = 0.95) -> tuple[float, float]:
    """Bootstrap interval of the mean of `values` (n), drawing whole groups: clips of one do not err independently.

    For the difference between two encoders pass the difference of their `Score.correct`.
    """
    _, of = np.unique(np.asarray(groups), return_inverse=True)
    totals, counts = np.bincount(of, values), np.bincount(of)
    drawn = np.random.default_rng(0).multinomial(len(counts), np.full(len(counts), 1 / len(counts)), 2000)
    low, high = np.quantile(drawn @ totals / (drawn @ counts), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class Score:
    """Accuracy of one embedding under one classifier.

    Attributes:
        name, method: what was scored, and how.
        size: features a clip.
        correct: (test clips) share of seeds by which each was classified correctly, in the rounds' order.
        groups: of the test clips, for `interval`.
    """

    name: str
    method: str
    size: int
    correct: NDArray[np.float64]
    groups: tuple[str, ...]

    @property
    def accuracy(self) -> float:
        """Over all test clips."""
        return float(self.correct.mean())


def evaluate(
    name: str,
    features: Floats,
    clips: Sequence[Clip],
    methods: Sequence[str] = ("linear", "knn"),
    seeds: Sequence[int] = (0, 1, 2),
    test: Sequence[str] | None = None,
) -> list[Score]:
    """One `Score` a method ("linear", "knn" or "logistic"), over the rounds of `folds_of` and, for "linear", seeds."""
    known = {"knn": knn, "logistic": logistic}
    if not np.isfinite(features).all() or len(features) != len(clips):
        raise ValueError(f"features: expected finite ones of {len(clips)} clips, got {features.shape}")
    labels = sorted({clip.label for clip in clips})
    y = np.array([labels.index(clip.label) for clip in clips], dtype=np.int64)
    rounds = folds_of(clips, test)
    groups = tuple(clips[index].group or clips[index].name for _, _, tested in rounds for index in tested)
    scores = []
    for method in methods:
        correct = []
        for train, valid, tested in rounds:
            seen, held = (features[train], y[train]), (features[valid], y[valid])
            if method == "linear":
                found = [fit_linear(seen, held, len(labels), seed).predict(features[tested]) for seed in seeds]
            else:
                found = [known[method](seen, features[tested])]
            correct.append(np.mean([classes == y[tested] for classes in found], axis=0))
        scores.append(Score(name, method, features.shape[1], np.concatenate(correct), groups))
    return scores


def table(scores: Sequence[Score]) -> str:
    """A line a score: accuracy in %, its 95 % interval over groups, and the feature size, which accuracy grows with."""
    width = max(len(score.name) for score in scores)
    lines = [f"{'':{width}}  method    features  accuracy  95 % interval"]
    for score in scores:
        low, high = interval(score.correct, score.groups)
        bounds = f"{100 * low:.1f} to {100 * high:.1f}"
        lines.append(
            f"{score.name:{width}}  {score.method:8}  {score.size:8,}  {100 * score.accuracy:6.1f} %  {bounds}"
        )
    return "\n".join(lines)
