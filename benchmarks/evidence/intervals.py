"""Intervals over seeds and groups of clips: the other runs and the other clips that might have been."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Estimate", "estimate", "mean_over_tasks"]

Floats = NDArray[np.float64]
DRAWS = 4000


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval.

    Attributes:
        mean: over seeds, clip by clip.
        low, high: of the interval.
        seeds: how many there were.
        by_seed: the mean of each.
    """

    mean: float
    low: float
    high: float
    seeds: int
    by_seed: tuple[float, ...]


def _draws(count: int, draws: int, stream: tuple[int, ...]) -> Floats:
    """How often each of `count` is drawn, (draws, count): count − 1 of them with replacement; one alone once.

    count − 1 and not count, so that the variance of a mean is s²/count with the unbiased s²: of three seeds, three
    drawn with replacement would show two thirds of it. Source: Rao and Wu (1988), rescaled bootstrap.
    """
    if count == 1:
        return np.ones((draws, 1))
    rng = np.random.default_rng(stream)
    return rng.multinomial(count - 1, np.full(count, 1 / count), draws).astype(float)


def _drawn(hits: Floats, counts: Floats, draws: int, task: int = 0) -> Floats:
    seeds, groups = hits.shape
    of_seeds, of_groups = _draws(seeds, draws, (1,)), _draws(groups, draws, (2, task))
    totals = ((of_groups @ hits.T) * of_seeds).sum(1)
    found: Floats = totals / (of_seeds.sum(1) * (of_groups @ counts))
    return found


def _estimate(values: Floats, by_seed: Floats) -> Estimate:
    low, high = np.quantile(values, [0.025, 0.975])
    return Estimate(float(by_seed.mean()), float(low), float(high), len(by_seed), tuple(map(float, by_seed)))


def estimate(hits: Floats, counts: Floats, draws: int = DRAWS) -> Estimate:
    """Share of clips, by a bootstrap that draws seeds and, apart from them, groups of clips.

    Args:
        hits: (seeds, groups) how many clips are right; of a difference, how many more than of the other.
        counts: (groups) clips of each group.
        draws: of the bootstrap.
    """
    return _estimate(_drawn(hits, counts, draws), hits.sum(1) / counts.sum())


def mean_over_tasks(hits: list[Floats], counts: list[Floats], draws: int = DRAWS) -> Estimate:
    """Mean over tasks of such shares; seeds are drawn together, groups task by task."""
    pairs = list(zip(hits, counts, strict=True))
    values = [_drawn(each, count, draws, task) for task, (each, count) in enumerate(pairs)]
    by_seed = [each.sum(1) / count.sum() for each, count in pairs]
    return _estimate(np.mean(values, 0), np.mean(by_seed, 0))
