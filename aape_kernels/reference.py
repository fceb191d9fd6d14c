"""The formulas as they stand, in plain PyTorch: what every other backend is checked against.

All arithmetic is real, on separate real and imaginary planes: complex tensors have no 16-bit dtypes, and
`torch.compile` does not fuse them. All operations are ordinary differentiable ones, so autograd (twice), vmap, export
and every device come with PyTorch.

Arguments are trusted here: `aape_kernels.functional` has checked them.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from .geometry import PatchGrid, is_traced, sizes_of
from .weights import Weights

__all__ = [
    "autocasting",
    "device_type",
    "embed",
    "features",
    "full_precision",
    "gather",
    "lambda_encoder",
    "logits",
    "magnitudes",
    "sblu",
    "squash",
    "working_dtype",
]

CPU = torch.device("cpu")

# Below this |Λ| the gain and its derivative cancel, so they are summed as series (docs/maths.md §2.4). The
# terms kept leave a remainder under 1e-19 at |Λ| = 0.2, for the second derivative too.
SMALL = 0.2
EVEN_SERIES = [(-1) ** n / math.factorial(n + 1) for n in range(15)]
ODD_SERIES = [0.25**n / math.factorial(2 * n + 1) for n in range(8)]

# For the log-magnitudes (docs/maths.md §4): responses below ε count as silence, and the variance's floor keeps a token
# whose states all respond alike at zero.
EPSILON = 0.1
VARIANCE_FLOOR = 1e-5
# Beyond this |y|/ε, the 1 of log1p is lost in rounding, and the square is on its way to overflowing.
LOUD = 1e9

# Planes of the fusion weight, from which `embed` knows the features.
PLANES = {"both": 3, "complex": 2, "magnitude": 1}


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic for input of `dtype`: float64 for float64, float32 for the rest."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def device_type(device: torch.device) -> str:
    """`device.type`, which torch spells out each time: 14 µs behind a large call, where a comparison takes one."""
    return "cpu" if device == CPU else device.type


def _can_autocast(kind: str) -> bool:
    return kind in ("cpu", "cuda") or torch.amp.is_autocast_available(kind)


# Set by hand, as torch.compiler.assume_constant_result imports all of dynamo: that of torch 2.11 cannot trace the
# question.
_can_autocast._dynamo_marked_constant = True  # type: ignore[attr-defined]


def autocasting(device: torch.device) -> bool:
    """Whether autocast is on for `device`, of whatever kind."""
    kind = device_type(device)
    return _can_autocast(kind) and torch.is_autocast_enabled(kind)


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Turn autocast off for what is kept in float32 (docs/maths.md §5); a no-op where no autocast is on (or can be)."""
    return torch.autocast(device.type, enabled=False) if autocasting(device) else nullcontext()


