"""From tensors to kernels: sizes, blocks, outputs, and the matrix products around the stem's prologue.

The functions take what the registered ops take, on tensors that `functional` has checked. Nothing here waits for the
device, and every launch is on the current stream of x's device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from ...geometry import PatchGrid
from ..gradients import like_inputs
from . import interpreted
from .configurations import Configuration, configuration
from .overlap_add import overlap_add_kernel
from .sblu_kernels import sblu_bwd_state_kernel, sblu_bwd_weight_kernel, sblu_bwd_window_kernel, sblu_fwd_kernel
from .stem_kernels import gather_kernel, stem_fwd_kernel

__all__ = ["embed", "embed_backward", "sblu", "sblu_backward"]

# Most programs whose partial sums of the weight's gradient are added up afterwards.
PARTIAL_SUMS = 512
# Lines and frames a program of the overlap-add has.
OVERLAP_BLOCK = (8, 128)
# Elements of a patch, and hidden units, that the encoder's products take at once.
PATCH_BLOCK = 32
HIDDEN_BLOCK = 16

# The decay's low end and log ratio, the band's low end and width: where decay and frequency are logits.
Ranges = tuple[float, float, float, float]


def _on(device: torch.device) -> AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _precision(device: torch.device) -> str:
    """TF32 only where the caller has allowed it."""
    return "tf32" if device.type == "cuda" and torch.get_float32_matmul_precision() != "highest" else "ieee"


def _narrow(a: Tensor, b: Tensor) -> bool:
    """Whether a product of the two can take its 16-bit operands as they are; the interpreter's goes wrong on them."""
    return a.dtype == b.dtype and a.dtype != torch.float32 and not interpreted()


def _power_of_2(n: int, low: int, high: int) -> int:
    return max(low, min(high, 1 << (n - 1).bit_length()))


class _Call:
    """What every kernel of one call has in common: the grid's numbers, and the blocks they ask for."""

    def __init__(self, x: Tensor, states: int, grid: PatchGrid, quadrature: bool, time_major: bool) -> None:
        self.x, self.grid, self.states, self.time_major = x, grid, states, time_major
        self.n_f, self.n_t = grid.tokens(x.shape[2], x.shape[3])
        self.rows = x.shape[0] * self.n_f * self.n_t
        self.projected = x.shape[1] * grid.patch[0]  # R: rows of x that a projection reads
        self.patch = self.projected * grid.patch[1]
        # products want 16 of everything; below that multiply-adds
        self.dot = self.projected >= 16
        self.block_states = _power_of_2(states, 16 if self.dot else 1, 64)
        self.block_rows = 1 if not self.dot else 32 if self.projected % 32 == 0 else 16
        self.sizes: dict[str, Any] = {
            "S": states,
            "R": self.projected,
            "K": grid.window,
            "QUADRATURE": quadrature,
            "TIME_MAJOR": time_major,
            "BS": self.block_states,
            "DOT": self.dot,
            "PRECISION": _precision(x.device),
        }
        self.window: dict[str, Any] = {
            "P_F": grid.patch[0],
            "S_F": grid.stride[0],
            "S_T": grid.stride[1],
            "OFFSET": grid.offset,
            "WITHIN": grid.offset >= 0,  # windows inside their patches need no check against the clip's ends
        }
        self.state_blocks = triton.cdiv(states, self.block_states)
        self.counts = (self.rows, self.n_f, self.n_t)

    def by_token(self, rows: Tensor) -> Tensor:
        """Rows (tokens, …) as (B, N_f, N_t, …), a view."""
        batch = self.x.shape[0]
        rest = rows.shape[1:]
        if self.time_major:
            return rows.view(batch, self.n_t, self.n_f, *rest).transpose(1, 2)
        return rows.view(batch, self.n_f, self.n_t, *rest)

    def launch(
        self, name: str, kernel: Any, programs: Callable[[int], tuple[int, ...]], *arguments: Any, **sizes: Any
    ) -> None:
        """Run a kernel on the grid that `programs` gives for a block of tokens."""

        def run(chosen: Configuration) -> None:
            kernel[programs(chosen.tokens)](
                *arguments, **sizes, BN=chosen.tokens, num_warps=chosen.num_warps, num_stages=chosen.num_stages
            )

        dtypes = "-".join(str(value.dtype).removeprefix("torch.") for value in arguments if isinstance(value, Tensor))
        key = " ".join([*(f"{k}={v}" for k, v in sizes.items()), dtypes])
        with _on(self.x.device):
            run(configuration(name, self.rows, key, self.x.device, run))


