"""`sblu` and `embed`: check the arguments once (`checks`), choose a backend, call it. Nothing below checks again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import reference
from .backends import Call, choose
from .checks import (
    LAYOUTS,
    SHOWN,
    check_dtype,
    check_embed,
    check_input,
    check_name,
    check_sblu,
    check_tensor,
    mel_first,
    once,
)
from .geometry import PatchGrid, sizes_of
from .ranges import check_band, check_decay
from .weights import Weights

__all__ = ["Responses", "analyse", "embed", "embed_by_parts", "listen_by_parts", "responses", "sblu"]


def sblu(
    x: Tensor,
    decay: Tensor,
    frequency: Tensor,
    weight: Tensor,
    patch_size: int | Sequence[int] = (16, 16),
    stride: int | Sequence[int] | None = None,
    window: int | None = None,
    kernel: str = "quadrature",
    backend: str = "auto",
) -> Tensor:
    """Structured Bilateral Laplace Units: complex sinusoidal filters under a two-sided exponential window.

    For token (i, j) and state s with Λ = decay + j·frequency, window centre t_c and frames d = −(K−1)/2 … (K−1)/2:

        u_s[t] = Σ_c Σ_p weight[s, c, p] · x[c, i·S_f + p, t]        (0 outside the clip)
        y_s    = Σ_d h_s(d) · u_s[t_c + d],      g = 2 sinh(Λ/2)/Λ
        bilateral:   h(d) = g e^{−Λ|d|}
        quadrature:  h(d) = g e^{−Λd} for d > 0,  h(−d) = conj h(d),  h(0) = Re g

    Args:
        x: log-mel spectrogram (B, C, F, T): batch, channels, mel bins, frames; any strides.
        decay: α (B, N_f, N_t, S) in 1/frame, not negative; values are not checked.
        frequency: ω (B, N_f, N_t, S) in rad/frame, 0 … π; values are not checked.
        weight: B of the formula, (S, C, P_f).
        patch_size: P_f × P_t, mel bins × frames; one int for a square patch.
        stride: S_f × S_t; the patch size unless given. Overlap and gaps are allowed.
        window: K in frames, of P_t's parity; P_t unless given.
        kernel: "bilateral" or "quadrature".
        backend: "auto", "reference", "cpu", "triton" or "cuda"; see `aape_kernels.backends.choose`.

    Returns:
        y (B, N_f, N_t, 2, S) in x's dtype: real plane, imaginary plane.

    The arithmetic is float64 for float64 x, else float32, under autocast too. decay, frequency and weight have x's
    dtype or float32.

    Errors: `TypeError`, `ValueError` or `RuntimeError` naming the argument, what was expected and what came.
    Source: the paper's SBLU; the quadrature kernel and the shared real `weight` are ours (docs/maths.md §2).
    """
    grid = once(check_sblu, (x, decay, frequency, weight), patch_size, stride, window, kernel)
    run = choose(backend, Call("sblu", x.device, x.dtype))
    y: Tensor = run.sblu(x, decay, frequency, weight, grid, kernel == "quadrature")
    return y


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
    stride: int | Sequence[int] | None = None,
    window: int | None = None,
    kernel: str = "quadrature",
    decay: Sequence[float] | None = None,
    band: Sequence[float] | None = None,
    layout: str = "FT",
    backend: str = "auto",
) -> Tensor:
    """The whole AaPE stem as a function of its parameters: what `AaPE.forward` calls.

        r = w2 · SiLU(w1 · vec(patch) + b1) + b2               S decay logits, then S frequency logits
        α = α_lo (α_hi/α_lo)^σ(r_α),   ω = ω_lo + (ω_hi − ω_lo) σ(r_ω)
        token = proj_w · vec(patch) + proj_b + fusion_w · f,   y = sblu(x, α, ω, sblu_w)
        e = ½ log1p(|y|²/ε²),   ε = 0.1;   n = (e − mean e) / sqrt(var e + 1e-5), over the states of a token

    where f is [Re y ; Im y ; n], [Re y ; Im y] or [n], as fusion_w has 3, 2 or 1 planes.

    Args:
        x: (B, C, F, T), or (B, C, T, F) for layout "TF"; any strides.
        proj_w: (D, C, P_f, P_t), for layout "TF" (D, C, P_t, P_f); it sets the patch size.
        proj_b: (D) or None.
        w1: (H, C, P_f, P_t), whatever the layout: the Lambda Encoder's first layer.
        b1: (H).
        w2: (2S, H), its second.
        b2: (2S).
        sblu_w: (S, C, P_f).
        fusion_w: (D, planes, S): 3 planes for the features "both", 2 for "complex", 1 for "magnitude"; n, in 3 and 1,
            wants S ≥ 2.
        stride: in the order of the input's axes; the patch size unless given.
        window: K in frames, of P_t's parity; P_t unless given.
        kernel: "bilateral" or "quadrature".
        decay: (α_lo, α_hi) in 1/frame; (1/K, 2) unless given.
        band: (ω_lo, ω_hi) in rad/frame within [0, π]; (π/S_t, π) unless given.
        layout: "FT" or "TF", the order of x's last two axes.
        backend: see `sblu`.

    Returns:
        tokens (B, N_f·N_t, D), contiguous; frequency-major for layout "FT", time-major for "TF". Their dtype is
        x's, or under autocast its dtype (float64 stays float64).

    Without autocast x and proj_w must have one dtype, and the other parameters that one or float32.

    Errors: `TypeError`, `ValueError` or `RuntimeError` naming the argument, what was expected and what came.
    Source: the paper's Lambda Encoder and Patch Fusion; their layers and n are ours (docs/maths.md §3, §4).
    """
    tensors = (x, proj_w, proj_b, w1, b1, w2, b2, sblu_w, fusion_w)
    autocast = isinstance(x, Tensor) and reference.autocasting(x.device)
    sizes = once(check_embed, tensors, stride, window, kernel, decay, band, layout, autocast)
    if layout == "TF":
        x, proj_w = x.transpose(2, 3), proj_w.transpose(2, 3)
    if autocast:
        # the product in autocast's dtype; encoder and SBLU stay as they are
        out_dtype = x.dtype if x.dtype == torch.float64 else torch.get_autocast_dtype(x.device.type)
        proj_w, fusion_w = proj_w.to(out_dtype), fusion_w.to(out_dtype)
        proj_b = None if proj_b is None else proj_b.to(out_dtype)
    weights = Weights(proj_w, proj_b, w1, b1, w2, b2, sblu_w, fusion_w)
    run = choose(backend, Call("embed", x.device, x.dtype))
    tokens: Tensor = run.embed(x, weights, sizes.grid, kernel == "quadrature", sizes.decay, sizes.band, layout == "TF")
    return tokens


def embed_by_parts(
    x: Tensor,
    proj: Callable[[Tensor], Tensor],
    encoder: Callable[[Tensor], Tensor],
    filters: Callable[..., Tensor],
    fusion: Callable[[Tensor], Tensor],
    features: str,
    patch_size: Sequence[int],
    stride: int | Sequence[int] | None,
    window: int | None,
    kernel: str,
    decay: Sequence[float],
    band: Sequence[float],
    layout: str,
    backend: str,
) -> Tensor:
    """What `embed` computes, by calls of a stem's four parts, each of which may be anything that takes and gives:

        proj: x (B, C, F, T), or (B, C, T, F) -> (B, D, N_f, N_t), or (B, D, N_t, N_f)
        encoder: patches (B, N_f, N_t, C·P_f·P_t) -> r (B, N_f, N_t, 2S)
        filters: x (B, C, F, T), decay and frequency (B, N_f, N_t, S), the options of `sblu` -> y (B, N_f, N_t, 2, S)
        fusion: f (B, N_f, N_t, planes·S), in the tokens' dtype -> (B, N_f, N_t, D)

    Slower: for stems whose parts have hooks, or have been replaced.
    """
    listen = (encoder, filters, patch_size, stride, window, kernel, decay, band, layout, backend)
    _, _, y = listen_by_parts(x, *listen)
    base = proj(x).flatten(2).transpose(1, 2)
    heard = fusion(reference.features(y, reference.PLANES[features]).to(base.dtype))
    heard = (heard if layout == "FT" else heard.transpose(1, 2)).flatten(1, 2)
    if heard.shape != base.shape:  # of which a sum would broadcast some
        raise ValueError(
            f"fusion: expected tokens of the shape (batch, N, embed_dim) that proj gives, {tuple(base.shape)}, "
            f"got {tuple(heard.shape)}"
        )
    return (base + heard).contiguous()


def listen_by_parts(
    x: Tensor,
    encoder: Callable[[Tensor], Tensor],
    filters: Callable[..., Tensor],
    patch_size: Sequence[int],
    stride: int | Sequence[int] | None,
    window: int | None,
    kernel: str,
    decay: Sequence[float],
    band: Sequence[float],
    layout: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Decay and frequency (B, N_f, N_t, S), and y (B, N_f, N_t, 2, S), as in `embed_by_parts`."""
    grid = PatchGrid.make(patch_size, mel_first(stride, layout), window)
    mel, _ = check_input(x, "channels", grid, layout)
    mel = mel.to(reference.working_dtype(x.dtype))
    with reference.full_precision(x.device):
        r = encoder(reference.gather(mel, grid))
        alpha, omega = reference.squash(r, check_decay(decay, grid), check_band(band, grid))
        options = {"patch_size": grid.patch, "stride": grid.stride, "window": grid.window, "kernel": kernel}
        return alpha, omega, filters(mel, alpha, omega, **options, backend=backend)


