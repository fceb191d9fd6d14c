"""The whole stem on the CPU: one native call forward and one backward.

If tokens have 16 bits and the processor has instructions for such products, torch computes these: the native call then
ends at their operand, [patch | features]. On other processors, tokens are computed in the arithmetic's dtype and
rounded to 16 bits. The backward's products are torch's as well, and it begins at the features' cotangent, if tokens
are wide; of narrow ones it computes all as elsewhere (benchmarks/NOTES.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..geometry import PatchGrid
from ..ranges import logit_ranges
from ..reference import working_dtype
from ..weights import Weights
from . import native
from .gradients import like_inputs

__all__ = ["embed", "embed_backward"]

# Embedding dimensions from which the backward's products of 16 bits pay for their way through memory.
LEAST_DIM = 384

# How many tokens' operand and cotangent the 16-bit backward works on at once.
BLOCK = 1024


def _rows(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight as the native module takes it: contiguous, in the arithmetic's dtype."""
    return weight if weight.dtype == dtype and weight.is_contiguous() else weight.to(dtype).contiguous()


def _given(
    x: Tensor,
    weights: Weights,
    grid: PatchGrid,
    quadrature: bool,
    decay: Sequence[float],
    band: Sequence[float],
    time_major: bool,
) -> tuple[Any, ...]:
    """What the native calls of both directions are given first."""
    shape = (weights.planes, weights.dim, weights.hidden, time_major)
    return x, native.sizes(grid, weights.states), quadrature, logit_ranges(decay, band), shape


