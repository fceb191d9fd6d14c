"""Diagnostics: whether pre-training collapses, and what the stem's filters do."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aape_kernels import AaPE

from .objective import Terms

__all__ = ["at_bounds", "branch_ratio", "collapse", "content_std", "filter_positions", "of_terms", "rankme"]

MAX_TOKENS = 4096
"""Enough for a RankMe of any width here; a batch may hold a hundred times as many."""


def token_std(tokens: Tensor) -> Tensor:
    """Standard deviation over tokens of each channel of L2-normalised tokens (..., D), averaged over channels.

    A healthy value is about 1/√D. Rank-1 collapse barely moves it, constant collapse takes it to 0.
    """
    return F.normalize(tokens.float().flatten(0, -2), dim=-1).std(0, correction=0).mean()


def content_std(tokens: Tensor) -> Tensor:
    """The same over clips, place by place, of tokens (B, N, D): near 0 if tokens tell their place and nothing else.

    Source: ours; such a collapse passes both `token_std` and `rankme`, as positions differ.
    """
    return F.normalize(tokens.float(), dim=-1).std(0, correction=0).mean()


def rankme(tokens: Tensor) -> Tensor:
    """Effective rank of tokens (..., D), from 1 to min(tokens, D):

        exp( −Σ p log p ),   p = singular values of the tokens / their sum

    Not centred: the mean is what a constant collapse leaves. Source: arXiv 2210.02885. Of more than 4,096 tokens, every
    n-th is taken.
    """
    tokens = tokens.float().flatten(0, -2)
    tokens = tokens[:: max(math.ceil(len(tokens) / MAX_TOKENS), 1)]
    values = torch.linalg.svdvals(tokens)
    p = values / values.sum().clamp_min(1e-12)
    return torch.exp(torch.special.entr(p).sum())


@torch.no_grad()
def of_terms(terms: Terms) -> dict[str, float]:
    """Token std, content std and RankMe of student and teacher, with agreement between masks and contrastive top-1."""
    values = {"agreement": terms.agreement, "top1": terms.top1}
    if len(terms.teacher) > 1:  # one clip says nothing about clips
        values["teacher_content_std"] = content_std(terms.teacher)
    for name, tokens in (("student", terms.student), ("teacher", terms.teacher)):
        values |= {f"{name}_std": token_std(tokens), f"{name}_rankme": rankme(tokens)}
    return {name: float(value) for name, value in values.items()}


def collapse(values: Mapping[str, float], dim: int) -> str | None:
    """One line that says what collapsed according to `of_terms`, or None; `dim` is D.

    - a token std, or the content std, below a tenth of 1/√D;
    - a RankMe below max(2, D/100), RankMe's 6.5 of 768 being a collapse.

    Source: ours, thresholds included.
    """
    std, rank = 0.1 / math.sqrt(dim), max(2.0, dim / 100)
    found = []
    for name, value in values.items():
        bound = std if name.endswith("_std") else rank if name.endswith("_rankme") else -math.inf
        if not value >= bound:  # NaN too
            found.append(f"{name} {value:.3g} < {bound:.3g}")
    if not found:
        return None
    return f"the representation collapses: {', '.join(found)} (healthy: std about {1 / math.sqrt(dim):.3g})"


def filter_positions(stem: AaPE, x: Tensor) -> dict[str, Tensor]:
    """Where in their ranges, from 0 to 1, decay (logarithmic) and frequency lie in `stem.analyse(x)`, x (B, 1, F, T).

    Flat: of all patches and states.
    """
    decay, frequency = (values.float().flatten() for values in stem.analyse(x))
    low, high = stem.decay
    start, end = stem.band
    return {"decay": (decay / low).log() / math.log(high / low), "frequency": (frequency - start) / (end - start)}


def at_bounds(positions: Tensor) -> float:
    """The share of `filter_positions` within 1 % of the range from an end."""
    return float(((positions - 0.5).abs() > 0.49).float().mean())


@torch.no_grad()
def branch_ratio(stem: nn.Module, x: Tensor) -> float | None:
    """‖branch‖ / ‖W_p vec(patch)‖ over all tokens of x (B, 1, F, T); None for a stem without a branch.

    The branch is AaPE's W_y y, or the control's MLP.
    """
    proj = stem.proj
    if not isinstance(proj, nn.Conv2d) or len(list(stem.children())) == 1:
        return None
    plain = F.conv2d(x, proj.weight, None, proj.stride).flatten(2).mT
    branch = stem(x) - plain - (0 if proj.bias is None else proj.bias)
    return float(branch.norm() / plain.norm().clamp_min(1e-12))