def analyse(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    stride: int | Sequence[int] | None = None,
    window: int | None = None,
    decay: Sequence[float] | None = None,
    band: Sequence[float] | None = None,
    layout: str = "FT",
) -> tuple[Tensor, Tensor]:
    """What the Lambda Encoder chooses for each patch; arguments as for `embed`, in plain PyTorch on any device.

    Returns:
        decay (1/frame) and frequency (rad/frame), each (B, N_f, N_t, S) whatever the layout, in float32 (float64 for
        float64 x).

    Errors: `TypeError` or `ValueError` naming the argument.
    Source: the paper's Lambda Encoder; its layers are ours (docs/maths.md §3).
    """
    check_name(layout, "layout", LAYOUTS)
    w1 = check_tensor(w1, SHOWN["w1"], ("hidden", "channels", "P_f", "P_t"), "", None)
    grid = PatchGrid.make(sizes_of(w1)[2:], mel_first(stride, layout), window)
    decay_range, band = check_decay(decay, grid), check_band(band, grid)
    x, _ = check_input(x, sizes_of(w1)[1], grid, layout)
    check_tensor(w1, SHOWN["w1"], sizes_of(w1), "", x)
    return reference.lambda_encoder(reference.gather(x, grid), w1, b1, w2, b2, decay_range, band)


