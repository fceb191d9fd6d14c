"""PatchGrid: patch and window sizes, and the token grid they give on a spectrogram."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["PatchGrid", "is_traced", "pair", "sizes_of"]


def pair(value: int | Sequence[int], name: str) -> tuple[int, int]:
    """`value` as two positive integers; a single one stands for both.

    Errors: `TypeError` if `value` is neither an int nor two of them, `ValueError` if one is below 1.
    """
    both = (
        (value, value)
        if isinstance(value, int)
        else tuple(value)
        if isinstance(value, Sequence) and not isinstance(value, bytes)
        else ()
    )
    if len(both) != 2 or not all(isinstance(size, int) and not isinstance(size, bool) for size in both):
        raise TypeError(f"{name}: expected an int or two of them, got {value!r}")
    if min(both) < 1:
        raise ValueError(f"{name}: expected sizes of at least 1, got {value!r}")
    return both


@dataclass(frozen=True)
class PatchGrid:
    """How patches and windows lie on a spectrogram `(mel bins, frames)`.

    Token (i, j) holds mel bins i·S_f … i·S_f + P_f − 1 and frames j·S_t … j·S_t + P_t − 1; its window is the
    K frames about the patch centre t_c = j·S_t + (P_t − 1)/2. Frames of the window outside the clip count as 0.

    Attributes:
        patch: (P_f, P_t), mel bins × frames.
        stride: (S_f, S_t), mel bins × frames; overlap and gaps are allowed on either axis.
        window: K in frames, K ≡ P_t (mod 2), so that the window's ends fall on frames.
    """

    patch: tuple[int, int]
    stride: tuple[int, int]
    window: int

    @classmethod
    def make(
        cls,
        patch_size: int | Sequence[int],
        stride: int | Sequence[int] | None = None,
        window: int | None = None,
    ) -> PatchGrid:
        """Check the sizes and fill in the defaults: stride = patch, window = P_t.

        Errors: `TypeError` or `ValueError` naming the argument, what was expected and what came.
        """
        patch = pair(patch_size, "patch_size")
        steps = patch if stride is None else pair(stride, "stride")
        frames = patch[1] if window is None else window
        if not isinstance(frames, int) or isinstance(frames, bool):
            raise TypeError(f"window: expected an int (frames) or None, got {window!r}")
        if frames < 1 or (frames - patch[1]) % 2:
            parity = "odd" if patch[1] % 2 else "even"
            raise ValueError(
                f"window: expected a positive {parity} number of frames, as the patch is {patch[1]} frames long, "
                f"got {frames}"
            )
        return cls(patch, steps, frames)

    @property
    def offset(self) -> int:
        """First frame of a window, counted from the first frame of its patch; negative where K > P_t."""
        return (self.patch[1] - self.window) // 2

    def tokens(self, mel_bins: int, frames: int) -> tuple[int, int]:
        """The token grid (N_f, N_t) on a spectrogram that holds at least one patch."""
        (p_f, p_t), (s_f, s_t) = self.patch, self.stride
        return (mel_bins - p_f) // s_f + 1, (frames - p_t) // s_t + 1

    def covering(self, mel_bins: int, frames: int) -> tuple[int, int]:
        """The token grid that leaves nothing over after its last patch, for a spectrogram that may be padded.

        The last patch on an axis begins inside the spectrogram, even with gaps: no patch holds padding alone.
        """
        (p_f, p_t), (s_f, s_t) = self.patch, self.stride
        # no division of negative numbers, which ONNX rounds towards zero
        over_f, over_t = max(mel_bins - max(p_f, s_f), 0), max(frames - max(p_t, s_t), 0)
        return (over_f + s_f - 1) // s_f + 1, (over_t + s_t - 1) // s_t + 1

    def extent(self, n_f: int, n_t: int) -> tuple[int, int]:
        """Mel bins and frames from the beginning of the first patch to the end of the last."""
        return (n_f - 1) * self.stride[0] + self.patch[0], (n_t - 1) * self.stride[1] + self.patch[1]


def is_traced() -> bool:
    """Whether `torch.jit.trace`, or TorchScript's ONNX exporter, is tracing."""
    return torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call, no-any-return]


def sizes_of(value: Tensor) -> tuple[int, ...]:
    """Its shape in plain numbers, even where `torch.jit.trace` makes sizes tensors: the trace holds for these sizes."""
    if not is_traced():
        return tuple(value.shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        return tuple(map(int, value.shape))
