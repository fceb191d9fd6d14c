"""The whole stem on the CPU: one native call forward and one backward.

Where tokens have 16 bits the products with their weights are torch's, whose oneDNN has instructions for them; the
native call then ends at their operand, [patch | features], and begins at the features' cotangent.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..geometry import PatchGrid
from ..reference import working_dtype
from . import native
from .gradients import like_inputs

__all__ = ["embed", "embed_backward"]

# Tokens whose operand and cotangent the backward with 16 bits works on at once.
BLOCK = 1024


def _rows(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight as the native module takes it: contiguous, in the arithmetic's dtype."""
    return weight.to(dtype).contiguous()


def _ranges(decay: list[float], band: list[float]) -> native.Ranges:
    return decay[0], math.log(decay[1] / decay[0]), band[0], band[1] - band[0]


def embed(
    x: Tensor,
    proj_w: Tensor,
    proj_b: Tensor | None,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    sblu_w: Tensor,
    fusion_w: Tensor,
    grid: PatchGrid,
    quadrature: bool,
    decay: list[float],
    band: list[float],
    time_major: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (B, N, D) in proj_w's dtype; r (B·N, 2S) and hidden (B·N, H) for the backward."""
    work, out = working_dtype(x.dtype), proj_w.dtype
    batch, tokens = x.shape[0], math.prod(grid.tokens(x.shape[2], x.shape[3]))
    rows = batch * tokens
    r = x.new_empty(rows, w2.shape[0], dtype=work)
    hidden = x.new_empty(rows, w1.shape[0], dtype=work)
    encoder = [_rows(value, work) for value in (w1, b1, w2, b2, sblu_w)]
    shape = (fusion_w.shape[1], proj_w.shape[0], w1.shape[0], time_major)
    run = native.Stem(x, grid, quadrature, _ranges(decay, band), sblu_w.shape[0], shape)
    if out == work:
        result = x.new_empty(batch, tokens, proj_w.shape[0], dtype=out)
        if rows:
            projection = [_rows(proj_w, work), None if proj_b is None else _rows(proj_b, work)]
            run.forward((*projection, *encoder, _rows(fusion_w, work)), (result, None, hidden, r))
        return result, r, hidden

    operand = x.new_empty(rows, proj_w[0].numel() + fusion_w[0].numel(), dtype=out)  # [patch | features]
    if rows:
        run.forward((None, None, *encoder, None), (None, operand, hidden, r))
    weight = torch.cat([proj_w.flatten(1), fusion_w.to(out).flatten(1)], dim=1)
    flat = F.linear(operand, weight, None if proj_b is None else proj_b.to(out))
    return flat.view(batch, tokens, -1), r, hidden


def embed_backward(
    grad: Tensor,
    x: Tensor,
    proj_w: Tensor,
    proj_b: Tensor | None,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    sblu_w: Tensor,
    fusion_w: Tensor,
    r: Tensor,
    hidden: Tensor,
    grid: PatchGrid,
    quadrature: bool,
    decay: list[float],
    band: list[float],
    time_major: bool,
    need: list[bool],
) -> tuple[Tensor, ...]:
    """Gradients of the nine inputs in their dtypes, contiguous; empty where not needed."""
    inputs = {
        "x": x,
        "proj_w": proj_w,
        "proj_b": proj_b,
        "w1": w1,
        "b1": b1,
        "w2": w2,
        "b2": b2,
        "sblu_w": sblu_w,
        "fusion_w": fusion_w,
    }
    wanted = {name for name, wish in zip(inputs, need, strict=True) if wish and inputs[name] is not None}
    got: dict[str, Tensor] = {}
    if grad.numel() and wanted:
        options = (grid, quadrature, _ranges(decay, band), time_major)
        narrow = proj_w.dtype != working_dtype(x.dtype)
        got = (_narrow_gradients if narrow else _gradients)(grad, inputs, r, hidden, options, wanted)
    return like_inputs(inputs, wanted, got)


Options = tuple[PatchGrid, bool, native.Ranges, bool]


def _gradients(
    grad: Tensor, inputs: dict[str, Any], r: Tensor, hidden: Tensor, options: Options, wanted: set[str]
) -> dict[str, Tensor]:
    """All of it in one native call."""
    x = inputs["x"]
    work = working_dtype(x.dtype)
    weights = [None if value is None else _rows(value, work) for name, value in inputs.items() if name != "x"]
    got = {
        # of what no patch holds, x's gradient is zero, and it is added to
        name: x.new_zeros(value.shape) if name == "x" else x.new_empty(value.shape, dtype=work)
        for name, value in inputs.items()
        if value is not None and name in wanted
    }
    flat = grad.reshape(r.shape[0], -1)
    _run(x, inputs, options).backward(weights, (hidden, r, flat.contiguous(), None, None), [got.get(n) for n in inputs])
    return got


def _run(x: Tensor, inputs: dict[str, Any], options: Options) -> native.Stem:
    grid, quadrature, ranges, time_major = options
    proj_w, w1, sblu_w, fusion_w = (inputs[name] for name in ("proj_w", "w1", "sblu_w", "fusion_w"))
    shape = (fusion_w.shape[1], proj_w.shape[0], w1.shape[0], time_major)
    return native.Stem(x, grid, quadrature, ranges, sblu_w.shape[0], shape)


def _narrow_gradients(
    grad: Tensor, inputs: dict[str, Any], r: Tensor, hidden: Tensor, options: Options, wanted: set[str]
) -> dict[str, Tensor]:
    """With torch's products in 16 bits, in blocks of clips; sums over blocks in their order."""
    x, proj_w, fusion_w = inputs["x"], inputs["proj_w"], inputs["fusion_w"]
    work, out = working_dtype(x.dtype), proj_w.dtype
    projection, fusion = proj_w.flatten(1), fusion_w.to(out).flatten(1)
    inner = {"proj_w", "proj_b", "fusion_w"}
    weights = [
        None if value is None or name in inner else _rows(value, work) for name, value in inputs.items() if name != "x"
    ]
    need_product = bool(wanted & {"proj_w", "fusion_w"})
    need_branch = bool(wanted - inner)
    tokens = grad.shape[1]
    clips, flat = max(1, BLOCK // tokens), grad.reshape(r.shape[0], -1)
    got: dict[str, Tensor] = {"x": x.new_zeros(x.shape, dtype=work)} if "x" in wanted else {}
    for first in range(0, x.shape[0], clips):
        some = x[first : first + clips]
        rows = slice(first * tokens, (first + some.shape[0]) * tokens)
        part = flat[rows]
        block = {
            name: x.new_empty(value.shape, dtype=work)
            for name, value in inputs.items()
            if value is not None and name in wanted - inner - {"x"}
        }
        own = {**block, **({"x": got["x"][first : first + clips]} if "x" in wanted else {})}
        operand = flat.new_empty(len(part), projection.shape[1] + fusion.shape[1]) if need_product else None
        if need_branch or operand is not None:
            features = part @ fusion if need_branch else None
            _run(some, inputs, options).backward(
                weights, (hidden[rows], r[rows], None, features, operand), [own.get(name) for name in inputs]
            )
        if "x" in wanted:
            own["x"] += _scatter((part @ projection).to(work), some, options[0], options[3])
        if operand is not None:
            product = part.t() @ operand
            block |= {"proj_w": product[:, : projection.shape[1]], "fusion_w": product[:, projection.shape[1] :]}
        if "proj_b" in wanted:
            block["proj_b"] = part.sum(0)
        for name, value in block.items():
            got[name] = got[name] + value if name in got else value
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