def embed(
    x: Tensor,
    weights: Weights,
    grid: PatchGrid,
    quadrature: bool,
    decay: Sequence[float],
    band: Sequence[float],
    time_major: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (B, N, D) in proj_w's dtype; r (B·N, 2S) and hidden (B·N, H) for the backward."""
    proj_w, proj_b, *encoder, fusion_w = weights
    work, out = working_dtype(x.dtype), proj_w.dtype
    batch, tokens = x.shape[0], math.prod(grid.tokens(x.shape[2], x.shape[3]))
    rows = batch * tokens
    r = x.new_empty(rows, 2 * weights.states, dtype=work)
    hidden = x.new_empty(rows, weights.hidden, dtype=work)
    encoder = [_rows(value, work) for value in encoder]
    given = _given(x, weights, grid, quadrature, decay, band, time_major)
    run, threads = native.load().embed, torch.get_num_threads()
    if out == work or not native.has_products(out):
        result = x.new_empty(batch, tokens, weights.dim, dtype=work)
        if rows:
            projection = [_rows(proj_w, work), None if proj_b is None else _rows(proj_b, work)]
            run(*given, (*projection, *encoder, _rows(fusion_w, work)), (result, None, hidden, r), threads)
        return result.to(out), r, hidden

    operand = x.new_empty(rows, proj_w[0].numel() + fusion_w[0].numel(), dtype=out)  # [patch | features]
    if rows:
        run(*given, (None, None, *encoder, None), (None, operand, hidden, r), threads)
    weight = torch.cat([proj_w.flatten(1), fusion_w.to(out).flatten(1)], dim=1)
    flat = F.linear(operand, weight, None if proj_b is None else proj_b.to(out))
    return flat.view(batch, tokens, weights.dim), r, hidden


def embed_backward(
    grad: Tensor, x: Tensor, weights: Weights, r: Tensor, hidden: Tensor, grid: PatchGrid, quadrature: bool,
    decay: Sequence[float], band: Sequence[float], time_major: bool, need: Sequence[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of x and the weights in their dtypes, contiguous; None where not needed."""
    inputs = {"x": x, **weights._asdict()}
    wanted = {name for name, wish in zip(inputs, need, strict=True) if wish and inputs[name] is not None}
    got: dict[str, Tensor] = {}
    if grad.numel() and wanted:
        out = weights.proj_w.dtype
        narrow = weights.dim >= LEAST_DIM and out != working_dtype(x.dtype) and native.has_products(out)
        options = (grid, quadrature, decay, band, time_major)
        got = (_narrow_gradients if narrow else _gradients)(grad, x, weights, r, hidden, options, wanted)
    return like_inputs(inputs, wanted, got)


Options = tuple[PatchGrid, bool, Sequence[float], Sequence[float], bool]


def _gradients(
    grad: Tensor, x: Tensor, weights: Weights, r: Tensor, hidden: Tensor, options: Options, wanted: set[str]
) -> dict[str, Tensor]:
    """All gradients in one native call."""
    work = working_dtype(x.dtype)
    # zeros: the native call adds to x's gradient, which is zero outside all patches
    got = {"x": x.new_zeros(x.shape, dtype=work)} if "x" in wanted else {}
    got |= _empty(weights, wanted, work)
    rows = tuple(None if value is None else _rows(value, work) for value in weights)
    flat = grad.reshape(r.shape[0], -1).contiguous()
    _backward(_given(x, weights, *options), rows, (hidden, r, flat, None, None), got)
    return got


def _backward(
    shared: tuple[Any, ...],
    weights: tuple[Tensor | None, ...],
    given: tuple[Tensor | None, ...],
    gradients: dict[str, Tensor],
) -> None:
    """Write the gradients that there are, and add to that of x.

    Args:
        given: hidden, r, the cotangent of the tokens or of the features, and the operand, which is written.
    """
    to = tuple(map(gradients.get, ("x", *Weights._fields)))
    native.load().embed_backward(*shared, weights, given, to, torch.get_num_threads())


def _empty(weights: Weights, wanted: set[str], dtype: torch.dtype) -> dict[str, Tensor]:
    """Empty tensors for the gradients of the wanted weights."""
    return {
        name: torch.empty_like(value, dtype=dtype, memory_format=torch.contiguous_format)
        for name, value in weights._asdict().items()
        if value is not None and name in wanted
    }


def _narrow_gradients(
    grad: Tensor, x: Tensor, weights: Weights, r: Tensor, hidden: Tensor, options: Options, wanted: set[str]
) -> dict[str, Tensor]:
    """With torch's 16-bit products, in blocks of clips, whose sums run in order and in `work`'s precision."""
    work, out = working_dtype(x.dtype), weights.proj_w.dtype
    projection, fusion = weights.proj_w.flatten(1), weights.fusion_w.to(out).flatten(1)
    inner = {"proj_w", "proj_b", "fusion_w"}
    by_row = tuple(None if name in inner else _rows(value, work) for name, value in weights._asdict().items())
    need_product = bool(wanted & {"proj_w", "fusion_w"})
    need_branch = bool(wanted - inner)
    tokens = grad.shape[1]
    clips, flat = max(1, BLOCK // tokens), grad.reshape(r.shape[0], -1)
    got: dict[str, Tensor] = {"x": x.new_zeros(x.shape, dtype=work)} if "x" in wanted else {}
    for first in range(0, x.shape[0], clips):
        some = x[first : first + clips]
        rows = slice(first * tokens, (first + some.shape[0]) * tokens)
        part = flat[rows]
        block = _empty(weights, wanted - inner, work)
        own = {**block, **({"x": got["x"][first : first + clips]} if "x" in wanted else {})}
        operand = flat.new_empty(len(part), projection.shape[1] + fusion.shape[1]) if need_product else None
        if need_branch or operand is not None:
            features = part @ fusion if need_branch else None
            given = (hidden[rows], r[rows], None, features, operand)
            _backward(_given(some, weights, *options), by_row, given, own)
        if "x" in wanted:
            own["x"] += _scatter((part @ projection).to(work), some, options[0], options[4])
        if operand is not None:
            product = part.t() @ operand
            block |= {"proj_w": product[:, : projection.shape[1]], "fusion_w": product[:, projection.shape[1] :]}
        if "proj_b" in wanted:
            block["proj_b"] = part.sum(0)
        for name, value in block.items():
            got[name] = got[name].add_(value) if name in got else value.to(work)
    return got


def _scatter(grad_patch: Tensor, x: Tensor, grid: PatchGrid, time_major: bool) -> Tensor:
    """The gradient of gathering: every pixel's sum over the patches that hold it, (B, C, F, T)."""
    (p_f, p_t), (s_f, s_t) = grid.patch, grid.stride
    batch, channels, mel_bins, frames = x.shape
    n_f, n_t = grid.tokens(mel_bins, frames)
    patches = grad_patch.view(batch, n_t, n_f, channels, p_f, p_t).transpose(1, 2) if time_major else grad_patch
    by_patch = patches.reshape(batch, n_f, n_t, channels, p_f, p_t).permute(0, 3, 1, 2, 4, 5)
    unfold_backward = torch.ops.aten.unfold_backward
    rows = unfold_backward(by_patch, [batch, channels, n_f, frames, p_f], 3, p_t, s_t)
    grad_x: Tensor = unfold_backward(rows, [batch, channels, mel_bins, frames], 2, p_f, s_f)
    return grad_x
