"""Decay ranges and frequency bands: checks, defaults, and conversion from Hz."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .geometry import PatchGrid

__all__ = ["LogitRanges", "band_from_hz", "check_band", "check_decay", "check_hop", "decay_from_hz", "logit_ranges"]


# e^{α/2} is float32's largest number at α = 177; the margin is for the spectrogram and the gradients.
LARGEST_ODD = 160.0


# Between these, the ends, their ratio and their squares are finite and not zero in float32.
SMALLEST, LARGEST = 1e-18, 1e18


def _two_floats(value: Sequence[float], name: str) -> tuple[float, float]:
    both = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str | bytes) else ()
    if len(both) != 2 or not all(isinstance(end, (int, float)) and not isinstance(end, bool) for end in both):
        raise TypeError(f"{name}: expected two numbers (low, high), got {value!r}")
    if not all(math.isfinite(end) for end in both):
        raise ValueError(f"{name}: expected finite numbers (low, high), got {value!r}")
    return float(both[0]), float(both[1])


def check_band(band: Sequence[float] | None, grid: PatchGrid) -> tuple[float, float]:
    """The frequency band in rad/frame, (π/S_t, π) unless given: what the patch grid aliases (docs/maths.md §1).

    Errors: `TypeError` or `ValueError` unless 0 ≤ low < high ≤ π; `ValueError` for the default at S_t = 1, where
    the patch grid aliases nothing.
    """
    if band is None:
        if grid.stride[1] == 1:
            length = grid.patch[1]
            say = f"; band=(math.pi / {length}, math.pi) is what a stride of the patch's {length} frames would alias"
            raise ValueError(
                "band: expected (low, high) in rad/frame, as a stride of 1 frame leaves no alias-prone band to default "
                f"to, got None{say if length > 1 else ''}"
            )
        return math.pi / grid.stride[1], math.pi
    low, high = _two_floats(band, "band")
    if not 0 <= low < high <= math.pi:
        raise ValueError(f"band: expected 0 <= low < high <= pi rad/frame (band_from_hz converts), got {(low, high)}")
    return low, high


def check_decay(decay: Sequence[float] | None, grid: PatchGrid) -> tuple[float, float]:
    """The decay range in 1/frame, (1/K, 2) unless given (ours).

    Errors: `TypeError` or `ValueError` unless 0 < low < high; `ValueError` for what float32 cannot hold, such
    as values above `LARGEST_ODD` for an odd window.
    """
    low, high = (1 / grid.window, 2.0) if decay is None else _two_floats(decay, "decay")
    if not 0 < low < high:
        raise ValueError(f"decay: expected 0 < low < high (1/frame), got {(low, high)}")
    if low < SMALLEST or high > LARGEST:
        raise ValueError(f"decay: expected numbers from {SMALLEST:g} to {LARGEST:g} (1/frame), got {(low, high)}")
    if grid.window % 2 and high > LARGEST_ODD:
        raise ValueError(
            f"decay: expected at most {LARGEST_ODD:g} for the odd window {grid.window}, whose middle frame has the "
            f"gain 2 sinh(decay/2)/decay, got {(low, high)}"
        )
    return low, high


# The decay's low end and log ratio, the band's low end and width: kernels squash the Lambda Encoder's logits into them.
LogitRanges = tuple[float, float, float, float]


def logit_ranges(decay: Sequence[float], band: Sequence[float]) -> LogitRanges:
    """The `LogitRanges` of a decay range and a band that have been checked."""
    return decay[0], math.log(decay[1] / decay[0]), band[0], band[1] - band[0]


def check_hop(hop: float) -> float:
    """Seconds from one frame to the next. Errors: `ValueError` unless a positive number."""
    if not isinstance(hop, (int, float)) or isinstance(hop, bool) or not math.isfinite(hop) or hop <= 0:
        raise ValueError(f"hop: expected a positive number of seconds, got {hop!r}")
    return float(hop)


def _per_frame(hz: Sequence[float], hop: float, name: str) -> tuple[float, float]:
    low, high = _two_floats(hz, name)
    hop = check_hop(hop)
    return 2 * math.pi * low * hop, 2 * math.pi * high * hop


def band_from_hz(hz: Sequence[float], hop: float = 0.01) -> tuple[float, float]:
    """A band of modulation frequencies in rad/frame, for `AaPE(band=…)`: ω = 2π · Hz · hop.

    Args:
        hz: (low, high) in Hz, 0 ≤ low < high ≤ 1/(2 · hop), the frame rate's Nyquist frequency.
        hop: seconds from one frame to the next.

    Errors: `TypeError` or `ValueError` naming the argument. Source: ours.

    Examples:
        >>> band_from_hz((3.125, 50.0))
        (0.19634954084936207, 3.141592653589793)
    """
    low, high = _per_frame(hz, hop, "hz")
    nyquist = 1 / (2 * hop)
    if not 0 <= low < high or hz[1] > nyquist * (1 + 1e-12):
        raise ValueError(
            f"hz: expected 0 <= low < high <= {nyquist:g} Hz (Nyquist at a hop of {hop:g} s), got {tuple(hz)}"
        )
    return low, min(high, math.pi)


def decay_from_hz(hz: Sequence[float], hop: float = 0.01) -> tuple[float, float]:
    """A decay range in 1/frame, for `AaPE(decay=…)`, from bandwidths: α = 2π · Hz · hop.

    The spectrum of e^{−α|t|} is 2α/(α² + ω²): it falls to half its peak α/(2π · hop) Hz from the centre.

    Args:
        hz: (narrowest, widest) half width at half height in Hz, 0 < narrowest < widest.
        hop: seconds from one frame to the next.

    Errors: `TypeError` or `ValueError` naming the argument. Source: ours.
    """
    low, high = _per_frame(hz, hop, "hz")
    if not 0 < low < high:
        raise ValueError(f"hz: expected 0 < low < high Hz, got {tuple(hz)}")
    return low, high
