"""The CPU backend: the native module gathers patches and runs the SBLU, torch does the matrix products.

The functions take what the registered ops take, on tensors that `functional` has checked.
"""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..geometry import PatchGrid
from ..reference import working_dtype
from . import native

if TYPE_CHECKING:
    from . import Call

__all__ = ["NATIVE_BUILT", "embed", "embed_backward", "reason", "sblu", "sblu_backward"]

# Whether this installation has the native module: looks for the file without loading it.
NATIVE_BUILT = find_spec("aape_kernels._native") is not None


def reason(call: Call) -> str | None:
    """Why this backend cannot run `call`, which is on the CPU."""
    if not NATIVE_BUILT:
        return "the native module was not built; `AAPE_NATIVE=require pip install …` shows why"
    return None


def sblu(x: Tensor, decay: Tensor, frequency: Tensor, weight: Tensor, grid: PatchGrid, quadrature: bool) -> Tensor:
    """y (B, N_f, N_t, 2, S) in x's dtype; x is read through its strides."""
    y = x.new_empty(*decay.shape[:3], 2, decay.shape[3])
    if y.numel():
        dtype = working_dtype(x.dtype)
        _run_sblu(x, decay.to(dtype), frequency.to(dtype), weight.to(dtype), y, grid, quadrature, None)
    return y