def _responses(
    call: _Call, decay: Tensor, frequency: Tensor, weight: Tensor, y: Tensor, ranges: Ranges | None = None
) -> None:
    """Write y into rows (tokens, 2S) that may lie apart; decay and frequency (B, N_f, N_t, S) of the same strides."""
    call.launch(
        "sblu_fwd",
        sblu_fwd_kernel,
        lambda tokens: (triton.cdiv(call.rows, tokens), call.state_blocks),
        call.x, decay, frequency, weight, y, *call.counts, call.x.shape[3], *call.x.stride(),
        *decay.stride(), y.stride(0), *(ranges or (0.0,) * 4),
        **call.sizes, **call.window,
        RANGES=ranges is not None, BR=call.block_rows, NARROW=_narrow(call.x, weight),
    )  # fmt: skip


def _grad_states(
    call: _Call, grad: Tensor, decay: Tensor, frequency: Tensor, weight: Tensor, grad_decay: Tensor,
    grad_frequency: Tensor, y: Tensor | None, ranges: Ranges | None = None,
) -> None:  # fmt: skip
    """Write rows (tokens, S) of the gradients of decay and frequency, or of their logits, and y where it is given."""
    call.launch(
        "sblu_bwd_state",
        sblu_bwd_state_kernel,
        lambda tokens: (triton.cdiv(call.rows, tokens), call.state_blocks),
        grad, call.x, decay, frequency, weight, grad_decay, grad_frequency, grad_decay if y is None else y,
        *call.counts, call.x.shape[3], *call.x.stride(), *decay.stride(), *grad.stride(),
        grad_decay.stride(0), 0 if y is None else y.stride(0), *(ranges or (0.0,) * 4),
        **call.sizes, **call.window,
        RANGES=ranges is not None, RESPONSES=y is not None, BR=call.block_rows, NARROW=_narrow(call.x, weight),
    )  # fmt: skip


def _grad_weight(call: _Call, grad: Tensor, decay: Tensor, frequency: Tensor, ranges: Ranges | None = None) -> Tensor:
    """The gradient of the projection, (S, R) in float32."""
    block = _power_of_2(call.projected, 16, 64) if call.dot else 1
    programs = min(PARTIAL_SUMS, triton.cdiv(call.rows, 16))
    partial = call.x.new_empty(programs, call.states, call.projected, dtype=torch.float32)
    call.launch(
        "sblu_bwd_weight",
        sblu_bwd_weight_kernel,
        lambda _: (programs, call.state_blocks, triton.cdiv(call.projected, block)),
        grad, call.x, decay, frequency, partial, *call.counts, call.x.shape[3], *call.x.stride(),
        *decay.stride(), *grad.stride(), *(ranges or (0.0,) * 4),
        **call.sizes, **call.window, RANGES=ranges is not None, BR=block, NARROW=False,
    )  # fmt: skip
    return partial.sum(0)


def _grad_x(
    call: _Call, grad: Tensor, decay: Tensor, frequency: Tensor, weight: Tensor, grad_x: Tensor,
    ranges: Ranges | None = None, add: bool = False,
) -> None:  # fmt: skip
    """Write, or add to, the gradient of x (B, C, F, T), contiguous, by way of every token's window."""
    windows = call.x.new_empty(call.rows, call.projected, call.grid.window, dtype=torch.float32)
    call.launch(
        "sblu_bwd_window",
        sblu_bwd_window_kernel,
        lambda tokens: (triton.cdiv(call.rows, tokens), triton.cdiv(call.projected, call.block_rows)),
        grad, decay, frequency, weight, windows, *call.counts, *decay.stride(), *grad.stride(),
        *(ranges or (0.0,) * 4), **call.sizes, RANGES=ranges is not None, BR=call.block_rows,
    )  # fmt: skip
    _overlap_add(call, windows, grad_x, call.grid.window, add)


def _overlap_add(call: _Call, windows: Tensor, grad_x: Tensor, length: int, add: bool) -> None:
    """Sum windows (tokens, R, length) into x's gradient; `length` frames are centred on the patch."""
    channels, mel_bins, frames = grad_x.shape[1:]
    lines = grad_x.shape[:3].numel()
    block_lines, block_frames = OVERLAP_BLOCK
    with _on(grad_x.device):
        overlap_add_kernel[(triton.cdiv(lines, block_lines), triton.cdiv(frames, block_frames))](
            windows, grad_x, call.n_f, call.n_t, lines, mel_bins, frames,
            C=channels, P_F=call.grid.patch[0], S_F=call.grid.stride[0], K=length, S_T=call.grid.stride[1],
            OFFSET=(call.grid.patch[1] - length) // 2, TIME_MAJOR=call.time_major, ADD=add,
            BL=block_lines, BT=block_frames,
        )  # fmt: skip


