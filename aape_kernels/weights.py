"""Weights: a stem's parameters, kept together from `functional` to the backends, flat only in the ops' schemas."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["Weights"]


class Weights(NamedTuple):
    """D channels, H hidden units, S states, patches of C × P_f × P_t; mel bins before frames whatever the layout.

    Attributes:
        proj_w: (D, C, P_f, P_t).
        proj_b: (D) or None.
        w1: (H, C, P_f, P_t), the Lambda Encoder's first layer.
        b1: (H).
        w2: (2S, H), its second.
        b2: (2S).
        sblu_w: (S, C, P_f).
        fusion_w: (D, planes, S); as many planes as `aape_kernels.reference.PLANES` has for the features.
    """

    proj_w: Tensor
    proj_b: Tensor | None
    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor
    sblu_w: Tensor
    fusion_w: Tensor

    @property
    def dim(self) -> int:
        """D."""
        return self.proj_w.shape[0]

    @property
    def hidden(self) -> int:
        """H."""
        return self.w1.shape[0]

    @property
    def states(self) -> int:
        """S."""
        return self.sblu_w.shape[0]

    @property
    def planes(self) -> int:
        """The number of planes of the features."""
        return self.fusion_w.shape[1]
