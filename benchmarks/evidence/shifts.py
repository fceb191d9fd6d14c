"""Accuracy on clips that lie differently against the patch grid than those a probe was fitted on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from aape_ssl.evaluation.embedding import Encoder
from aape_ssl.evaluation.probe import LinearProbe, fit_logistic, folds_of
from aape_ssl.sound.sources import Clip

from .spectrograms import Spectrograms, features

__all__ = ["right_by_shift"]


def right_by_shift(
    encoder: Encoder,
    spectrograms: Spectrograms,
    clips: Sequence[Clip],
    test: Sequence[str] | None = None,
    seed: int = 0,
    device: str = "cpu",
    unshifted: Sequence[LinearProbe] | None = None,
) -> dict[str, NDArray[np.bool_]]:
    """Which test clips two linear probes classify correctly when all are delayed by 0, 1, … frames.

    Probe "unshifted" is fitted on clips as they are; where all begin at frame 0, as notes do, it has seen one place of
    the patch grid only, and what it loses with the shift is the encoder's and the probe's. Probe "shifted" is fitted on
    clips each delayed by a shift of its own, drawn evenly from all there are, as crops by chance would: what it loses
    between shifts is the encoder's. Validation clips, which choose a probe's C, are delayed as its training clips are.

    Args:
        encoder: (B, 1, F, frames), normalised -> tokens and grid.
        spectrograms: of its front end; has the shifts.
        clips: with labels, splits and groups; among those of the spectrograms.
        test: only the rounds that hold these folds out; all unless given.
        seed: of the shifts that are drawn; one for all encoders, so that they see the same.
        device: of the encoder.
        unshifted: these probes, one a round, where they are fitted already.

    Returns:
        (shifts, test clips) of each probe, test clips in the order of `probe.folds_of`'s rounds.

    Source: the paper tests robustness to shifts; how it does is not public. This is ours.
    """
    rows = spectrograms.rows(clips)
    labels = sorted({clip.label for clip in clips})
    y = np.array([labels.index(clip.label) for clip in clips], dtype=np.int64)
    drawn = np.random.default_rng([seed, 3]).integers(0, spectrograms.shifts, len(clips))
    rounds = folds_of(clips, test)
    names = ("unshifted", "shifted")

    def fitted_on(shift: int | NDArray[np.int64]) -> list[LinearProbe]:
        x = features(encoder, spectrograms, shift, rows, device=device)
        return [fit_logistic((x[train], y[train]), (x[valid], y[valid])) for train, valid, _ in rounds]

    both = zip(fitted_on(0) if unshifted is None else unshifted, fitted_on(drawn), strict=True)
    probes = [dict(zip(names, pair, strict=True)) for pair in both]
    right: dict[str, list[NDArray[np.bool_]]] = {name: [] for name in names}
    for shift in range(spectrograms.shifts):
        found: dict[str, list[NDArray[np.bool_]]] = {name: [] for name in names}
        for (_, _, tested), fitted in zip(rounds, probes, strict=True):
            x = features(encoder, spectrograms, shift, rows[tested], device=device)
            for name, probe in fitted.items():
                found[name].append(probe.predict(x) == y[tested])
        for name, each in found.items():
            right[name].append(np.concatenate(each))
    return {name: np.stack(each) for name, each in right.items()}