def _gather(call: _Call, out: Tensor) -> None:
    """Fill rows (tokens, C · P_f · P_t), which may lie apart, with the patches."""
    block = _power_of_2(call.patch, 16, 64)
    call.launch(
        "gather",
        gather_kernel,
        lambda tokens: (triton.cdiv(call.rows, tokens), triton.cdiv(call.patch, block)),
        call.x, out, *call.counts, *call.x.stride(), out.stride(0),
        P_F=call.grid.patch[0], P_T=call.grid.patch[1], E=call.patch, S_F=call.grid.stride[0],
        S_T=call.grid.stride[1], TIME_MAJOR=call.time_major, BE=block,
    )  # fmt: skip


def _alike(decay: Tensor, frequency: Tensor) -> tuple[Tensor, Tensor]:
    """Both with the same strides, as the kernels take them."""
    return (decay, frequency) if decay.stride() == frequency.stride() else (decay.contiguous(), frequency.contiguous())


def _weight_rows(weight: Tensor) -> Tensor:
    return weight.flatten(1).contiguous()


def sblu(x: Tensor, decay: Tensor, frequency: Tensor, weight: Tensor, grid: PatchGrid, quadrature: bool) -> Tensor:
    """y (B, N_f, N_t, 2, S) in x's dtype; x is read through its strides."""
    y = x.new_empty(*decay.shape[:3], 2, decay.shape[3])
    if y.numel():
        call = _Call(x, weight.shape[0], grid, quadrature, time_major=False)
        _responses(call, *_alike(decay, frequency), _weight_rows(weight), y.view(call.rows, -1))
    return y


