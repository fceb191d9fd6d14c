"""`sblu` and `embed`: check the arguments once, choose a backend, call it. Nothing below checks again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from . import reference
from .backends import Call, choose
from .geometry import PatchGrid, sizes_of
from .ranges import check_band, check_decay
from .weights import Weights

__all__ = ["Responses", "analyse", "embed", "embed_by_parts", "listen_by_parts", "responses", "sblu"]

KERNELS = ("bilateral", "quadrature")
LAYOUTS = ("FT", "TF")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# What messages call embed's parameters: users of `AaPE` know them as in its state dict.
IN_MODULE = {
    "proj_w": "proj.weight",
    "proj_b": "proj.bias",
    "w1": "encoder.w1",
    "b1": "encoder.b1",
    "w2": "encoder.w2",
    "b2": "encoder.b2",
    "sblu_w": "sblu.weight",
    "fusion_w": "fusion.weight",
}
SHOWN = {name: f"{name} (AaPE's {parameter})" for name, parameter in IN_MODULE.items()}


def check_name(value: str, name: str, known: Sequence[str]) -> str:
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
    return value


def _check_tensor(value: object, name: str, shape: tuple[int | str, ...], meaning: str, like: Tensor | None) -> Tensor:
    """`value` as a floating-point tensor on `like`'s device; strings in `shape` stand for any size."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.dtype not in DTYPES:
        raise TypeError(f"{name}: expected one of {', '.join(map(str, DTYPES))}, got {value.dtype}")
    if value.layout is not torch.strided:
        raise TypeError(f"{name}: expected a tensor with strides (to_dense()), got layout {value.layout}")
    if like is not None and value.device != like.device:
        raise ValueError(f"{name}: expected a tensor on {like.device}, where x is, got one on {value.device}")
    sizes = sizes_of(value)
    if len(sizes) != len(shape) or any(not isinstance(n, str) and n != m for n, m in zip(shape, sizes, strict=True)):
        want = ", ".join(map(str, shape))
        raise ValueError(f"{name}: expected shape ({want}){meaning}, got {sizes}")
    return value


def _check_dtype(value: Tensor, name: str, x: Tensor) -> None:
    if value.dtype not in (x.dtype, torch.float32):
        want = "torch.float32" if x.dtype == torch.float32 else f"{x.dtype} (that of x) or torch.float32"
        raise TypeError(f"{name}: expected {want}, got {value.dtype}")


def _check_input(x: object, channels: int | str, grid: PatchGrid, layout: str = "FT") -> tuple[Tensor, tuple[int, int]]:
    """x as (B, C, F, T), whichever its layout, and its token grid (N_f, N_t)."""
    axes = ("mel bins", "frames") if layout == "FT" else ("frames", "mel bins")
    x = _check_tensor(x, "x", ("batch", channels, *axes), f" for layout {layout}", None)
    if sizes_of(x)[1] < 1:
        raise ValueError(f"x: expected at least one channel, got shape {tuple(x.shape)}")
    if layout == "TF":
        x = x.transpose(2, 3)
    for size, patch, axis in zip(sizes_of(x)[2:], grid.patch, ("mel bins", "frames"), strict=True):
        if size < patch:
            raise ValueError(f"x: expected at least one patch, {patch} {axis}, got {size}")
    return x, grid.tokens(*sizes_of(x)[2:])


def _check_weight(weight: object, name: str, x: Tensor, grid: PatchGrid) -> Tensor:
    """SBLU's projection (S, C, P_f)."""
    shape = ("states", sizes_of(x)[1], grid.patch[0])
    checked = _check_tensor(weight, name, shape, ": (states, channels, P_f)", x)
    if sizes_of(checked)[0] < 1:
        raise ValueError(f"{name}: expected at least one state, got shape {tuple(checked.shape)}")
    return checked


def check_states(states: int, features: str, name: str) -> int:
    """The number of states, at least two where they are standardised."""
    if states < 2 and features != "complex":
        raise ValueError(
            f"{name}: expected at least 2 states for features {features!r}, as magnitudes are standardised over them, "
            f"got {states}"
        )
    return states


def _check_fusion(weight: object, dim: int, states: int, x: Tensor) -> Tensor:
    """The fusion weight (D, planes, S)."""
    name, meaning = SHOWN["fusion_w"], ": (embed_dim, planes, states)"
    checked = _check_tensor(weight, name, (dim, "planes", states), meaning, x)
    found = {planes: features for features, planes in reference.PLANES.items()}.get(sizes_of(checked)[1])
    if found is None:
        known = ", ".join(f"{planes} ({features})" for features, planes in reference.PLANES.items())
        raise ValueError(f"{name}: expected planes {known}, got shape {tuple(checked.shape)}")
    check_states(states, found, SHOWN["sblu_w"])
    return checked


def _mel_first(stride: int | Sequence[int] | None, layout: str) -> int | Sequence[int] | None:
    """A stride in the order (mel bins, frames), from that of the input's axes."""
    return tuple(stride)[::-1] if layout == "TF" and isinstance(stride, Sequence) else stride


# What checks gave, by all that they look at: of a small call they take a third of its time. Options are of types whose
# values stay what they are.
FIXED = frozenset({type(None), bool, int, float, str, tuple})
_FOUND_RIGHT: dict[tuple[object, ...], Any] = {}


