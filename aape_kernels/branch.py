"""The parameters of the stem's branch: Lambda Encoder, SBLU projection, fusion."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["BranchModule", "LambdaEncoder", "Weight"]


class BranchModule(nn.Module):
    """What holds parameters of AaPE's own, and knows their initial values.

    A library that allocates what a checkpoint lacks, as transformers' `from_pretrained` does, must call
    `reset_parameters` on these (docs/models.md).
    """

    def reset_parameters(self) -> None:
        """Initialise the parameters afresh."""
        raise NotImplementedError


class LambdaEncoder(BranchModule):
    """Estimates decay and frequency from each patch: r = W2 · SiLU(W1 · vec(patch) + b1) + b2.

    Source: the paper's Lambda Encoder; its layers, ranges and initial values are ours (docs/maths.md §3).

    Parameters of its own rather than `nn.Linear` modules, because timm and transformers re-initialise those.
    """

    def __init__(self, channels: int, patch: tuple[int, int], hidden: int, states: int, **factory: Any) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(hidden, channels, *patch, **factory))
        self.b1 = nn.Parameter(torch.empty(hidden, **factory))
        self.w2 = nn.Parameter(torch.empty(2 * states, hidden, **factory))
        self.b2 = nn.Parameter(torch.empty(2 * states, **factory))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A fixed filter bank that learns to adapt: frequencies evenly over the band, decay at its range's middle."""
        uniform_fan_in(self.w1)
        self.b1.zero_()
        self.w2.normal_(std=0.02)
        states = len(self.b2) // 2
        share = (torch.arange(states, dtype=torch.float64) + 0.5) / states
        self.b2[:states] = 0.0
        self.b2[states:] = torch.logit(share).to(self.b2)  # σ(r_ω) = (s + ½)/S


class Weight(BranchModule):
    """A module that holds one weight, for the names `sblu.weight` and `fusion.weight` in the state dict.

    Attributes:
        starts_at_zero: of the fusion of a stem that must first compute what a convolution computes.
    """

    starts_at_zero = False

    def __init__(self, *shape: int, **factory: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*shape, **factory))

    def reset_parameters(self) -> None:
        """Uniform ±1/√fan_in, or zero."""
        if self.starts_at_zero:
            nn.init.zeros_(self.weight)
        else:
            uniform_fan_in(self.weight)


@torch.no_grad()
def uniform_fan_in(weight: Tensor) -> None:
    """Uniform ±1/√fan_in, the fan-in being all but the first axis."""
    bound = 1 / math.sqrt(weight[0].numel())
    weight.uniform_(-bound, bound)