def sblu_backward(
    grad: Tensor, x: Tensor, decay: Tensor, frequency: Tensor, weight: Tensor, grid: PatchGrid, quadrature: bool,
    need: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of x, decay, frequency, weight in their dtypes, contiguous; empty where not needed."""
    inputs = {"x": x, "decay": decay, "frequency": frequency, "weight": weight}
    wanted = {name for name, wish in zip(inputs, need, strict=True) if wish}
    got: dict[str, Tensor] = {}
    if grad.numel():
        call = _Call(x, weight.shape[0], grid, quadrature, time_major=False)
        states, rows = _alike(decay, frequency), _weight_rows(weight)
        if "x" in wanted:
            got["x"] = x.new_empty(x.shape)
            _grad_x(call, grad, *states, rows, got["x"])
        if wanted & {"decay", "frequency"}:  # one kernel gives both
            out = decay.new_empty(call.rows, call.states), frequency.new_empty(call.rows, call.states)
            _grad_states(call, grad, *states, rows, *out, None)
            got |= {"decay": out[0], "frequency": out[1]}
        if "weight" in wanted:
            got["weight"] = _grad_weight(call, grad, *states)
    return like_inputs(inputs, wanted, got)


def _ranges(decay: list[float], band: list[float]) -> Ranges:
    return decay[0], math.log(decay[1] / decay[0]), band[0], band[1] - band[0]


def embed(
    x: Tensor, proj_w: Tensor, proj_b: Tensor | None, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, sblu_w: Tensor,
    fusion_w: Tensor, grid: PatchGrid, quadrature: bool, decay: list[float], band: list[float], time_major: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Tokens (B, N, D) in proj_w's dtype; r (B·N, 2S) and hidden (B·N, H) for the backward."""
    states, width = sblu_w.shape[0], w1.shape[0]
    call = _Call(x, states, grid, quadrature, time_major)
    operand = x.new_empty(call.rows, call.patch + 2 * states, dtype=proj_w.dtype)  # [patch | y]
    r = x.new_empty(call.rows, 2 * states, dtype=torch.float32)
    hidden = x.new_empty(call.rows, width, dtype=torch.float32)
    if call.rows:
        call.launch(
            "stem_fwd",
            stem_fwd_kernel,
            lambda tokens: (triton.cdiv(call.rows, tokens), call.state_blocks),
            x, _weight_rows(w1), b1.contiguous(), w2.contiguous(), b2.contiguous(), _weight_rows(sblu_w), operand,
            hidden, r, *call.counts, x.shape[3], *x.stride(), *_ranges(decay, band),
            **call.sizes, **call.window,
            H=width, P_T=grid.patch[1], BR=call.block_rows, BH=_power_of_2(width, 16, 2**20), BE=PATCH_BLOCK,
            BK=HIDDEN_BLOCK, NARROW_W1=_narrow(x, w1),
            NARROW=_narrow(x, sblu_w),
        )  # fmt: skip
    weight = torch.cat([proj_w.flatten(1), fusion_w.to(proj_w.dtype).flatten(1)], dim=1)
    tokens = F.linear(operand, weight, None if proj_b is None else proj_b.to(proj_w.dtype))
    return tokens.view(x.shape[0], call.n_f * call.n_t, proj_w.shape[0]), r, hidden


def embed_backward(
    grad: Tensor, x: Tensor, proj_w: Tensor, proj_b: Tensor | None, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor,
    sblu_w: Tensor, fusion_w: Tensor, r: Tensor, hidden: Tensor, grid: PatchGrid, quadrature: bool,
    decay: list[float], band: list[float], time_major: bool, need: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of the nine inputs in their dtypes, contiguous; empty where not needed."""
    inputs = {"x": x, "proj_w": proj_w, "proj_b": proj_b, "w1": w1, "b1": b1, "w2": w2, "b2": b2, "sblu_w": sblu_w,
              "fusion_w": fusion_w}  # fmt: skip
    wanted = {name for name, wish in zip(inputs, need, strict=True) if wish and inputs[name] is not None}
    got: dict[str, Tensor] = {}
    if grad.numel():
        call = _Call(x, sblu_w.shape[0], grid, quadrature, time_major)
        got = _stem_gradients(call, grad, inputs, r, hidden, _ranges(decay, band), wanted)
    return like_inputs(inputs, wanted, got)


def _stem_gradients(
    call: _Call, grad: Tensor, inputs: dict[str, Any], r: Tensor, hidden: Tensor, ranges: Ranges, wanted: set[str]
) -> dict[str, Tensor]:
    x, proj_w, sblu_w = inputs["x"], inputs["proj_w"], inputs["sblu_w"]
    w1, w2 = inputs["w1"].float().flatten(1), inputs["w2"].float()
    states, patch, out = call.states, call.patch, proj_w.dtype
    flat = grad.reshape(call.rows, -1)
    need_product = bool(wanted & {"proj_w", "fusion_w"})
    need_hidden = bool(wanted & {"x", "w1", "b1"})
    need_logits = need_hidden or bool(wanted & {"w2", "b2"})
    got: dict[str, Tensor] = {}

    decay, frequency = call.by_token(r).chunk(2, dim=-1)
    weight = _weight_rows(sblu_w)
    operand = x.new_empty(call.rows, patch + 2 * states, dtype=out) if need_product else None  # [patch | y]
    y = None if operand is None else operand[:, patch:]
    grad_y = grad_hidden = None
    if need_logits or "sblu_w" in wanted:
        rows = flat @ inputs["fusion_w"].to(out).flatten(1)
        grad_y = call.by_token(rows.view(-1, 2, states))
    if need_logits and grad_y is not None:
        grad_r = torch.empty_like(r)
        grad_logits = grad_r[:, :states], grad_r[:, states:]
        _grad_states(call, grad_y, decay, frequency, weight, *grad_logits, y, ranges)
        got |= {"b2": grad_r.sum(0), "w2": grad_r.t() @ F.silu(hidden)}
        if need_hidden:
            grad_hidden = torch.ops.aten.silu_backward(grad_r @ w2, hidden)
    elif y is not None:
        _responses(call, decay, frequency, weight, y, ranges)
    if "sblu_w" in wanted and grad_y is not None:
        got["sblu_w"] = _grad_weight(call, grad_y, decay, frequency, ranges)

    if operand is not None:
        _gather(call, operand[:, :patch])
        product = flat.t() @ operand
        got |= {"proj_w": product[:, :patch], "fusion_w": product[:, patch:]}
    if "proj_b" in wanted:
        got["proj_b"] = flat.sum(0)
    if grad_hidden is not None:
        got["b1"] = grad_hidden.sum(0)
        if "w1" in wanted:
            if operand is None or out != torch.float32:
                operand = x.new_empty(call.rows, patch, dtype=torch.float32)
                _gather(call, operand)
            got["w1"] = grad_hidden.t() @ operand[:, :patch]
        if "x" in wanted and grad_y is not None:
            windows = (flat @ proj_w.flatten(1)).float().addmm_(grad_hidden, w1)
            grad_x = x.new_empty(x.shape, dtype=torch.float32)
            _overlap_add(call, windows, grad_x, call.grid.patch[1], add=False)
            _grad_x(call, grad_y, decay, frequency, weight, grad_x, ranges, add=True)
            got["x"] = grad_x
    return got