def _once(check: Callable[..., Any], tensors: Sequence[Any], *options: Any) -> Any:
    """`check(tensors, *options)`, once for every combination of sizes, dtypes, devices and options."""
    # `is_traced` without its two functions, as in `ops.is_seen`
    if is_dynamo_compiling() or torch._C._is_tracing():
        return check(tensors, *options)
    try:
        looked_at = [None if value is None else (value.shape, value.dtype, value.device) for value in tensors]
        # with types: 1, 1.0 and True are equal, and not equally right
        types = [*map(type, options), *[type(one) for option in options if type(option) is tuple for one in option]]
        signature = (check, *looked_at, options, *types)
        found = _FOUND_RIGHT.get(signature)
    except (AttributeError, TypeError):  # no tensors; sizes that are symbols, options that are lists
        return check(tensors, *options)
    if found is None:
        found = check(tensors, *options)
        if FIXED.issuperset(types):
            if len(_FOUND_RIGHT) >= 256:
                _FOUND_RIGHT.clear()
            _FOUND_RIGHT[signature] = found
    return found


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
    grid = _once(_check_sblu, (x, decay, frequency, weight), patch_size, stride, window, kernel)
    run = choose(backend, Call("sblu", x.device, x.dtype))
    y: Tensor = run.sblu(x, decay, frequency, weight, grid, kernel == "quadrature")
    return y


def _check_sblu(
    tensors: Sequence[Tensor],
    patch_size: int | Sequence[int],
    stride: int | Sequence[int] | None,
    window: int | None,
    kernel: str,
) -> PatchGrid:
    grid = PatchGrid.make(patch_size, stride, window)
    check_name(kernel, "kernel", KERNELS)
    x, decay, frequency, weight = tensors
    x, (n_f, n_t) = _check_input(x, "channels", grid)
    _check_weight(weight, "weight", x, grid)
    shape = (sizes_of(x)[0], n_f, n_t, sizes_of(weight)[0])
    _check_tensor(decay, "decay", shape, ": (batch, N_f, N_t, states)", x)
    _check_tensor(frequency, "frequency", shape, ": (batch, N_f, N_t, states)", x)
    for value, name in ((decay, "decay"), (frequency, "frequency"), (weight, "weight")):
        _check_dtype(value, name, x)
    return grid


class _Sizes(NamedTuple):
    """What a stem's call comes down to once its arguments have been checked."""

    grid: PatchGrid
    decay: tuple[float, float]
    band: tuple[float, float]


def _check_embed(
    tensors: Sequence[Tensor],
    stride: int | Sequence[int] | None,
    window: int | None,
    kernel: str,
    decay: Sequence[float] | None,
    band: Sequence[float] | None,
    layout: str,
    autocast: bool,
) -> _Sizes:
    check_name(layout, "layout", LAYOUTS)
    check_name(kernel, "kernel", KERNELS)
    x, weights = tensors[0], Weights(*tensors[1:])
    proj_w = weights.proj_w
    if not isinstance(proj_w, Tensor) or proj_w.dim() != 4:
        got = tuple(proj_w.shape) if isinstance(proj_w, Tensor) else type(proj_w).__name__
        raise ValueError(f"{SHOWN['proj_w']}: expected a tensor (embed_dim, channels, patch, patch), got {got}")
    dim, channels, *patch = sizes_of(proj_w)
    grid = PatchGrid.make(patch if layout == "FT" else patch[::-1], _mel_first(stride, layout), window)
    sizes = _Sizes(grid, check_decay(decay, grid), check_band(band, grid))

    x, _ = _check_input(x, channels, grid, layout)
    patch_shape = (channels, *grid.patch)
    _check_weight(weights.sblu_w, SHOWN["sblu_w"], x, grid)
    states = sizes_of(weights.sblu_w)[0]
    _check_tensor(weights.w2, SHOWN["w2"], (2 * states, "hidden"), ": (2 * states, hidden)", x)
    hidden = sizes_of(weights.w2)[1]
    _check_tensor(weights.w1, SHOWN["w1"], (hidden, *patch_shape), ": (hidden, channels, P_f, P_t)", x)
    _check_tensor(weights.b1, SHOWN["b1"], (hidden,), ": (hidden)", x)
    _check_tensor(weights.b2, SHOWN["b2"], (2 * states,), ": (2 * states)", x)
    _check_fusion(weights.fusion_w, dim, states, x)
    _check_tensor(proj_w, SHOWN["proj_w"], (dim, channels, *patch), "", x)
    if weights.proj_b is not None:
        _check_tensor(weights.proj_b, SHOWN["proj_b"], (dim,), ": (embed_dim)", x)

    if not autocast:
        if proj_w.dtype != x.dtype:
            raise TypeError(f"x: expected {proj_w.dtype}, that of proj.weight (or autocast), got {x.dtype}")
        for name, parameter in weights._asdict().items():
            if name != "proj_w" and parameter is not None:
                _check_dtype(parameter, SHOWN[name], x)
    return sizes


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
    sizes = _once(_check_embed, tensors, stride, window, kernel, decay, band, layout, autocast)
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
    grid = PatchGrid.make(patch_size, _mel_first(stride, layout), window)
    mel, _ = _check_input(x, "channels", grid, layout)
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
    w1 = _check_tensor(w1, SHOWN["w1"], ("hidden", "channels", "P_f", "P_t"), "", None)
    grid = PatchGrid.make(sizes_of(w1)[2:], _mel_first(stride, layout), window)
    decay_range, band = check_decay(decay, grid), check_band(band, grid)
    x, _ = _check_input(x, sizes_of(w1)[1], grid, layout)
    _check_tensor(w1, SHOWN["w1"], sizes_of(w1), "", x)
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
    _check_dtype(_check_tensor(sblu_w, SHOWN["sblu_w"], ("states", "channels", "P_f"), "", x), SHOWN["sblu_w"], x)
    weight = sblu_w.to(alpha.dtype)
    y = sblu(wide, alpha, omega, weight, patch, _mel_first(stride, layout), window, kernel, backend)
    return Responses(alpha, omega, y, reference.magnitudes(y))
