"""What the arguments of `sblu`, `embed` and `AaPE` must be, and the messages that name what is not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from . import reference
from .geometry import PatchGrid, sizes_of
from .ranges import check_band, check_decay
from .weights import Weights

__all__ = [
    "DTYPES",
    "KERNELS",
    "LAYOUTS",
    "SHOWN",
    "Sizes",
    "check_dtype",
    "check_embed",
    "check_input",
    "check_name",
    "check_sblu",
    "check_states",
    "check_tensor",
    "mel_first",
    "once",
]

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
    """`value`, which must be one of the known names."""
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
    return value


def check_tensor(value: object, name: str, shape: tuple[int | str, ...], meaning: str, like: Tensor | None) -> Tensor:
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


def check_dtype(value: Tensor, name: str, x: Tensor) -> None:
    """That `value` has x's dtype or float32."""
    if value.dtype not in (x.dtype, torch.float32):
        want = "torch.float32" if x.dtype == torch.float32 else f"{x.dtype} (that of x) or torch.float32"
        raise TypeError(f"{name}: expected {want}, got {value.dtype}")


def check_input(x: object, channels: int | str, grid: PatchGrid, layout: str = "FT") -> tuple[Tensor, tuple[int, int]]:
    """x as (B, C, F, T), whichever its layout, and its token grid (N_f, N_t)."""
    axes = ("mel bins", "frames") if layout == "FT" else ("frames", "mel bins")
    x = check_tensor(x, "x", ("batch", channels, *axes), f" for layout {layout}", None)
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
    checked = check_tensor(weight, name, shape, ": (states, channels, P_f)", x)
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
    checked = check_tensor(weight, name, (dim, "planes", states), meaning, x)
    found = {planes: features for features, planes in reference.PLANES.items()}.get(sizes_of(checked)[1])
    if found is None:
        known = ", ".join(f"{planes} ({features})" for features, planes in reference.PLANES.items())
        raise ValueError(f"{name}: expected planes {known}, got shape {tuple(checked.shape)}")
    check_states(states, found, SHOWN["sblu_w"])
    return checked


def mel_first(stride: int | Sequence[int] | None, layout: str) -> int | Sequence[int] | None:
    """A stride in the order (mel bins, frames), from that of the input's axes."""
    return tuple(stride)[::-1] if layout == "TF" and isinstance(stride, Sequence) else stride


# What checks gave, by all that they look at: of a small call they take a third of its time. Options are of types whose
# values stay what they are.
FIXED = frozenset({type(None), bool, int, float, str, tuple})
_FOUND_RIGHT: dict[tuple[object, ...], Any] = {}


def once(check: Callable[..., Any], tensors: Sequence[Any], *options: Any) -> Any:
    """`check(tensors, *options)`, once for every combination of sizes, dtypes, devices, layouts and options."""
    # `is_traced` without its two functions, as in `ops.is_seen`
    if is_dynamo_compiling() or torch._C._is_tracing():
        return check(tensors, *options)
    try:
        looked_at = [v if v is None else (v.shape, v.dtype, v.device, v.layout) for v in tensors]
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


def check_sblu(
    tensors: Sequence[Tensor],
    patch_size: int | Sequence[int],
    stride: int | Sequence[int] | None,
    window: int | None,
    kernel: str,
) -> PatchGrid:
    """Of `sblu`'s arguments, (x, decay, frequency, weight) and options, the grid."""
    grid = PatchGrid.make(patch_size, stride, window)
    check_name(kernel, "kernel", KERNELS)
    x, decay, frequency, weight = tensors
    x, (n_f, n_t) = check_input(x, "channels", grid)
    _check_weight(weight, "weight", x, grid)
    shape = (sizes_of(x)[0], n_f, n_t, sizes_of(weight)[0])
    check_tensor(decay, "decay", shape, ": (batch, N_f, N_t, states)", x)
    check_tensor(frequency, "frequency", shape, ": (batch, N_f, N_t, states)", x)
    for value, name in ((decay, "decay"), (frequency, "frequency"), (weight, "weight")):
        check_dtype(value, name, x)
    return grid


class Sizes(NamedTuple):
    """What a stem's call comes down to once its arguments have been checked."""

    grid: PatchGrid
    decay: tuple[float, float]
    band: tuple[float, float]


def check_embed(
    tensors: Sequence[Tensor],
    stride: int | Sequence[int] | None,
    window: int | None,
    kernel: str,
    decay: Sequence[float] | None,
    band: Sequence[float] | None,
    layout: str,
    autocast: bool,
) -> Sizes:
    """Of `embed`'s arguments, (x, *`Weights`) and options, the sizes."""
    check_name(layout, "layout", LAYOUTS)
    check_name(kernel, "kernel", KERNELS)
    x, weights = tensors[0], Weights(*tensors[1:])
    proj_w = weights.proj_w
    if not isinstance(proj_w, Tensor) or proj_w.dim() != 4:
        got = tuple(proj_w.shape) if isinstance(proj_w, Tensor) else type(proj_w).__name__
        raise ValueError(f"{SHOWN['proj_w']}: expected a tensor (embed_dim, channels, patch, patch), got {got}")
    dim, channels, *patch = sizes_of(proj_w)
    grid = PatchGrid.make(patch if layout == "FT" else patch[::-1], mel_first(stride, layout), window)
    sizes = Sizes(grid, check_decay(decay, grid), check_band(band, grid))

    x, _ = check_input(x, channels, grid, layout)
    patch_shape = (channels, *grid.patch)
    _check_weight(weights.sblu_w, SHOWN["sblu_w"], x, grid)
    states = sizes_of(weights.sblu_w)[0]
    check_tensor(weights.w2, SHOWN["w2"], (2 * states, "hidden"), ": (2 * states, hidden)", x)
    hidden = sizes_of(weights.w2)[1]
    if hidden < 1:
        raise ValueError(f"{SHOWN['w2']}: expected at least one hidden unit, got shape {tuple(weights.w2.shape)}")
    check_tensor(weights.w1, SHOWN["w1"], (hidden, *patch_shape), ": (hidden, channels, P_f, P_t)", x)
    check_tensor(weights.b1, SHOWN["b1"], (hidden,), ": (hidden)", x)
    check_tensor(weights.b2, SHOWN["b2"], (2 * states,), ": (2 * states)", x)
    _check_fusion(weights.fusion_w, dim, states, x)
    check_tensor(proj_w, SHOWN["proj_w"], (dim, channels, *patch), "", x)
    if weights.proj_b is not None:
        check_tensor(weights.proj_b, SHOWN["proj_b"], (dim,), ": (embed_dim)", x)

    if not autocast:
        if proj_w.dtype != x.dtype:
            raise TypeError(f"x: expected {proj_w.dtype}, that of proj.weight (or autocast), got {x.dtype}")
        for name, parameter in weights._asdict().items():
            if name != "proj_w" and parameter is not None:
                check_dtype(parameter, SHOWN[name], x)
    return sizes
