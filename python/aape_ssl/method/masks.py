"""Which tokens of a clip the student sees: random and inverse-block masks over the token grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .._messages import one_of, whole, within

__all__ = ["MaskSampler", "Masks"]

Kind = Literal["random", "inverse_block"]
RATIOS: dict[str, float] = {"random": 0.7, "inverse_block": 0.8}


class Masks(NamedTuple):
    """M masks per clip, as token numbers i·N_t + j in ascending order; all masks have equally many of each.

    Attributes:
        visible: what the student sees, int64 (B, M, N_v).
        masked: the rest, int64 (B, M, N − N_v).
    """

    visible: Tensor
    masked: Tensor

    def to(self, device: torch.device | str) -> Masks:
        """The same on `device`."""
        return Masks(*(numbers.to(device, non_blocking=True) for numbers in self))


@dataclass(frozen=True)
class MaskSampler:
    """Draws the masks of a batch, as a function of (seed, step, micro-batch, clip index) and nothing else.

        N_v = round((1 − ratio) N), at least 1 and at most N − 1, for every mask

    - "random": the N_v tokens with the smallest noise.
    - "inverse_block": square blocks, which may hang over the edge of the grid, become visible in random order until
      N_v tokens are; of the last block, a random part. Away from the edge, all tokens are visible equally often.

    Args:
        num_masks: M, masks per clip.
        kind: "random" or "inverse_block".
        ratio: share of tokens that is masked, in (0, 1); unless given, 0.7 for "random", 0.8 for "inverse_block".
        block: side of a block, in tokens.
        seed: ≥ 0, of the run.

    Errors: `ValueError` naming the argument.
    Source: M2D (random, 0.7), EAT (inverse blocks of 5 × 5, 0.8); M = 4, and the order in which blocks come, are ours.
    """

    num_masks: int = 4
    kind: Kind = "inverse_block"
    ratio: float | None = None
    block: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        one_of(get_args(Kind), kind=self.kind)
        whole(1, num_masks=self.num_masks, block=self.block)
        whole(0, seed=self.seed)
        if self.ratio is not None:
            within("(0, 1)", ratio=self.ratio)

    def num_visible(self, grid: tuple[int, int]) -> int:
        """N_v for a token grid (N_f, N_t)."""
        tokens = grid[0] * grid[1]
        if tokens < 2:
            raise ValueError(f"grid: expected at least two tokens, one to see and one to predict, got {grid}")
        ratio = RATIOS[self.kind] if self.ratio is None else self.ratio
        return min(max(round((1 - ratio) * tokens), 1), tokens - 1)

    def __call__(self, index: Tensor, grid: tuple[int, int], step: int, micro_batch: int = 0) -> Masks:
        """Masks of the clips `index` (B) over `grid` (N_f, N_t), on the CPU.

        step: optimiser steps done; micro_batch: which one of the step's accumulated batches.
        """
        visible = self.num_visible(grid)
        # one generator per clip, so that its masks depend neither on the batch it is in nor on the rank
        keys = [self._order(np.random.default_rng((self.seed, step, micro_batch, i)), grid) for i in index.tolist()]
        order = torch.stack(keys) if keys else torch.empty(0, self.num_masks, grid[0] * grid[1])
        ranks = order.argsort(-1)  # [B, M, N]
        return Masks(ranks[..., :visible].sort(-1).values, ranks[..., visible:].sort(-1).values)

    def _order(self, generator: np.random.Generator, grid: tuple[int, int]) -> Tensor:
        """Keys (M, N) of one clip in whose order tokens turn visible."""
        noise = torch.from_numpy(generator.random((self.num_masks, *grid)))
        if self.kind == "inverse_block":
            positions = generator.random((self.num_masks, grid[0] + self.block - 1, grid[1] + self.block - 1))
            turn = torch.from_numpy(positions).flatten(1).argsort(-1).argsort(-1).view(positions.shape)
            # a token's turn is that of the first block to cover it; the noise decides within a block
            noise = noise - F.max_pool2d(-turn.double(), self.block, stride=1)
        return noise.flatten(1)
