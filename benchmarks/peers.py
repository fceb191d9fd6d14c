"""Everything that is timed: one factory table of plain PyTorch, torch.compile and this package's backends.

A peer turns a `Problem` into a `Work`. The compiler is handed to the factories, so that tests can check what a compiled
peer computes without waiting for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aape_kernels import reference, sblu
from aape_kernels.backends import Call, reasons
from aape_kernels.geometry import PatchGrid

from .cases import Problem

__all__ = ["CONV2D", "Compiler", "Peer", "Work", "compile_static", "peers", "work_of"]

Compiler = Callable[[Callable[..., Any]], Callable[..., Any]]


def compile_static(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compile` as the peers use it: one static graph, which is its fastest form."""
    return torch.compile(function, fullgraph=True, dynamic=False)


@dataclass(frozen=True)
class Work:
    """What is checked and timed: `forward()` returns the output; `wrt` names the tensors backward is asked for."""

    forward: Callable[[], Tensor]
    wrt: dict[str, Tensor]


@dataclass(frozen=True)
class Peer:
    """One row of the table.

    Attributes:
        name: as the table prints it.
        formula: what it has to compute, see `cases.truth`.
        make: builds it for one problem.
        baseline: whether this package's backends are to be compared with it ("× best peer"): by others, and the same.
        compiled: whether it waits for torch.compile.
    """

    name: str
    formula: str
    make: Callable[[Problem, Compiler], Work]
    baseline: bool = True
    compiled: bool = False


def peers(op: str, device: torch.device, dtype: torch.dtype = torch.float32) -> list[Peer]:
    """Every peer of "stem" or "sblu" that can run on `device`, this package's backends among them."""
    call = Call("embed" if op == "stem" else "sblu", device, dtype)
    # the reference has a row of its own under another name
    ours = [name for name, why in reasons(call).items() if why is None and name != "reference"]
    if op == "stem":
        return [
            CONV2D,
            Peer("rearrange + Linear", "plain", linear_stem),
            Peer("Conv2d + MLP", "mlp", mlp_stem, baseline=False),
            Peer("products alone", "products", product_stem, baseline=False),
            Peer("AaPE, reference", "aape", aape_stem("reference"), baseline=False),
            Peer("AaPE, torch.compile", "aape", aape_stem("reference", compiled=True), baseline=False, compiled=True),
            *(Peer(f"AaPE, {name}", "aape", aape_stem(name), baseline=False) for name in ours),
        ]
    return [
        Peer("direct sum, complex", "sblu", complex_sblu),
        Peer("direct sum, real (reference)", "sblu", backend_sblu("reference")),
        Peer("direct sum, torch.compile", "sblu", backend_sblu("reference", compiled=True), compiled=True),
        Peer("Horner, torch.compile", "sblu", horner_sblu, compiled=True),
        *(Peer(f"sblu, {name}", "sblu", backend_sblu(name), baseline=False) for name in ours),
    ]


def work_of(peer: Peer, problem: Problem, mode: str, compile_: Compiler = compile_static) -> Work:
    """The peer's work, under autocast if the mode says so."""
    work = peer.make(problem, compile_)
    if not mode.startswith("autocast"):
        return work

    def forward() -> Tensor:
        with torch.autocast(problem.x.device.type, dtype=torch.bfloat16):
            return work.forward()

    return replace(work, forward=forward)


def _leaves(problem: Problem, *names: str) -> dict[str, Tensor]:
    """The named parameters, all unless named, as fresh leaves that require grad."""
    return {name: problem.parameters[name].clone().requires_grad_() for name in names or problem.parameters}


# Stems: all deliver contiguous (B, N, D) tokens, as the first LayerNorm of a ViT wants them.


def conv_stem(problem: Problem, compile_: Compiler) -> Work:
    """The patch embedding of an audio ViT, with its view made contiguous."""
    wrt = _leaves(problem, "proj.weight", "proj.bias")
    stem = nn.Conv2d(problem.sizes.channels, problem.sizes.dim, problem.sizes.patch, problem.sizes.stride)
    stem.weight, stem.bias = nn.Parameter(wrt["proj.weight"]), nn.Parameter(wrt["proj.bias"])
    return Work(
        lambda: stem(problem.x).flatten(2).transpose(1, 2).contiguous(),
        {"proj.weight": stem.weight, "proj.bias": stem.bias},
    )


CONV2D = Peer("Conv2d", "plain", conv_stem)