def sblu_backward(
    grad: Tensor,
    x: Tensor,
    decay: Tensor,
    frequency: Tensor,
    weight: Tensor,
    grid: PatchGrid,
    quadrature: bool,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, decay, frequency, weight in their dtypes, contiguous; empty where not needed."""
    dtype = working_dtype(x.dtype)
    wide = (decay.to(dtype), frequency.to(dtype), weight.to(dtype))
    out = [_gradient(value, dtype) if wanted else None for value, wanted in zip((x, *wide), need, strict=True)]
    if grad.numel() and any(need):
        _run_sblu_backward(grad, x, *wide, out, grid, quadrature, None)
    gradients = [
        value.new_empty(0) if gradient is None else gradient.to(value.dtype)
        for value, gradient in zip((x, decay, frequency, weight), out, strict=True)
    ]
    return gradients[0], gradients[1], gradients[2], gradients[3]


def _gradient(value: Tensor, dtype: torch.dtype) -> Tensor:
    # zeros: grad_x is added to, and tokens without a call (an empty batch) leave the weight's untouched
    return torch.zeros(value.shape, dtype=dtype, device=value.device)


def _run_sblu(
    x: Tensor,
    decay: Tensor,
    frequency: Tensor,
    weight: Tensor,
    y: Tensor,
    grid: PatchGrid,
    quadrature: bool,
    ranges: tuple[float, float, float, float] | None,
) -> None:
    view = native.view
    native.load().sblu(
        native.instruction_set(),
        native.sizes(x, grid, weight.shape[0]),
        quadrature,
        ranges,
        *map(view, (x, decay, frequency, weight, y)),
        torch.get_num_threads(),
    )


def _run_sblu_backward(
    grad: Tensor,
    x: Tensor,
    decay: Tensor,
    frequency: Tensor,
    weight: Tensor,
    out: list[Tensor | None],
    grid: PatchGrid,
    quadrature: bool,
    ranges: tuple[float, float, float, float] | None,
) -> None:
    view = native.view
    native.load().sblu_backward(
        native.instruction_set(),
        native.sizes(x, grid, weight.shape[0]),
        quadrature,
        ranges,
        *map(view, (grad, x, decay, frequency, weight, *out)),
        torch.get_num_threads(),
    )


class _Layout:
    """Where the tokens of one embed call lie: rows (b, i, j), or (b, j, i) if time-major, of [patch | y]."""

    def __init__(self, x: Tensor, grid: PatchGrid, states: int, time_major: bool) -> None:
        self.grid, self.time_major = grid, time_major
        self.batch, self.channels = x.shape[:2]
        self.tokens = grid.tokens(x.shape[2], x.shape[3])
        self.rows = self.batch * self.tokens[0] * self.tokens[1]
        self.patch = self.channels * grid.patch[0] * grid.patch[1]
        self.width = self.patch + 2 * states
        self.states = states

    def by_token(self, rows: Tensor) -> Tensor:
        """Rows (B·N, …) as (B, N_f, N_t, …), a view."""
        n_f, n_t = self.tokens
        shape = (self.batch, n_t, n_f) if self.time_major else (self.batch, n_f, n_t)
        tokens: Tensor = rows.unflatten(0, shape)
        return tokens.transpose(1, 2) if self.time_major else tokens

    def gather(self, x: Tensor, patches: Tensor) -> None:
        native.load().gather(
            native.instruction_set(),
            native.sizes(x, self.grid, self.states),
            native.view(x),
            native.view(self.by_token(patches)),
            torch.get_num_threads(),
        )

    def operand(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """[patch | y] with the patches filled in, and the patches in the arithmetic's dtype for the encoder."""
        operand = x.new_empty(self.rows, self.width, dtype=dtype)
        patches = operand[:, : self.patch]
        self.gather(x, patches)
        work = working_dtype(x.dtype)
        if dtype != work:
            patches = x.new_empty(self.rows, self.patch, dtype=work)
            self.gather(x, patches)
        return operand, patches

    def respond(
        self,
        x: Tensor,
        r: Tensor,
        weight: Tensor,
        operand: Tensor,
        quadrature: bool,
        ranges: tuple[float, float, float, float],
    ) -> None:
        """Fill in y."""
        decay, frequency = self.by_token(r).chunk(2, dim=-1)
        y = self.by_token(operand[:, self.patch :]).unflatten(-1, (2, self.states))
        _run_sblu(x, decay, frequency, weight, y, self.grid, quadrature, ranges)


def _ranges(decay: list[float], band: list[float]) -> tuple[float, float, float, float]:
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
    layout = _Layout(x, grid, sblu_w.shape[0], time_major)
    work, out = working_dtype(x.dtype), proj_w.dtype
    tokens = x.new_empty(layout.batch, math.prod(layout.tokens), proj_w.shape[0], dtype=out)
    hidden = x.new_empty(layout.rows, w1.shape[0], dtype=work)
    r = x.new_empty(layout.rows, w2.shape[0], dtype=work)
    if tokens.numel():
        operand, patches = layout.operand(x, out)
        torch.addmm(b1.to(work), patches, w1.to(work).flatten(1).t(), out=hidden)
        torch.addmm(b2.to(work), F.silu(hidden), w2.to(work).t(), out=r)
        layout.respond(x, r, sblu_w.to(work), operand, quadrature, _ranges(decay, band))
        weight = torch.cat([proj_w.flatten(1), fusion_w.to(out).flatten(1)], dim=1)
        flat = tokens.view(layout.rows, -1)
        if proj_b is None:
            torch.mm(operand, weight.t(), out=flat)
        else:
            torch.addmm(proj_b.to(out), operand, weight.t(), out=flat)
    return tokens, r, hidden


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
    """Gradients of the nine inputs in their dtypes, empty where not needed; [patch | y] is computed again."""
    inputs = (x, proj_w, proj_b, w1, b1, w2, b2, sblu_w, fusion_w)
    names = ("x", "proj_w", "proj_b", "w1", "b1", "w2", "b2", "sblu_w", "fusion_w")
    wanted = {name for name, value, needed in zip(names, inputs, need, strict=True) if needed and value is not None}
    got: dict[str, Tensor] = {}
    layout = _Layout(x, grid, sblu_w.shape[0], time_major)
    work, out = working_dtype(x.dtype), proj_w.dtype
    if grad.numel():
        flat = grad.reshape(layout.rows, -1)
        ranges = _ranges(decay, band)
        if "proj_b" in wanted:
            got["proj_b"] = flat.sum(0)
        operand, patches = layout.operand(x, out)
        if wanted & {"proj_w", "fusion_w"}:
            layout.respond(x, r, sblu_w.to(work), operand, quadrature, ranges)
            both = flat.t() @ operand  # [D, C·P_f·P_t + 2S]
            got["proj_w"], got["fusion_w"] = both[:, : layout.patch], both[:, layout.patch :]
        if wanted & {"x", "w1", "b1", "w2", "b2", "sblu_w"}:
            grad_y = flat @ fusion_w.to(out).flatten(1)
            grad_r = torch.zeros_like(r)
            grad_x = _gradient(x, work) if "x" in wanted else None
            grad_sblu = _gradient(sblu_w, work) if "sblu_w" in wanted else None
            alpha, omega = layout.by_token(r).chunk(2, dim=-1)
            gradients = [grad_x, *layout.by_token(grad_r).chunk(2, dim=-1), grad_sblu]
            cotangent = layout.by_token(grad_y).unflatten(-1, (2, layout.states))
            _run_sblu_backward(cotangent, x, alpha, omega, sblu_w.to(work), gradients, grid, quadrature, ranges)
            if grad_sblu is not None:
                got["sblu_w"] = grad_sblu
            got["b2"] = grad_r.sum(0)
            if "w2" in wanted:
                got["w2"] = grad_r.t() @ F.silu(hidden)
            if wanted & {"x", "w1", "b1"}:
                grad_hidden = torch.ops.aten.silu_backward(grad_r @ w2.to(work), hidden)
                got["b1"] = grad_hidden.sum(0)
                if "w1" in wanted:
                    got["w1"] = grad_hidden.t() @ patches
                if grad_x is not None:
                    grad_patch = (flat @ proj_w.flatten(1)).to(work)
                    grad_patch.addmm_(grad_hidden, w1.to(work).flatten(1))
                    got["x"] = grad_x + _scatter(grad_patch, x, layout)
    return tuple(
        x.new_empty(0)
        if name not in wanted or value is None
        else got[name].reshape(value.shape).to(value.dtype).contiguous()
        if name in got
        else torch.zeros_like(value, memory_format=torch.contiguous_format)
        for name, value in zip(names, inputs, strict=True)
    )


def _scatter(grad_patch: Tensor, x: Tensor, layout: _Layout) -> Tensor:
    """The gradient of gathering: every pixel's sum over the patches that hold it, (B, C, F, T)."""
    (p_f, p_t), (s_f, s_t) = layout.grid.patch, layout.grid.stride
    batch, channels, mel_bins, frames = x.shape
    by_patch = layout.by_token(grad_patch).unflatten(-1, (channels, p_f, p_t)).permute(0, 3, 1, 2, 4, 5)
    unfold_backward = torch.ops.aten.unfold_backward
    rows = unfold_backward(by_patch, [batch, channels, layout.tokens[0], frames, p_f], 3, p_t, s_t)
    grad_x: Tensor = unfold_backward(rows, [batch, channels, mel_bins, frames], 2, p_f, s_f)
    return grad_x
