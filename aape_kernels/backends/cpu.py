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
        _run_sblu_backward(grad, x, *wide, None, out, grid, quadrature, None)
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
    y: Tensor | None,
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
        *map(view, (grad, x, decay, frequency, weight, y, *out)),
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

    def responses(
        self,
        x: Tensor,
        r: Tensor,
        weight: Tensor,
        dtype: torch.dtype,
        quadrature: bool,
        ranges: tuple[float, float, float, float],
    ) -> Tensor:
        """y (B·N, 2S)."""
        y = x.new_empty(self.rows, 2 * self.states, dtype=dtype)
        self.respond(x, r, weight, y, quadrature, ranges)
        return y

    def respond(
        self,
        x: Tensor,
        r: Tensor,
        weight: Tensor,
        y: Tensor,
        quadrature: bool,
        ranges: tuple[float, float, float, float],
    ) -> None:
        """Fill in y (B·N, 2S)."""
        decay, frequency = self.by_token(r).chunk(2, dim=-1)
        by_plane = self.by_token(y).unflatten(-1, (2, self.states))
        _run_sblu(x, decay, frequency, weight, by_plane, self.grid, quadrature, ranges)


def _onednn(*tensors: Tensor) -> bool:
    """Whether a float32 product should go to oneDNN rather than to the BLAS that `addmm` calls.

    On AMD processors with AVX-512 oneDNN takes half of MKL's time (benchmarks/NOTES.md). Its entry in torch is the op
    that inductor uses. Small products are not worth the search for a kernel.
    """
    return (
        all(tensor.dtype == torch.float32 for tensor in tensors)
        and math.prod(tensors[0].shape) * tensors[1].shape[0] >= 2**20
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """rows · weightᵀ + bias; weight is dense, in either order: oneDNN has no fast kernel for another one."""
    if _onednn(rows, weight):
        out: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
        return out
    return F.linear(rows, weight, bias)


# Tokens whose [patch | y] and cotangent are multiplied at once in the backward: together they stay in cache.
BLOCK = 1024


def _accumulate(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """total + left · right; `total` may be written to."""
    if total is None:
        return _product(left, right.t())
    if _onednn(left, right.t()):
        out: Tensor = torch.ops.mkldnn._linear_pointwise.binary(left, total, right.t(), None, "add")
        return out
    return total.addmm_(left, right)


def _weight_gradients(
    grad: Tensor | None, grad_hidden: Tensor | None, x: Tensor, y: Tensor, grid: PatchGrid, time_major: bool
) -> tuple[Tensor | None, Tensor | None]:
    """[patch | y]ᵀ · grad (C·P_f·P_t + 2S, D) and patchᵀ · grad_hidden (C·P_f·P_t, H), where those are given.

    Patches are gathered again, some clips at a time and transposed: the products then read both sides as they lie.
    """
    both: Tensor | None = None
    encoder: Tensor | None = None
    tokens = math.prod(grid.tokens(x.shape[2], x.shape[3]))
    clips = max(1, BLOCK // tokens)
    work = working_dtype(x.dtype)
    for first in range(0, x.shape[0], clips):
        some = x[first : first + clips]
        layout = _Layout(some, grid, y.shape[1] // 2, time_major)
        rows = slice(first * tokens, first * tokens + layout.rows)
        patches: Tensor | None = None
        if grad is not None:
            columns = x.new_empty(layout.width, layout.rows, dtype=grad.dtype)
            patches = columns[: layout.patch]
            layout.gather(some, patches.t())
            columns[layout.patch :].copy_(y[rows].t())
            both = _accumulate(both, columns, grad[rows])
        if grad_hidden is not None:
            if patches is None or patches.dtype != work:
                patches = x.new_empty(layout.patch, layout.rows, dtype=work)
                layout.gather(some, patches.t())
            encoder = _accumulate(encoder, patches, grad_hidden[rows])
    return both, encoder


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
    if not layout.rows:
        shape = (layout.batch, math.prod(layout.tokens), proj_w.shape[0])
        empty = [x.new_empty(0, width, dtype=work) for width in (w2.shape[0], w1.shape[0])]
        return x.new_empty(shape, dtype=out), empty[0], empty[1]
    operand, patches = layout.operand(x, out)
    hidden = _product(patches, w1.to(work).flatten(1), b1.to(work))
    r = _product(F.silu(hidden), w2.to(work), b2.to(work))
    layout.respond(x, r, sblu_w.to(work), operand[:, layout.patch :], quadrature, _ranges(decay, band))
    weight = torch.cat([proj_w.flatten(1), fusion_w.to(out).flatten(1)], dim=1)
    tokens = _product(operand, weight, None if proj_b is None else proj_b.to(out))
    return tokens.view(layout.batch, math.prod(layout.tokens), -1), r, hidden


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
        wide_sblu_w = sblu_w.to(work)
        grad_hidden: Tensor | None = None
        y: Tensor | None = None
        if "proj_b" in wanted:
            got["proj_b"] = flat.sum(0)
        if wanted & {"x", "w1", "b1", "w2", "b2", "sblu_w"}:
            grad_y = _product(flat, fusion_w.to(out).flatten(1).t())
            grad_r = torch.zeros_like(r)
            grad_x = _gradient(x, work) if "x" in wanted else None
            grad_sblu = _gradient(sblu_w, work) if "sblu_w" in wanted else None
            alpha, omega = layout.by_token(r).chunk(2, dim=-1)
            gradients = [grad_x, *layout.by_token(grad_r).chunk(2, dim=-1), grad_sblu]
            y = torch.empty_like(grad_y)
            by_plane = [layout.by_token(value).unflatten(-1, (2, layout.states)) for value in (grad_y, y)]
            _run_sblu_backward(
                by_plane[0], x, alpha, omega, wide_sblu_w, by_plane[1], gradients, grid, quadrature, ranges
            )
            if grad_sblu is not None:
                got["sblu_w"] = grad_sblu
            got["b2"] = grad_r.sum(0)
            if "w2" in wanted:
                got["w2"] = grad_r.t() @ F.silu(hidden)
            if wanted & {"x", "w1", "b1"}:
                grad_hidden = torch.ops.aten.silu_backward(_product(grad_r, w2.to(work).t()), hidden)
                got["b1"] = grad_hidden.sum(0)
            if grad_x is not None and grad_hidden is not None:
                grad_patch = _product(flat, proj_w.flatten(1).t()).to(work)
                grad_patch.addmm_(grad_hidden, w1.to(work).flatten(1))
                got["x"] = grad_x + _scatter(grad_patch, x, layout)
        fused = bool(wanted & {"proj_w", "fusion_w"})
        both, encoder = _weight_gradients(
            flat if fused else None,
            grad_hidden if "w1" in wanted else None,
            x,
            y if y is not None else layout.responses(x, r, wide_sblu_w, out, quadrature, ranges),
            grid,
            time_major,
        )
        if both is not None:
            got["proj_w"], got["fusion_w"] = both[: layout.patch].t(), both[layout.patch :].t()
        if encoder is not None:
            got["w1"] = encoder.t()
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
