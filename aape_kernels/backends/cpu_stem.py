"""The whole stem on the CPU: forward in one go, backward in blocks of clips that stay in cache."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..geometry import PatchGrid
from ..reference import working_dtype
from . import native
from .gradients import like_inputs

__all__ = ["embed", "embed_backward"]

# Tokens whose operand and cotangent the backward works on at once.
BLOCK = 1024


class _Layout:
    """Where the tokens of some clips lie: rows (b, i, j), or (b, j, i) if time-major."""

    def __init__(self, x: Tensor, grid: PatchGrid, states: int, time_major: bool) -> None:
        self.grid, self.time_major, self.states = grid, time_major, states
        self.batch = x.shape[0]
        self.tokens = grid.tokens(x.shape[2], x.shape[3])
        self.rows = self.batch * math.prod(self.tokens)
        self.patch = x.shape[1] * math.prod(grid.patch)

    def by_token(self, rows: Tensor) -> Tensor:
        """Rows (B·N, …) as (B, N_f, N_t, …), a view."""
        n_f, n_t = self.tokens
        rest = rows.shape[1:]
        if self.time_major:
            return rows.view(self.batch, n_t, n_f, *rest).transpose(1, 2)
        return rows.view(self.batch, n_f, n_t, *rest)

    def by_plane(self, features: Tensor) -> Tensor:
        """Features (B·N, planes·S) as (B, N_f, N_t, planes, S), a view."""
        return self.by_token(features.unflatten(1, (-1, self.states)))

    def gather(self, x: Tensor, patches: Tensor) -> None:
        """Fill in patches (B·N, C·P_f·P_t)."""
        native.gather(x, self.by_token(patches), self.grid)


@functools.cache
def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _onednn(rows: Tensor, weight: Tensor) -> bool:
    """Whether a float32 product should go to oneDNN rather than to the BLAS that `addmm` calls.

    On AMD processors with AVX-512 oneDNN takes half of MKL's time (benchmarks/NOTES.md). Its entry in torch is the op
    that inductor uses. Small products are not worth the search for a kernel.
    """
    return (
        rows.dtype == weight.dtype == torch.float32
        and rows.numel() * weight.shape[0] >= 2**20
        and _has_onednn()
        and bool(torch.backends.mkldnn.enabled)
    )


def _dense(weight: Tensor) -> Tensor:
    # rows or columns with gaps between them would send oneDNN to its reference loop, a thousand times slower
    return weight if weight.is_contiguous() or weight.t().is_contiguous() else weight.contiguous()


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """rows · weightᵀ + bias."""
    if _onednn(rows, weight):
        out: Tensor = torch.ops.mkldnn._linear_pointwise(rows, _dense(weight), bias, "none", [], "")
        return out
    return F.linear(rows, weight, bias)


def _accumulate(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """total + left · right; `total` may be written to."""
    if total is None:
        return _product(left, right.t())
    if _onednn(left, right.t()):  # its own addition takes longer than another pass (benchmarks/NOTES.md)
        return total.add_(_product(left, right.t()))
    return total.addmm_(left, right)


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
    layout = _Layout(x, grid, sblu_w.shape[0], time_major)
    work, out = working_dtype(x.dtype), proj_w.dtype
    shape = (layout.batch, math.prod(layout.tokens), proj_w.shape[0])
    if not layout.rows:
        empty = [x.new_empty(0, width, dtype=work) for width in (w2.shape[0], w1.shape[0])]
        return x.new_empty(shape, dtype=out), empty[0], empty[1]

    features = fusion_w.shape[1] * layout.states
    operand = x.new_empty(layout.rows, layout.patch + features, dtype=out)  # [patch | features]
    patches = operand[:, : layout.patch]
    layout.gather(x, patches)
    if out != work:  # the encoder's are not to be rounded
        patches = x.new_empty(layout.rows, layout.patch, dtype=work)
        layout.gather(x, patches)
    hidden = _product(patches, w1.to(work).flatten(1), b1.to(work))
    r = _product(F.silu(hidden), w2.to(work), b2.to(work))
    alpha, omega = layout.by_token(r).chunk(2, dim=-1)
    by_plane = layout.by_plane(operand[:, layout.patch :])
    native.sblu(x, alpha, omega, sblu_w.to(work), by_plane, grid, quadrature, _ranges(decay, band))
    weight = torch.cat([proj_w.flatten(1), fusion_w.to(out).flatten(1)], dim=1)
    tokens = _product(operand, weight, None if proj_b is None else proj_b.to(out))
    return tokens.view(shape), r, hidden


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
    if grad.numel():
        backward = _Backward(x, proj_w, w1, w2, sblu_w, fusion_w, r, hidden, grid, quadrature, time_major, wanted)
        got = backward.run(grad, _ranges(decay, band))
    return like_inputs(inputs, wanted, got)


class _Backward:
    """One backward of the stem: block by block, sums over tokens in the blocks' order.

    The operand is gathered again, transposed, with a row of ones between patches and features, [patch | 1 | features]ᵀ:
    the products with the cotangents of tokens and of hidden then read both sides as they lie, and give the biases'
    gradients too.
    """

    def __init__(
        self,
        x: Tensor,
        proj_w: Tensor,
        w1: Tensor,
        w2: Tensor,
        sblu_w: Tensor,
        fusion_w: Tensor,
        r: Tensor,
        hidden: Tensor,
        grid: PatchGrid,
        quadrature: bool,
        time_major: bool,
        wanted: set[str],
    ) -> None:
        self.work, self.out = working_dtype(x.dtype), proj_w.dtype
        self.x, self.r, self.hidden, self.grid = x, r, hidden, grid
        self.quadrature, self.time_major = quadrature, time_major
        self.proj_w = proj_w.flatten(1)  # [D, C·P_f·P_t]
        self.planes, self.fusion_w = fusion_w.shape[1], fusion_w.to(self.out).flatten(1)  # [D, planes · S]
        self.w1, self.w2, self.sblu_w = w1.to(self.work).flatten(1), w2.to(self.work), sblu_w.to(self.work)
        self.need_x = "x" in wanted
        self.need_hidden = bool(wanted & {"x", "w1", "b1"})
        self.need_logits = self.need_hidden or bool(wanted & {"w2", "b2", "sblu_w"})
        self.need_encoder = bool(wanted & {"w1", "b1"})
        self.need_product = bool(wanted & {"proj_w", "proj_b", "fusion_w"})
        self.need_sblu = "sblu_w" in wanted

    def run(self, grad: Tensor, ranges: native.Ranges) -> dict[str, Tensor]:
        x, work = self.x, self.work
        tokens = grad.shape[1]
        clips = max(1, BLOCK // tokens)
        flat = grad.reshape(x.shape[0] * tokens, -1)
        grad_r = torch.empty_like(self.r)
        grad_x = torch.zeros(x.shape, dtype=work) if self.need_x else None
        product: Tensor | None = None  # [patch | 1 | features]ᵀ · grad
        encoder: Tensor | None = None  # [patch | 1]ᵀ · grad_hidden
        sblu_w: Tensor | None = None
        for first in range(0, x.shape[0], clips):
            some = x[first : first + clips]
            rows = slice(first * tokens, first * tokens + some.shape[0] * tokens)
            layout = _Layout(some, self.grid, self.sblu_w.shape[0], self.time_major)
            part = flat[rows]
            features = flat.new_empty(layout.rows, self.planes * layout.states)
            alpha, omega = layout.by_token(self.r[rows]).chunk(2, dim=-1)
            grad_hidden: Tensor | None = None
            if self.need_logits:
                grad_y = layout.by_plane(_product(part, self.fusion_w.t()))
                y: Tensor | None = layout.by_plane(features)
                if self.planes != 2:  # back through n, which takes y of all states: the features come with it
                    grad_features = grad_y
                    grad_y = layout.by_plane(flat.new_empty(layout.rows, 2 * layout.states, dtype=work))
                    self.respond(some, layout, alpha, omega, features, ranges, grad_features, grad_y)
                    y = None
                grad_some = None if grad_x is None else grad_x[first : first + clips]
                grad_sblu = torch.empty_like(self.sblu_w) if self.need_sblu else None
                gradients = (grad_some, *layout.by_token(grad_r[rows]).chunk(2, dim=-1), grad_sblu)
                native.sblu_backward(
                    grad_y,
                    some,
                    alpha,
                    omega,
                    self.sblu_w,
                    y,
                    gradients,
                    self.grid,
                    self.quadrature,
                    ranges,
                )
                if grad_sblu is not None:
                    sblu_w = grad_sblu if sblu_w is None else sblu_w.add_(grad_sblu)
                if self.need_hidden:
                    grad_activation = _product(grad_r[rows], self.w2.t())
                    grad_hidden = torch.ops.aten.silu_backward(grad_activation, self.hidden[rows])
                if grad_some is not None and grad_hidden is not None:
                    grad_patch = _product(part, self.proj_w.t()).to(work)
                    grad_patch.addmm_(grad_hidden, self.w1)
                    grad_some += _scatter(grad_patch, some, layout)
            elif self.need_product:
                self.respond(some, layout, alpha, omega, features, ranges)
            if self.need_product:
                columns = self.columns(some, layout, features, self.out)
                product = _accumulate(product, columns, part)
            if self.need_encoder and grad_hidden is not None:
                if not self.need_product or self.out != work:
                    columns = self.columns(some, layout, None, work)
                encoder = _accumulate(encoder, columns[: layout.patch + 1], grad_hidden)

        got = {"b2": grad_r.sum(0), "w2": grad_r.t() @ F.silu(self.hidden)} if self.need_logits else {}
        patch = self.w1.shape[1]
        if product is not None:
            got |= {
                "proj_w": product[:patch].t(),
                "proj_b": product[patch].clone(),
                "fusion_w": product[patch + 1 :].t(),
            }
        if encoder is not None:
            got |= {"w1": encoder[:patch].t(), "b1": encoder[patch].clone()}
        if sblu_w is not None:
            got["sblu_w"] = sblu_w
        if grad_x is not None:
            got["x"] = grad_x
        return got

    def respond(
        self,
        x: Tensor,
        layout: _Layout,
        alpha: Tensor,
        omega: Tensor,
        features: Tensor,
        ranges: native.Ranges,
        grad_features: Tensor | None = None,
        grad_y: Tensor | None = None,
    ) -> None:
        """Fill in features (tokens, planes·S) and, with their cotangent, that of y."""
        by_plane = layout.by_plane(features)
        native.sblu(x, alpha, omega, self.sblu_w, by_plane, self.grid, self.quadrature, ranges, grad_features, grad_y)

    @staticmethod
    def columns(x: Tensor, layout: _Layout, features: Tensor | None, dtype: torch.dtype) -> Tensor:
        """[patch | 1 | features]ᵀ, or [patch | 1]ᵀ."""
        height = layout.patch + 1 + (0 if features is None else features.shape[1])
        columns = x.new_empty(height, layout.rows, dtype=dtype)
        layout.gather(x, columns[: layout.patch].t())
        columns[layout.patch] = 1
        if features is not None:
            columns[layout.patch + 1 :] = features.t()
        return columns


def _scatter(grad_patch: Tensor, x: Tensor, layout: _Layout) -> Tensor:
    """The gradient of gathering: every pixel's sum over the patches that hold it, (B, C, F, T)."""
    (p_f, p_t), (s_f, s_t) = layout.grid.patch, layout.grid.stride
    batch, channels, mel_bins, frames = x.shape
    by_patch = layout.by_token(grad_patch).unflatten(-1, (channels, p_f, p_t)).permute(0, 3, 1, 2, 4, 5)
    unfold_backward = torch.ops.aten.unfold_backward
    rows = unfold_backward(by_patch, [batch, channels, layout.tokens[0], frames, p_f], 3, p_t, s_t)
    grad_x: Tensor = unfold_backward(rows, [batch, channels, mel_bins, frames], 2, p_f, s_f)
    return grad_x
