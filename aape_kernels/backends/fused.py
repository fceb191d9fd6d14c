"""SBLU and the stem built from fused kernels: what GPU backends share, each of which has its own kernels.

A backend derives from `Kernels`, and `operations` then gives it the functions that the registered ops call. Matrix
products are PyTorch's; nothing here waits for the device. Rows are tokens (b, i, j), in the order of the layout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..geometry import PatchGrid
from ..ranges import LogitRanges, logit_ranges
from ..reference import working_dtype
from ..weights import Weights
from .gradients import like_inputs

__all__ = ["PARTIAL_SUMS", "Adjoint", "Kernels", "Operations", "operations"]

# At most so many programs compute partial sums of the weight's gradient, which are added up afterwards.
PARTIAL_SUMS = 512


class Adjoint(NamedTuple):
    """What one pass of a stem's backward leaves to matrix products.

    Attributes:
        operand: Rows [patch | features | 1 0 … | SiLU(hidden)], in the tokens' dtype.
        one, active: The columns where the ones and SiLU(hidden) begin.
        encoder: Rows [∂r | ∂hidden], in the tokens' dtype.
        grad_y: The cotangent of y (tokens, 2S), in the arithmetic's dtype, if asked for.
        weight: Parts (programs, S, C·P_f) of the projection's gradient, in the arithmetic's dtype.
    """

    operand: Tensor
    one: int
    active: int
    encoder: Tensor
    grad_y: Tensor | None
    weight: Tensor


class Kernels:
    """One backend's kernels for one call.

    In all of them, decay and frequency are (B, N_f, N_t, S) with the same strides or, given `ranges`, the Lambda
    Encoder's logits; they are in the arithmetic's dtype or in x's. `weight` is (S, C·P_f), contiguous.

    Features are rows (tokens, planes·S): [Re y | Im y], [n] or [Re y | Im y | n] for 2, 1 or 3 planes. n, the
    standardised log-magnitudes (docs/maths.md §4), needs all states of a token at once.

    Attributes:
        most_states: the most that one program holds at once. With more, `standardise` computes n from y in a separate
            pass, and the other kernels are not asked for n.
    """

    most_states: int

    def __init__(self, x: Tensor, states: int, grid: PatchGrid, quadrature: bool, time_major: bool) -> None:
        self.x, self.grid, self.states, self.quadrature, self.time_major = x, grid, states, quadrature, time_major
        self.n_f, self.n_t = grid.tokens(x.shape[2], x.shape[3])
        self.rows = x.shape[0] * self.n_f * self.n_t
        self.projected = x.shape[1] * grid.patch[0]  # R: rows of x that a projection reads
        self.patch = self.projected * grid.patch[1]
        self.work = working_dtype(x.dtype)

    def on_device(self) -> AbstractContextManager[object]:
        """A context on x's device, for launches; an empty one on a CPU, where the tests interpret and emulate."""
        return torch.cuda.device(self.x.device) if self.x.device.type == "cuda" else nullcontext()

    def by_token(self, rows: Tensor) -> Tensor:
        """Rows (tokens, …) as (B, N_f, N_t, …), a view."""
        batch = self.x.shape[0]
        rest = rows.shape[1:]
        if self.time_major:
            return rows.view(batch, self.n_t, self.n_f, *rest).transpose(1, 2)
        return rows.view(batch, self.n_f, self.n_t, *rest)

    def responses(
        self, decay: Tensor, frequency: Tensor, weight: Tensor, out: Tensor | None, ranges: LogitRanges | None = None,
        grad: Tensor | None = None, grad_y: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Write features into rows `out`; given `grad`, rows of their cotangent, also write that of y into `grad_y`,
        (tokens, 2S), contiguous, in the arithmetic's dtype. out and grad have any row stride; either may be missing.
        """
        raise NotImplementedError

    def standardise(self, y: Tensor, out: Tensor | None, grad: Tensor | None = None) -> None:
        """Write the features of y (tokens, 2S), contiguous, in the arithmetic's dtype, into rows `out`; given `grad`,
        their cotangent, overwrite y with that of y. Either may be missing; for any number of states."""
        raise NotImplementedError

    def grad_states(
        self, grad: Tensor, decay: Tensor, frequency: Tensor, weight: Tensor, grad_decay: Tensor,
        grad_frequency: Tensor, y: Tensor | None, ranges: LogitRanges | None = None,
    ) -> None:  # fmt: skip
        """Write rows (tokens, S) of the gradients of decay and frequency, or of their logits, and y if given."""
        raise NotImplementedError

    def grad_weight(self, grad: Tensor, decay: Tensor, frequency: Tensor, ranges: LogitRanges | None = None) -> Tensor:
        """The gradient of the projection, (S, C·P_f), in the arithmetic's dtype."""
        raise NotImplementedError

    def grad_x(
        self, grad: Tensor, decay: Tensor, frequency: Tensor, weight: Tensor, grad_x: Tensor,
        ranges: LogitRanges | None = None, add: bool = False,
    ) -> None:  # fmt: skip
        """Write, or add to, the gradient of x (B, C, F, T), contiguous."""
        raise NotImplementedError

    def at_once(
        self, grad: Tensor, decay: Tensor, frequency: Tensor, weight: Tensor, wanted: set[str]
    ) -> dict[str, Tensor]:
        """Gradients of x, decay, frequency or weight that a backend computes in one pass; the others are asked for by
        themselves. Decay's and frequency's are rows (tokens, S) in the arithmetic's dtype, x's in its own."""
        return {}

    def overlap_add(self, windows: Tensor, grad_x: Tensor) -> None:
        """Sum the patches' gradients, rows (tokens, C·P_f·P_t) in the arithmetic's dtype, into that of x."""
        raise NotImplementedError

    def gather(self, out: Tensor) -> None:
        """Write the patches into rows (tokens, C·P_f·P_t) of any row stride."""
        raise NotImplementedError

    def prologue(self, weights: Weights, operand: Tensor, hidden: Tensor, r: Tensor, ranges: LogitRanges) -> None:
        """Write rows of hidden (tokens, H), of r (tokens, 2S), and of the operand [patch | features], whose width tells
        the number of planes: none for the patches alone. The encoder's weights and the projection are contiguous
        rows."""
        raise NotImplementedError

    def tokens(self, weights: Weights, hidden: Tensor, r: Tensor, ranges: LogitRanges) -> Tensor | None:
        """The whole stem at once: rows of D in proj_w's dtype; rows of hidden (tokens, H) and of r (tokens, 2S) are
        written. None, and nothing written, if a backend has no such kernel for this call. Weights as for `prologue`;
        proj_w, proj_b and fusion_w of any strides."""
        return None

    def adjoint(
        self, grad: Tensor, weights: Weights, hidden: Tensor, r: Tensor, ranges: LogitRanges, need_y: bool
    ) -> Adjoint | None:
        """The stem's backward in one pass, from rows of the features' cotangent in the tokens' dtype; None if a backend
        has no such kernel for this call. Weights as for `prologue`."""
        return None

    def gradients(self, parts: dict[str, Tensor], weights: Weights) -> dict[str, Tensor]:
        """The weights' gradients from parts: matrices, or tensors of three axes, which are summed over the first."""
        return {name: part.sum(0) if part.dim() == 3 else part for name, part in parts.items()}

    def features(
        self, decay: Tensor, frequency: Tensor, weight: Tensor, out: Tensor | None, ranges: LogitRanges,
        grad: Tensor | None = None,
    ) -> Tensor | None:  # fmt: skip
        """Write features into rows `out`; given `grad`, their cotangent (tokens, planes·S), return that of y,
        (tokens, 2S) in the arithmetic's dtype. For any number of states; either may be missing."""
        rows = out if grad is None else grad
        if rows is None:
            return None
        shape = (self.rows, 2 * self.states)
        if rows.shape[1] == shape[1] or self.states <= self.most_states:
            grad_y = None if grad is None else self.x.new_empty(shape, dtype=self.work)
            self.responses(decay, frequency, weight, out, ranges, grad, grad_y)
            return grad_y
        y = self.x.new_empty(shape, dtype=self.work)
        self.responses(decay, frequency, weight, y, ranges)
        self.standardise(y, out, grad)
        return None if grad is None else y


class Operations(NamedTuple):
    """A backend's functions, as the registered ops call them."""

    sblu: Callable[..., Tensor]
    sblu_backward: Callable[..., tuple[Tensor | None, ...]]
    embed: Callable[..., tuple[Tensor, Tensor, Tensor]]
    embed_backward: Callable[..., tuple[Tensor | None, ...]]


def operations(kernels: type[Kernels]) -> Operations:
    """The four operations, built from one backend's kernels."""

    def sblu(x: Tensor, decay: Tensor, frequency: Tensor, weight: Tensor, grid: PatchGrid, quadrature: bool) -> Tensor:
        """y (B, N_f, N_t, 2, S) in x's dtype; x is read through its strides."""
        y = x.new_empty(*decay.shape[:3], 2, decay.shape[3])
        if y.numel():
            call = kernels(x, weight.shape[0], grid, quadrature, time_major=False)
            call.responses(*_alike(decay, frequency), _weight_rows(weight), y.view(call.rows, -1))
        return y

    def sblu_backward(
        grad: Tensor, x: Tensor, decay: Tensor, frequency: Tensor, weight: Tensor, grid: PatchGrid, quadrature: bool,
        need: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        """Gradients of x, decay, frequency, weight in their dtypes, contiguous; None where not needed."""
        inputs = {"x": x, "decay": decay, "frequency": frequency, "weight": weight}
        wanted = {name for name, wish in zip(inputs, need, strict=True) if wish}
        got: dict[str, Tensor] = {}
        if grad.numel():
            call = kernels(x, weight.shape[0], grid, quadrature, time_major=False)
            states, rows = _alike(decay, frequency), _weight_rows(weight)
            got = call.at_once(grad, *states, rows, wanted)
            if "x" in wanted - got.keys():
                got["x"] = x.new_empty(x.shape)
                call.grad_x(grad, *states, rows, got["x"])
            if wanted & {"decay", "frequency"} - got.keys():  # one kernel gives both
                got["decay"] = x.new_empty(call.rows, call.states, dtype=call.work)
                got["frequency"] = torch.empty_like(got["decay"])
                call.grad_states(grad, *states, rows, got["decay"], got["frequency"], None)
            if "weight" in wanted - got.keys():
                got["weight"] = call.grad_weight(grad, *states)
        return like_inputs(inputs, wanted, got)

    def embed(
        x: Tensor, weights: Weights, grid: PatchGrid, quadrature: bool, decay: Sequence[float],
        band: Sequence[float], time_major: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Tokens (B, N, D) in proj_w's dtype; r (B·N, 2S) and hidden (B·N, H) for the backward."""
        proj_w, proj_b, states, planes = weights.proj_w, weights.proj_b, weights.states, weights.planes
        call = kernels(x, states, grid, quadrature, time_major)
        shape = (x.shape[0], call.n_f * call.n_t, weights.dim)
        r = x.new_empty(call.rows, 2 * states, dtype=call.work)
        hidden = x.new_empty(call.rows, weights.hidden, dtype=call.work)
        rows, ranges = _as_rows(weights), logit_ranges(decay, band)
        at_once = call.tokens(rows, hidden, r, ranges) if call.rows else None
        if at_once is not None:
            return at_once.view(shape), r, hidden
        operand = x.new_empty(call.rows, call.patch + planes * states, dtype=proj_w.dtype)  # [patch | features]
        if call.rows:
            by_prologue = planes == 2 or states <= call.most_states
            written = operand if by_prologue else operand[:, : call.patch]
            call.prologue(rows, written, hidden, r, ranges)
            if not by_prologue:
                r_decay, r_frequency = call.by_token(r).chunk(2, dim=-1)
                call.features(r_decay, r_frequency, rows.sblu_w, operand[:, call.patch :], ranges)
        product = torch.cat([proj_w.flatten(1), weights.fusion_w.to(proj_w.dtype).flatten(1)], dim=1)
        tokens = F.linear(operand, product, None if proj_b is None else proj_b.to(proj_w.dtype))
        return tokens.view(shape), r, hidden

    def embed_backward(
        grad: Tensor, x: Tensor, weights: Weights, r: Tensor, hidden: Tensor, grid: PatchGrid, quadrature: bool,
        decay: Sequence[float], band: Sequence[float], time_major: bool, need: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        """Gradients of x and the weights in their dtypes, contiguous; None where not needed."""
        inputs = {"x": x, **weights._asdict()}
        wanted = {name for name, wish in zip(inputs, need, strict=True) if wish and inputs[name] is not None}
        got: dict[str, Tensor] = {}
        if grad.numel():
            call = kernels(x, weights.states, grid, quadrature, time_major)
            got = _stem_gradients(call, grad, weights, r, hidden, logit_ranges(decay, band), wanted)
        return like_inputs(inputs, wanted, got)

    return Operations(sblu, sblu_backward, embed, embed_backward)


def _alike(decay: Tensor, frequency: Tensor) -> tuple[Tensor, Tensor]:
    """Both with the same strides, as the kernels take them."""
    return (decay, frequency) if decay.stride() == frequency.stride() else (decay.contiguous(), frequency.contiguous())


def _weight_rows(weight: Tensor) -> Tensor:
    return weight.flatten(1).contiguous()


def _as_rows(weights: Weights) -> Weights:
    """The encoder's weights and the projection, as the kernels take them."""
    return weights._replace(
        w1=_weight_rows(weights.w1),
        b1=weights.b1.contiguous(),
        w2=weights.w2.contiguous(),
        b2=weights.b2.contiguous(),
        sblu_w=_weight_rows(weights.sblu_w),
    )


def _stem_gradients(
    call: Kernels, grad: Tensor, weights: Weights, r: Tensor, hidden: Tensor, ranges: LogitRanges, wanted: set[str]
) -> dict[str, Tensor]:
    """The wanted gradients, by the backend's single pass over x if it has one, else in steps."""
    out, flat = weights.proj_w.dtype, grad.reshape(call.rows, -1)
    rows = None
    if wanted & {"x", "w1", "b1", "w2", "b2", "sblu_w"}:
        rows = flat @ weights.fusion_w.to(out).flatten(1)
        adjoint = call.adjoint(rows, _as_rows(weights), hidden, r, ranges, "x" in wanted)
        if adjoint is not None:
            return _by_products(call, adjoint, flat, weights, r, ranges, wanted)
    return _by_steps(call, flat, rows, weights, r, hidden, ranges, wanted)


def _by_products(
    call: Kernels, adjoint: Adjoint, flat: Tensor, weights: Weights, r: Tensor, ranges: LogitRanges, wanted: set[str]
) -> dict[str, Tensor]:
    """What the single pass leaves: two matrix products, whose column of ones gives the biases' gradients."""
    logits, one = 2 * call.states, slice(adjoint.one, adjoint.one + 1)
    parts = {"sblu_w": adjoint.weight}
    if wanted & {"proj_w", "proj_b", "fusion_w"}:
        product = flat.t() @ adjoint.operand[:, : adjoint.active]
        features = slice(call.patch, adjoint.one)
        parts |= {"proj_w": product[:, : call.patch], "fusion_w": product[:, features], "proj_b": product[:, one]}
    if wanted & {"w1", "b1", "w2", "b2"}:
        product = adjoint.encoder.t() @ adjoint.operand
        parts |= {"w1": product[logits:, : call.patch], "b1": product[logits:, one]}
        parts |= {"w2": product[:logits, adjoint.active :], "b2": product[:logits, one]}
    got = call.gradients({name: part for name, part in parts.items() if name in wanted}, weights)
    if adjoint.grad_y is not None:
        grad_hidden = adjoint.encoder[:, logits:].to(call.work)
        grad_y = call.by_token(adjoint.grad_y.view(-1, 2, call.states))
        got["x"] = _grad_x(call, flat, weights, grad_hidden, grad_y, r, ranges)
    return got


def _by_steps(
    call: Kernels, flat: Tensor, rows: Tensor | None, weights: Weights, r: Tensor, hidden: Tensor,
    ranges: LogitRanges, wanted: set[str],
) -> dict[str, Tensor]:  # fmt: skip
    """rows: the features' cotangent; None if only gradients of the last product's weights are wanted."""
    x, w2 = call.x, weights.w2.to(call.work)
    states, patch, out = call.states, call.patch, weights.proj_w.dtype
    need_product = bool(wanted & {"proj_w", "fusion_w"})
    need_hidden = bool(wanted & {"x", "w1", "b1"})
    need_logits = need_hidden or bool(wanted & {"w2", "b2"})
    got: dict[str, Tensor] = {}

    decay, frequency = call.by_token(r).chunk(2, dim=-1)
    weight, planes = _weight_rows(weights.sblu_w), weights.planes
    operand = x.new_empty(call.rows, patch + planes * states, dtype=out) if need_product else None  # [patch | features]
    features = None if operand is None else operand[:, patch:]
    grad_y = grad_hidden = None
    if rows is not None:
        if planes != 2:  # going back through n needs y of all states: features come with it
            rows, features = call.features(decay, frequency, weight, features, ranges, rows), None
        assert rows is not None
        grad_y = call.by_token(rows.view(-1, 2, states))
    if need_logits and grad_y is not None:
        grad_r = torch.empty_like(r)
        grad_logits = grad_r[:, :states], grad_r[:, states:]
        call.grad_states(grad_y, decay, frequency, weight, *grad_logits, features, ranges)
        features = None
        got |= {"b2": grad_r.sum(0), "w2": grad_r.t() @ F.silu(hidden)}
        if need_hidden:
            grad_hidden = torch.ops.aten.silu_backward(grad_r @ w2, hidden)
    if features is not None:
        call.features(decay, frequency, weight, features, ranges)
    if "sblu_w" in wanted and grad_y is not None:
        got["sblu_w"] = call.grad_weight(grad_y, decay, frequency, ranges)

    if operand is not None:
        call.gather(operand[:, :patch])
        product = flat.t() @ operand
        got |= {"proj_w": product[:, :patch], "fusion_w": product[:, patch:]}
    if "proj_b" in wanted:
        got["proj_b"] = flat.sum(0)
    if grad_hidden is not None:
        got["b1"] = grad_hidden.sum(0)
        if "w1" in wanted:
            if operand is None or out != call.work:
                operand = x.new_empty(call.rows, patch, dtype=call.work)
                call.gather(operand)
            got["w1"] = grad_hidden.t() @ operand[:, :patch]
        if "x" in wanted and grad_y is not None:
            got["x"] = _grad_x(call, flat, weights, grad_hidden, grad_y, r, ranges)
    return got


def _grad_x(
    call: Kernels, flat: Tensor, weights: Weights, grad_hidden: Tensor, grad_y: Tensor, r: Tensor, ranges: LogitRanges
) -> Tensor:
    """The gradient through the patches, which projection and encoder read, and through the windows."""
    decay, frequency = call.by_token(r).chunk(2, dim=-1)
    w1, weight = weights.w1.to(call.work).flatten(1), _weight_rows(weights.sblu_w)
    windows = (flat @ weights.proj_w.flatten(1)).to(call.work).addmm_(grad_hidden, w1)
    grad_x = call.x.new_empty(call.x.shape, dtype=call.work)
    call.overlap_add(windows, grad_x)
    call.grad_x(grad_y, decay, frequency, weight, grad_x, ranges, add=True)
    return grad_x