def linear_stem(problem: Problem, compile_: Compiler) -> Work:
    """The same stem in its fastest plain form: patches gathered into rows, then one product."""
    wrt = _leaves(problem, "proj.weight", "proj.bias")
    (p_f, p_t), (s_f, s_t) = problem.sizes.patch, problem.sizes.stride

    def forward() -> Tensor:
        patches = problem.x.unfold(2, p_f, s_f).unfold(3, p_t, s_t)  # [B, C, N_f, N_t, P_f, P_t]
        rows = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)  # [B, N, C·P_f·P_t]
        return F.linear(rows, wrt["proj.weight"].flatten(1), wrt["proj.bias"])

    return Work(forward, wrt)


def mlp_stem(problem: Problem, compile_: Compiler) -> Work:
    """The control of `aape_ssl`: the convolution, and an MLP branch with as many parameters as AaPE's."""
    stem = problem.mlp()
    return Work(lambda: stem(problem.x).contiguous(), dict(stem.named_parameters()))


class _Products(torch.autograd.Function):
    """Tokens of an operand [patch | features], and the gradients of weight, bias and features alone."""

    @staticmethod
    def forward(ctx: Any, operand: Tensor, features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        weight, bias = weight.to(operand.dtype), bias.to(operand.dtype)
        ctx.save_for_backward(operand, weight)
        ctx.patch = operand.shape[1] - features.shape[1]
        return F.linear(operand, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,), (operand, weight) = grads, ctx.saved_tensors
        return None, grad @ weight[:, ctx.patch :], grad.t() @ operand, grad.sum(0)


def product_stem(problem: Problem, compile_: Compiler) -> Work:
    """What no stem that adds features can do without: PyTorch's products of an operand [patch | features] that is there
    already, forward and for the gradients of the weights, the bias and the features."""
    operand, weight = problem.operand()
    operand = operand.to(problem.cotangent.dtype)  # as autocast has it
    patch = problem.parameters["proj.weight"][0].numel()
    wrt = {
        "features": operand[:, patch:].clone().requires_grad_(),
        "weight": weight.requires_grad_(),
        "bias": problem.parameters["proj.bias"].clone().requires_grad_(),
    }
    return Work(lambda: _Products.apply(operand, *wrt.values()).view(problem.batch, -1, len(weight)), wrt)


def aape_stem(backend: str, compiled: bool = False) -> Callable[[Problem, Compiler], Work]:
    """A factory of the whole AaPE stem on one backend."""

    def make(problem: Problem, compile_: Compiler) -> Work:
        stem = problem.sizes.stem(backend, device=problem.x.device, dtype=problem.x.dtype)
        stem.load_state_dict(problem.parameters)
        run = compile_(stem) if compiled else stem
        return Work(lambda: run(problem.x), dict(stem.named_parameters()))

    return make


# SBLU alone.


def backend_sblu(backend: str, compiled: bool = False) -> Callable[[Problem, Compiler], Work]:
    """A factory of `aape_kernels.sblu` on one backend."""

    def make(problem: Problem, compile_: Compiler) -> Work:
        sizes, wrt = problem.sizes, _leaves(problem)

        def call(x: Tensor, decay: Tensor, frequency: Tensor, weight: Tensor) -> Tensor:
            return sblu(x, decay, frequency, weight, sizes.patch, sizes.stride, sizes.window, sizes.kernel, backend)

        run = compile_(call) if compiled else call
        return Work(lambda: run(problem.x, **wrt), wrt)

    return make


def complex_sblu(problem: Problem, compile_: Compiler) -> Work:
    """The formula as a paper's code would have it, in complex PyTorch; no care is taken near Λ = 0."""
    sizes, grid, wrt = problem.sizes, problem.sizes.grid, _leaves(problem)

    def forward() -> Tensor:
        rows = problem.x.unfold(2, grid.patch[0], grid.stride[0])  # [B, C, N_f, T, P_f]
        u = torch.einsum("bcitp,scp->bits", rows, wrt["weight"])
        u = F.pad(u, (0, 0, -grid.offset, -grid.offset)).unfold(2, grid.window, grid.stride[1])  # [B, N_f, N_t, S, K]
        lam = torch.complex(wrt["decay"], wrt["frequency"]).unsqueeze(-1)
        d = torch.arange(grid.window, device=u.device) - (grid.window - 1) / 2
        h = 2 * torch.sinh(lam / 2) / lam * torch.exp(-lam * d.abs())
        if sizes.kernel == "quadrature":
            h = torch.complex(h.real, h.imag * torch.sign(d))
        y = (h * u).sum(-1)
        return torch.stack([y.real, y.imag], dim=-2)

    return Work(forward, wrt)


# Horner's form of docs/maths.md §2.3, as well as torch.compile can be told it: the window is projected, folded about
# its centre
# and evaluated with both polynomials in registers; forward and adjoint are one graph each. torch.compile's own
# derivative of the forward is slower and takes minutes to compile, so the adjoint is written out.


def horner_sblu(problem: Problem, compile_: Compiler) -> Work:
    """SBLU by Horner's rule in real arithmetic, both directions by torch.compile."""
    grid, quadrature, wrt = problem.sizes.grid, problem.sizes.kernel == "quadrature", _leaves(problem)
    run_forward = compile_(partial(horner_forward, grid=grid, quadrature=quadrature))
    run_backward = compile_(partial(horner_backward, grid=grid, quadrature=quadrature))

    class Horner(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, decay: Tensor, frequency: Tensor, weight: Tensor) -> Any:
            y, u = run_forward(x, decay, frequency, weight)
            ctx.save_for_backward(x, decay, frequency, u)
            return y

        @staticmethod
        def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor | None, ...]:
            return None, *run_backward(*ctx.saved_tensors, *grad)

    apply: Callable[..., Tensor] = Horner.apply
    return Work(lambda: apply(problem.x, *wrt.values()), wrt)