def power_series(coefficients: list[float], re: Tensor, im: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_n coefficients[n] · (re + j im)ⁿ by Horner's rule."""
    sum_re, sum_im = torch.full_like(re, coefficients[-1]), torch.zeros_like(im)
    for coefficient in reversed(coefficients[:-1]):
        sum_re, sum_im = sum_re * re - sum_im * im + coefficient, sum_re * im + sum_im * re
    return sum_re, sum_im


def gain(decay: Tensor, frequency: Tensor, even: bool) -> tuple[Tensor, Tensor]:
    """γ(Λ) with Λ = α + jω: (1 − e^{−Λ})/Λ for an even window, 2 sinh(Λ/2)/Λ for an odd one; both are 1 at Λ = 0.

    γ is the quoted gain g = 2 sinh(Λ/2)/Λ times the window's value at its innermost frame (|d| = ½ or 0): taking
    the two together keeps large decays finite.
    """
    small = decay.square() + frequency.square() < SMALL**2
    # Either branch sees a harmless constant where the other one is taken: `where` alone would let the unused
    # branch's 0/0 into the gradient.
    a, w = torch.where(small, 1.0, decay), torch.where(small, 1.0, frequency)
    sin, cos = torch.sin(w / 2), torch.cos(w / 2)
    if even:
        # 1 − e^{−α} cos ω, without the cancellation; 1 − e^{−α} by tanh, as not every runtime has expm1
        top_re = torch.tanh(a / 2) * (1 + torch.exp(-a)) + 2 * torch.exp(-a) * sin.square()
        top_im = 2 * torch.exp(-a) * sin * cos
    else:
        # 2 sinh(α/2) and 2 cosh(α/2), which not every runtime has
        up, down = torch.exp(a / 2), torch.exp(-a / 2)
        top_re = torch.tanh(a / 2) * (up + down) * cos
        top_im = (up + down) * sin
    norm = a.square() + w.square()
    plain = (top_re * a + top_im * w) / norm, (top_im * a - top_re * w) / norm

    a, w = torch.where(small, decay, 0.0), torch.where(small, frequency, 0.0)
    square = a.square() - w.square(), 2 * a * w
    series = power_series(EVEN_SERIES, a, w) if even else power_series(ODD_SERIES, *square)
    return torch.where(small, series[0], plain[0]), torch.where(small, series[1], plain[1])


def kernels(decay: Tensor, frequency: Tensor, window: int, quadrature: bool) -> tuple[Tensor, Tensor]:
    """h(d) of docs/maths.md §2.2 for every frame of the window, as a real and an imaginary plane.

    decay, frequency (…, S) in 1/frame and rad/frame -> two planes (…, S, K).
    """
    even = window % 2 == 0
    d = torch.arange(window, device=decay.device, dtype=decay.dtype) - (window - 1) / 2  # [K]
    m = d.abs() - 0.5 if even else d.abs()  # frames from the innermost one
    gain_re, gain_im = (plane.unsqueeze(-1) for plane in gain(decay, frequency, even))  # [..., S, 1]
    envelope = torch.exp(-decay.unsqueeze(-1) * m)  # [..., S, K]
    phase = frequency.unsqueeze(-1) * m
    cos, sin = torch.cos(phase), torch.sin(phase)
    h_re = envelope * (gain_re * cos + gain_im * sin)
    h_im = envelope * (gain_im * cos - gain_re * sin)
    if quadrature:  # h(−d) = conj h(d)
        h_im = h_im * torch.sign(d)
    return h_re, h_im


def unfold(x: Tensor, axis: int, size: int, step: int) -> Tensor:
    """`x.unfold`; by indices while tracing, as TorchScript's ONNX exporter has it only for known sizes. The trace then
    holds for these sizes, and fails for others."""
    if not is_traced():
        return x.unfold(axis, size, step)
    length = sizes_of(x)[axis]
    x = x.expand([length if k == axis else -1 for k in range(x.dim())])
    count = (length - size) // step + 1
    index = torch.arange(count).unsqueeze(1) * step + torch.arange(size)
    picked = x.index_select(axis, index.flatten().to(x.device))
    return torch.unflatten(picked, axis, (count, size)).movedim(axis + 1, -1)


def sblu(x: Tensor, decay: Tensor, frequency: Tensor, weight: Tensor, grid: PatchGrid, quadrature: bool) -> Tensor:
    """y = Σ_d h(d) u[t_c + d], u_s[t] = Σ_c Σ_p B[s, c, p] x[c, i·S_f + p, t]: the direct sum of
    docs/maths.md §2.

    x (B, C, F, T); decay, frequency (B, N_f, N_t, S); weight (S, C, P_f) -> (B, N_f, N_t, 2, S) in x's dtype.
    """
    dtype = working_dtype(x.dtype)
    with full_precision(x.device):
        rows = unfold(x.to(dtype), 2, grid.patch[0], grid.stride[0])  # [B, C, N_f, T, P_f]
        u = torch.einsum("bcitp,scp->bits", rows, weight.to(dtype))  # [B, N_f, T, S]
        # Zeros outside the clip for K > P_t; for K < P_t the frames that no window reaches are cropped. Either way
        # exactly N_t windows are left.
        u = F.pad(u, (0, 0, -grid.offset, -grid.offset))
        u = unfold(u, 2, grid.window, grid.stride[1])  # [B, N_f, N_t, S, K]
        h_re, h_im = kernels(decay.to(dtype), frequency.to(dtype), grid.window, quadrature)
        y = torch.stack([(h_re * u).sum(-1), (h_im * u).sum(-1)], dim=-2)
        return y.to(x.dtype)


def magnitudes(y: Tensor) -> Tensor:
    """n of docs/maths.md §4: each state's log-magnitude, standardised over the states of its token.

        e_s = ½ log1p(|y_s|²/ε²),   n_s = (e_s − mean e) / sqrt(var e + 1e-5)

    y (…, 2, S) -> (…, S).
    """
    re, im = (y / EPSILON).unbind(-2)
    more, less = torch.maximum(re.abs(), im.abs()), torch.minimum(re.abs(), im.abs())
    # either branch sees a harmless constant where the other one is taken, as in `gain`
    loud = more > LOUD
    quiet = 0.5 * torch.log1p(torch.where(loud, 0.0, re).square() + torch.where(loud, 0.0, im).square())
    more, less = torch.where(loud, more, 1.0), torch.where(loud, less, 0.0)
    e = torch.where(loud, torch.log(more) + 0.5 * torch.log1p((less / more).square()), quiet)
    centred = e - e.mean(-1, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + VARIANCE_FLOOR)


def features(y: Tensor, planes: int) -> Tensor:
    """f of docs/maths.md §4, [n], [Re y ; Im y], or [Re y ; Im y ; n]: y (…, 2, S) -> (…, planes·S)."""
    found = [y.flatten(-2)] if planes != PLANES["magnitude"] else []
    if planes != PLANES["complex"]:
        found.append(magnitudes(y))
    return torch.cat(found, dim=-1)


def gather(x: Tensor, grid: PatchGrid) -> Tensor:
    """The patches of x (B, C, F, T), each as one row: (B, N_f, N_t, C·P_f·P_t)."""
    patches = unfold(unfold(x, 2, grid.patch[0], grid.stride[0]), 3, grid.patch[1], grid.stride[1])
    return patches.permute(0, 2, 3, 1, 4, 5).flatten(3)


def lambda_encoder(
    patches: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    decay_range: tuple[float, float],
    band: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """r = W2 SiLU(W1 vec(patch) + b1) + b2, squashed into the decay range and the band: docs/maths.md §3.

    patches (…, C·P_f·P_t) -> decay (1/frame) and frequency (rad/frame), each (…, S).
    """
    return squash(logits(patches, w1, b1, w2, b2), decay_range, band)


def logits(patches: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """r = W2 SiLU(W1 vec(patch) + b1) + b2: patches (…, C·P_f·P_t) -> (…, 2S)."""
    dtype = working_dtype(patches.dtype)
    with full_precision(patches.device):
        hidden = F.silu(F.linear(patches.to(dtype), w1.to(dtype).flatten(1), b1.to(dtype)))
        return F.linear(hidden, w2.to(dtype), b2.to(dtype))


def squash(r: Tensor, decay_range: tuple[float, float], band: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Decay and frequency, each (…, S): logits (…, 2S) squashed into the decay range (first half) and the band."""
    with full_precision(r.device):
        r_decay, r_frequency = r.chunk(2, dim=-1)
        lo, hi = decay_range
        decay = lo * torch.exp(math.log(hi / lo) * torch.sigmoid(r_decay))
        frequency = band[0] + (band[1] - band[0]) * torch.sigmoid(r_frequency)
    return decay, frequency


def embed(
    x: Tensor,
    weights: Weights,
    grid: PatchGrid,
    quadrature: bool,
    decay_range: tuple[float, float],
    band: tuple[float, float],
    time_major: bool,
) -> Tensor:
    """The whole stem: token = W_p vec(patch) + b_p + W_y f, as one product: docs/maths.md §4.

    x (B, C, F, T) -> (B, N, D) in proj_w's dtype, frequency-major unless `time_major`. f is computed in float32
    (float64 for float64) and rounded once, to the dtype of the product.
    """
    proj_w, proj_b, w1, b1, w2, b2, sblu_w, fusion_w = weights
    patches = gather(x, grid)
    decay, frequency = lambda_encoder(patches, w1, b1, w2, b2, decay_range, band)
    y = sblu(x.to(decay.dtype), decay, frequency, sblu_w, grid, quadrature)
    out_dtype = proj_w.dtype
    operand = torch.cat([value.to(out_dtype) for value in (patches, features(y, sizes_of(fusion_w)[1]))], dim=-1)
    if time_major:
        operand = operand.transpose(1, 2)
    operand = operand.flatten(1, 2)
    weight = torch.cat([proj_w.flatten(1), fusion_w.flatten(1).to(out_dtype)], dim=1)
    tokens = F.linear(operand, weight, None if proj_b is None else proj_b.to(out_dtype))
    # to a compiler it is a view of rows, through which it cannot write in place what it sees laid out as NCHW
    return tokens.clone() if torch.compiler.is_compiling() else tokens
