"""How good frozen embeddings are: logistic regression and kNN over folds.

After EVAR (time-mean of frequency-concatenated tokens, StandardScaler, one linear layer) and X-ARES (kNN, k = 10). EVAR
trains its layer by Adam and stops early; here the convex problem is solved, and validation chooses its regularisation:
there is no learning rate to suit one encoder more than another, and no seed. The test fold is seen once, by a finished
probe.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from ..sound.sources import ALIASES, Clip, split_name

__all__ = [
    "STRENGTHS",
    "LinearProbe",
    "Score",
    "check_labels",
    "evaluate",
    "fit_logistic",
    "folds_of",
    "interval",
    "knn",
    "table",
    "warn_of_several",
    "warn_of_unseen",
]

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Round = tuple[Ints, Ints, Ints]  # indices of train, validation and test clips


# C of ½‖w‖² + C · Σ cross-entropy: the larger, the less regularised. With C = 10, derivatives can no longer be told
# from zero even far from the minimum, and what is found depends on where the solver stops
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
ITERATIONS = 10_000  # far more than was ever needed
NEIGHBOURS = 10  # of kNN
TOLERANCE = 1e-5  # of the derivatives; at 1e-4 up to 6 % of clips are classified differently than at 1e-7


@dataclass(frozen=True)
class LinearProbe:
    """Standardisation and logistic regression.

    Attributes:
        mean, scale: (D) of the features it was fitted on, training and validation.
        weight, bias: (classes, D) and (classes) of the regression on standardised features.
        classes: (classes) that they stand for.
        strength: the C of `STRENGTHS` that validation chose.
        accuracy: on validation, of the probe with that C fitted on the training clips alone.
    """

    mean: Floats
    scale: Floats
    weight: Floats
    bias: Floats
    classes: Ints
    strength: float
    accuracy: float = math.nan

    def predict(self, features: Floats) -> Ints:
        """Classes (n) of features (n, D)."""
        x = (features - self.mean) / self.scale
        found: Ints = self.classes[(x @ self.weight.T + self.bias).argmax(1)]
        return found


def fit_logistic(train: tuple[Floats, Ints], validation: tuple[Floats, Ints]) -> LinearProbe:
    """Multinomial logistic regression of features (n, D) and classes (n), standardised, its C chosen on validation.

    One model per C of `STRENGTHS` is fitted on the training clips, standardised by their own mean and standard
    deviation; the C with the best accuracy on validation is taken, of equal ones the least; the probe is then fitted
    with it on training and validation clips together, standardised anew.

    Errors: `ValueError` if the solver does not converge, or if there is only one class to learn.
    """
    found = [float((_solve(*train, c).predict(validation[0]) == validation[1]).mean()) for c in STRENGTHS]
    best = int(np.argmax(found))
    features, classes = np.concatenate([train[0], validation[0]]), np.concatenate([train[1], validation[1]])
    return replace(_solve(features, classes, STRENGTHS[best]), accuracy=found[best])


def _solve(features: Floats, classes: Ints, strength: float) -> LinearProbe:
    """L-BFGS on ½‖w‖²/(C n) + mean cross-entropy of standardised features, until no derivative is above `TOLERANCE`.

    Solved by torch, as scikit-learn's `LogisticRegression` takes many times as long to reach the same minimum.
    """
    from sklearn.preprocessing import StandardScaler

    known, number = np.unique(classes, return_inverse=True)
    if len(known) < 2:
        raise ValueError(f"classes: expected at least two to tell apart, got {len(known)}")
    scaler = StandardScaler().fit(features)  # the scale of a constant feature is 1
    mean, scale = scaler.mean_.astype(np.float32), scaler.scale_.astype(np.float32)
    x, target = torch.from_numpy((features - mean) / scale).double(), torch.from_numpy(number)
    weight = torch.zeros(len(known), x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(len(known), dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias],
        max_iter=ITERATIONS,
        max_eval=2 * ITERATIONS,
        tolerance_grad=TOLERANCE,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def objective() -> torch.Tensor:
        solver.zero_grad()
        penalty = weight.square().sum() / (2 * strength * len(x))
        loss = penalty + F.cross_entropy(F.linear(x, weight, bias), target)
        loss.backward()
        return loss

    solver.step(objective)
    objective()
    left = max(float(parameter.grad.abs().max()) for parameter in (weight, bias) if parameter.grad is not None)
    if left > TOLERANCE:
        raise ValueError(
            f"features: logistic regression with C = {strength:g} does not converge: a derivative of {left:.2g} is left"
        )
    fitted = [parameter.detach().float().numpy() for parameter in (weight, bias)]
    return LinearProbe(mean, scale, fitted[0], fitted[1], known, strength)


def knn(train: tuple[Floats, Ints], features: Floats, k: int = NEIGHBOURS) -> Ints:
    """Classes (n) by the vote of the k training clips nearest by cosine; ties go to the lower class.

    Errors: `ValueError` for fewer than k training clips.
    """
    from sklearn.neighbors import KNeighborsClassifier

    if len(train[0]) < k:
        raise ValueError(f"k: expected at most the {len(train[0])} training clips there are, got {k}")
    classes: Ints = KNeighborsClassifier(k, metric="cosine").fit(*train).predict(features)
    return classes


def folds_of(clips: Sequence[Clip], test: Sequence[str] | None = None) -> list[Round]:
    """Train, validation and test indices of each round; warns of groups with clips on more than one side.

    If the splits are train, valid and test, there is one; each may go by one of its usual names (`sources.ALIASES`), in
    any case. Otherwise each fold is tested once, the next one (for the last, the first) being validation and the others
    training; `test` keeps only the rounds of these test folds.

    Errors: `ValueError` for splits or folds that make no round, or a test fold that does not exist.
    """
    given = sorted({clip.split for clip in clips})
    if "" in given:
        without = next(clip for clip in clips if not clip.split)
        raise ValueError(f"clips: expected each to have a split or fold, {without.name} has none")
    of = np.array([split_name(clip.split) for clip in clips])
    names = sorted(set(of.tolist()), key=_in_order)
    if any(name in ALIASES for name in names):
        # one name per split: two might mean different things
        if names != ["test", "train", "valid"] or len({name.casefold() for name in given}) > len(names):
            raise ValueError(f"clips: expected splits train, valid and test, or folds, got {', '.join(given)}")
        validation = {"test": "valid"}
    elif len(names) < 3:
        raise ValueError(f"clips: expected splits train, valid and test, or at least 3 folds, got {', '.join(names)}")
    else:
        validation = dict(zip(names, names[1:] + names[:1], strict=True))
    wanted = list(validation if test is None else dict.fromkeys(map(split_name, test)))
    if not set(wanted) <= set(validation):
        raise ValueError(f"test: expected folds among {', '.join(validation)}, got {', '.join(wanted)}")
    found: list[Round] = []
    for name in wanted:
        valid, tested = of == validation[name], of == name
        found.append((np.flatnonzero(~(valid | tested)), np.flatnonzero(valid), np.flatnonzero(tested)))
    _warn_of_leaks(clips, found)
    return found


def _in_order(name: str) -> tuple[int, int, str]:
    """Folds that are numbers by their value: 10 comes after 9."""
    return (0, int(name), name) if name.isdecimal() else (1, 0, name)


def _warn_of_leaks(clips: Sequence[Clip], rounds: Sequence[Round]) -> None:
    leaking: set[str] = set()
    for parts in rounds:
        train, valid, test = ({clips[index].group for index in part} - {""} for part in parts)
        leaking |= (train & valid) | (train & test) | (valid & test)
    if leaking:
        warnings.warn(
            f"groups: {len(leaking)} of {len({clip.group for clip in clips} - {''})}, such as {min(leaking)!r}, have "
            "clips in more than one of train, valid and test: what is learned of them by heart counts as right",
            stacklevel=3,
        )


def check_labels(clips: Sequence[Clip], source: str) -> None:
    """Errors: `ValueError` naming the argument data, which came from `source`, and the first clip without a label."""
    without = [clip.name for clip in clips if not clip.label]
    if len(without) == len(clips):
        raise ValueError(f"data: expected clips with labels, as of a manifest's column `label`, {source} has none")
    if without:
        raise ValueError(f"data: expected a label for each clip, {without[0]} has none")


def warn_of_unseen(train: Collection[str], test: Collection[str]) -> None:
    """Warn of labels that are tested and never trained on."""
    unseen = set(test) - set(train)
    if unseen:
        warnings.warn(
            f"labels: {len(unseen)} of {len(set(test))}, such as {min(unseen)!r}, are validated or tested and are not "
            "among the training clips: they cannot be told",
            stacklevel=3,
        )


def warn_of_several(clips: Sequence[Clip], otherwise: str) -> None:
    """Warn of a label that looks like several, separated by ";"; `otherwise` says what there is to know about them."""
    several = next((clip for clip in clips if ";" in clip.label), None)
    if several:
        warnings.warn(f"labels: {several.name} has {several.label!r} as one label; {otherwise}", stacklevel=3)


def interval(values: NDArray[Any], groups: Sequence[str], level: float = 0.95) -> tuple[float, float]:
    """Bootstrap interval of the mean of `values` (n), drawing whole groups: errors within one are not independent.

    For the difference between two encoders, pass the difference of their `Score.correct`. Of a single group nothing can
    be said, as it is all of any drawing: NaN, with a warning.
    """
    names, of = np.unique(np.asarray(groups), return_inverse=True)
    if len(names) == 1:
        warnings.warn(f"groups: there is only {str(names[0])!r} among the test clips, so no interval", stacklevel=2)
        return math.nan, math.nan
    totals, counts = np.bincount(of, values), np.bincount(of)
    drawn = np.random.default_rng(0).multinomial(len(counts), np.full(len(counts), 1 / len(counts)), 2000)
    low, high = np.quantile(drawn @ totals / (drawn @ counts), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class Score:
    """Accuracy of one embedding under one classifier.

    Attributes:
        name, method: what was scored, and how.
        size: features per clip.
        correct: (test clips) 1 if the clip was classified correctly, else 0; in the rounds' order.
        groups: of the test clips, for `interval`.
    """

    name: str
    method: str
    size: int
    correct: NDArray[np.float64]
    groups: tuple[str, ...]

    @property
    def accuracy(self) -> float:
        """The share of test clips classified correctly."""
        return float(self.correct.mean())


def evaluate(
    name: str,
    features: Floats,
    clips: Sequence[Clip],
    methods: Sequence[str] = ("linear", "knn"),
    test: Sequence[str] | None = None,
) -> list[Score]:
    """One `Score` per method, "linear" (`fit_logistic`) or "knn", of features (clips, D) over the rounds of `folds_of`.

    Errors: `ValueError` for features that are not finite or not of these clips, another method, a clip without a label,
    and as `folds_of`.
    """
    if not set(methods) <= {"linear", "knn"}:
        raise ValueError(f"methods: expected linear or knn, got {', '.join(methods)}")
    if not np.isfinite(features).all() or len(features) != len(clips):
        raise ValueError(f"features: expected finite ones of {len(clips)} clips, got {features.shape}")
    without = [clip.name for clip in clips if not clip.label]
    if without:
        raise ValueError(f"clips: expected a label for each, {without[0]} has none")
    labels = sorted({clip.label for clip in clips})
    y = np.array([labels.index(clip.label) for clip in clips], dtype=np.int64)
    rounds = folds_of(clips, test)
    for train, valid, tested in rounds:
        warn_of_unseen([labels[c] for c in set(y[train])], [labels[c] for c in {*y[valid], *y[tested]}])
    fewest = min(len(train) for train, _, _ in rounds)
    if "knn" in methods and fewest < NEIGHBOURS:
        raise ValueError(f"methods: expected linear alone, as knn wants {NEIGHBOURS} training clips, got {fewest}")
    groups = tuple(clips[index].group or clips[index].name for _, _, tested in rounds for index in tested)
    scores = []
    for method in methods:
        correct = []
        for train, valid, tested in rounds:
            seen, held = (features[train], y[train]), (features[valid], y[valid])
            if method == "linear":
                classes = fit_logistic(seen, held).predict(features[tested])
            else:
                classes = knn(seen, features[tested])
            correct.append((classes == y[tested]).astype(float))
        scores.append(Score(name, method, features.shape[1], np.concatenate(correct), groups))
    return scores


def table(scores: Sequence[Score]) -> str:
    """One line per score: accuracy in %, its 95 % interval over groups, and feature size, which accuracy grows with."""
    width = max(len(score.name) for score in scores)
    lines = [f"{'':{width}}  method    features  accuracy  95 % interval"]
    for score in scores:
        low, high = interval(score.correct, score.groups)
        bounds = f"{100 * low:.1f} to {100 * high:.1f}"
        lines.append(
            f"{score.name:{width}}  {score.method:8}  {score.size:8,}  {100 * score.accuracy:6.1f} %  {bounds}"
        )
    return "\n".join(lines)