class Responses(NamedTuple):
    """What a stem hears in each patch; N_f × N_t patches, S states.

    Attributes:
        decay: α (B, N_f, N_t, S) in 1/frame.
        frequency: ω (B, N_f, N_t, S) in rad/frame; ω/(2π · hop) is in Hz.
        y: (B, N_f, N_t, 2, S), the responses: real plane, imaginary plane.
        magnitude: n (B, N_f, N_t, S), log |y| standardised over the states of each patch; zeros where S = 1.
    """

    decay: Tensor
    frequency: Tensor
    y: Tensor
    magnitude: Tensor


def responses(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    sblu_w: Tensor,
    stride: int | Sequence[int] | None = None,
    window: int | None = None,
    kernel: str = "quadrature",
    decay: Sequence[float] | None = None,
    band: Sequence[float] | None = None,
    layout: str = "FT",
    backend: str = "auto",
) -> Responses:
    """Decay and frequency as `analyse` gives them, and what the filters with them respond; arguments as for `embed`.

    Everything is (B, N_f, N_t, …) whatever the layout, in float32 (float64 for float64 x), nothing rounded to x's
    16 bits or autocast's.

    Errors: `TypeError`, `ValueError` or `RuntimeError` naming the argument.
    Source: the paper's SBLU; n is ours (docs/maths.md §4).
    """
    alpha, omega = analyse(x, w1, b1, w2, b2, stride, window, decay, band, layout)
    wide = (x if layout == "FT" else x.transpose(2, 3)).to(alpha.dtype)
    patch = sizes_of(w1)[2:]
    check_dtype(check_tensor(sblu_w, SHOWN["sblu_w"], ("states", "channels", "P_f"), "", x), SHOWN["sblu_w"], x)
    weight = sblu_w.to(alpha.dtype)
    y = sblu(wide, alpha, omega, weight, patch, mel_first(stride, layout), window, kernel, backend)
    return Responses(alpha, omega, y, reference.magnitudes(y))