def horner_forward(
    x: Tensor, decay: Tensor, frequency: Tensor, weight: Tensor, grid: PatchGrid, quadrature: bool
) -> tuple[Tensor, Tensor]:
    """y (B, N_f, N_t, 2, S), and the projected rows u (B·N_f, T, S) that its adjoint needs.

    Projected first: each frame is then read once with the states side by side, which is how the compiler vectorises.
    """
    rows = _rows(x, grid)  # [B·N_f, C·P_f, T]
    u = torch.bmm(rows.transpose(1, 2), weight.flatten(1).t().expand(len(rows), -1, -1))
    plus, minus = _fold(u, decay.shape, grid)
    z_re, z_im, g_re, g_im = _z_and_gain(decay, frequency, grid.window % 2 == 0)[:4]
    p_re, p_im = _horner(plus, z_re, z_im)
    q_re, q_im = _horner(minus, z_re, z_im) if quadrature else (p_re, p_im)
    return torch.stack([g_re * p_re - g_im * p_im, g_re * q_im + g_im * q_re], dim=-2), u


def horner_backward(
    x: Tensor, decay: Tensor, frequency: Tensor, u: Tensor, grad: Tensor, grid: PatchGrid, quadrature: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The adjoint of docs/maths.md §2.5: gradients for decay, frequency and weight; P and dP/dz come from one run."""
    even = grid.window % 2 == 0
    plus, minus = _fold(u, decay.shape, grid)
    z_re, z_im, g_re, g_im, e_re, e_im = _z_and_gain(decay, frequency, even)  # e: γ′
    gz_re, gz_im = g_re * z_re - g_im * z_im, g_re * z_im + g_im * z_re

    def derivative(frames: list[Tensor]) -> tuple[Tensor, Tensor]:
        """f′ = γ′ P − γ z dP/dz."""
        p_re, p_im = frames[-1], torch.zeros_like(z_re)
        d_re, d_im = torch.zeros_like(z_re), torch.zeros_like(z_re)
        for frame in reversed(frames[:-1]):
            d_re, d_im = d_re * z_re - d_im * z_im + p_re, d_re * z_im + d_im * z_re + p_im
            p_re, p_im = p_re * z_re - p_im * z_im + frame, p_re * z_im + p_im * z_re
        return (
            e_re * p_re - e_im * p_im - gz_re * d_re + gz_im * d_im,
            e_re * p_im + e_im * p_re - gz_re * d_im - gz_im * d_re,
        )

    to_re, to_im = grad.unbind(-2)
    f_re, f_im = derivative(plus)
    h_re, h_im = derivative(minus) if quadrature else (f_re, f_im)
    grad_decay = to_re * f_re + to_im * h_im
    grad_frequency = to_im * h_re - to_re * f_im

    later, earlier = [], []  # gradients of the frames after and before the centre, innermost first
    s_re, s_im = g_re, g_im  # γ z^m
    for m in range(len(plus)):
        if quadrature:
            even_part, odd_part = to_re * s_re, to_im * s_im
            if m == 0 and not even:
                odd_part = torch.zeros_like(odd_part)
            later.append(even_part + odd_part)
            earlier.append(even_part - odd_part)
        else:
            later.append(to_re * s_re + to_im * s_im)
            earlier.append(later[-1])
        s_re, s_im = s_re * z_re - s_im * z_im, s_re * z_im + s_im * z_re
    outward = earlier if even else earlier[1:]  # the centre frame of an odd window is one frame, not two
    window = torch.stack(outward[::-1] + later, dim=3)  # [B, N_f, N_t, K, S]
    frames = _rows(x, grid)
    if grid.offset or grid.window != grid.stride[1]:  # else the windows tile the rows, and need no copy
        frames = _windows(frames.transpose(1, 2), grid).permute(0, 2, 1, 3).flatten(2)
    frames = frames[:, :, : window.shape[2] * grid.window]  # [B·N_f, C·P_f, N_t·K]
    grad_weight = torch.bmm(frames, window.reshape(len(frames), -1, decay.shape[3])).sum(0)  # [C·P_f, S]
    return grad_decay, grad_frequency, grad_weight.t().reshape(-1, x.shape[1], grid.patch[0])


def _rows(x: Tensor, grid: PatchGrid) -> Tensor:
    """x (B, C, F, T) -> one matrix a row of patches, (B·N_f, C·P_f, T); a view where patches do not overlap."""
    rows = x.unfold(2, grid.patch[0], grid.stride[0]).permute(0, 2, 1, 4, 3)
    return rows.reshape(x.shape[0] * rows.shape[1], -1, x.shape[3])


def _windows(rows: Tensor, grid: PatchGrid) -> Tensor:
    """Rows (B·N_f, T, …) -> the window of every token, (B·N_f, N_t, …, K): a view unless K > P_t."""
    if grid.offset:  # crops where K < P_t, pads with zeros where K > P_t
        rows = F.pad(rows, (0, 0, -grid.offset, -grid.offset))
    return rows.unfold(1, grid.window, grid.stride[1])


def _fold(u: Tensor, shape: torch.Size, grid: PatchGrid) -> tuple[list[Tensor], list[Tensor]]:
    """w⁺_m and w⁻_m of rows u (B·N_f, T, S), innermost first, each of `shape` (B, N_f, N_t, S)."""
    frames = _windows(u, grid).reshape(*shape, grid.window).unbind(-1)
    half = grid.window // 2
    after, before = frames[grid.window - half :], frames[:half][::-1]
    plus = [a + b for a, b in zip(after, before, strict=True)]
    minus = [a - b for a, b in zip(after, before, strict=True)]
    if grid.window % 2:
        plus, minus = [frames[half], *plus], [torch.zeros_like(frames[half]), *minus]
    return plus, minus


def _horner(frames: list[Tensor], z_re: Tensor, z_im: Tensor) -> tuple[Tensor, Tensor]:
    p_re, p_im = frames[-1], torch.zeros_like(z_re)
    for frame in reversed(frames[:-1]):
        p_re, p_im = p_re * z_re - p_im * z_im + frame, p_re * z_im + p_im * z_re
    return p_re, p_im


def _z_and_gain(decay: Tensor, frequency: Tensor, even: bool) -> tuple[Tensor, ...]:
    """z, γ and γ′ as real and imaginary parts; the series are as long as float32 needs."""
    norm = decay.square() + frequency.square()
    small = norm < reference.SMALL**2
    inverse = 1 / torch.where(small, 1.0, norm)
    a, w = torch.where(small, decay, 0.0), torch.where(small, frequency, 0.0)

    def over_lambda(re: Tensor, im: Tensor) -> tuple[Tensor, Tensor]:
        return (re * decay + im * frequency) * inverse, (im * decay - re * frequency) * inverse

    fall = torch.expm1(-decay)
    sin, cos = torch.sin(frequency / 2), torch.cos(frequency / 2)
    top_re, top_im = 2 * (1 + fall) * sin.square() - fall, 2 * (1 + fall) * sin * cos  # 1 − z
    z_re, z_im = 1 - top_re, -top_im
    if even:
        terms = [(-1) ** n / math.factorial(n + 1) for n in range(8)]
        series = reference.power_series(terms, a, w)
        slope = reference.power_series([n * term for n, term in enumerate(terms)][1:], a, w)
    else:
        sinh, cosh = torch.sinh(decay / 2), torch.cosh(decay / 2)
        top_re, top_im = 2 * sinh * cos, 2 * cosh * sin
        terms = [0.25**n / math.factorial(2 * n + 1) for n in range(5)]
        square = a.square() - w.square(), 2 * a * w
        series = reference.power_series(terms, *square)
        by_square = reference.power_series([2 * n * term for n, term in enumerate(terms)][1:], *square)
        slope = by_square[0] * a - by_square[1] * w, by_square[0] * w + by_square[1] * a
    plain = over_lambda(top_re, top_im)
    g_re, g_im = torch.where(small, series[0], plain[0]), torch.where(small, series[1], plain[1])
    end = (z_re, z_im) if even else (cosh * cos, sinh * sin)
    plain = over_lambda(end[0] - g_re, end[1] - g_im)
    e_re, e_im = torch.where(small, slope[0], plain[0]), torch.where(small, slope[1], plain[1])
    return z_re, z_im, g_re, g_im, e_re, e_im
