"""Stems that the CUDA backend runs on tensor cores, in every type that it does: for its emulators."""

import contextlib

import torch
from cases import Case
from checks import poisoned_memory
from test_stem import check as check_stem

from aape_kernels import AaPE
from aape_kernels.geometry import PatchGrid
from aape_kernels.reference import PLANES
from aape_kernels.weights import Weights

# The usual geometry, and any with up to 32 states and 64 units whose patches find room.
STEMS = {
    "usual": {},
    "usual-time-major": {"layout": "TF"},
    "more-states": {"num_states": 32, "encoder_dim": 64},
    "odd-sizes": {"patch_size": (8, 8), "stride": (4, 6), "num_states": 7, "encoder_dim": 21},
    "long-window": {"patch_size": (8, 4), "window": 12, "num_states": 20, "encoder_dim": 20},
    "short-window": {"patch_size": (4, 10), "window": 4, "num_states": 6, "encoder_dim": 40},
    "two-channels": {"in_chans": 2, "patch_size": (8, 16), "stride": (8, 8)},
    "three-channels": {"in_chans": 3, "patch_size": (16, 4)},
    "whole-packs": {"patch_size": (24, 8), "num_states": 12},
    "bilateral": {"kernel": "bilateral"},
    "many-rows": {"patch_size": (20, 6), "stride": (12, 5), "window": 8, "num_states": 18, "encoder_dim": 10},
}
# SBLU alone: what is moved by packs and what is not, windows that overlap, leave gaps or are longer than the patch.
UNITS = {
    "usual": Case(3, 1, 16, (16, 16), (16, 16), 16, (2, 7), (0, 0), "quadrature"),
    "usual-overlap": Case(2, 1, 32, (16, 16), (16, 8), 16, (2, 9), (0, 0), "quadrature"),
    "usual-gaps": Case(2, 1, 9, (16, 16), (20, 20), 16, (2, 5), (4, 4), "quadrature"),
    "two-blocks-of-states": Case(2, 1, 40, (16, 16), (16, 16), 16, (1, 9), (0, 0), "quadrature"),
    "packs-of-many-rows": Case(2, 1, 20, (24, 8), (24, 8), 8, (1, 19), (0, 0), "quadrature"),
    "channels": Case(2, 3, 5, (6, 8), (6, 8), 8, (2, 9), (0, 0), "quadrature"),
    "long-window": Case(2, 1, 18, (9, 4), (9, 4), 8, (2, 9), (0, 3), "quadrature"),
    "short-window": Case(2, 2, 3, (7, 10), (5, 9), 4, (2, 9), (1, 0), "quadrature"),
    "bilateral": Case(2, 1, 20, (16, 16), (16, 16), 16, (2, 7), (0, 0), "bilateral"),
    "bilateral-overlap": Case(2, 2, 5, (7, 10), (5, 8), 12, (2, 9), (1, 1), "bilateral"),
    "a-frame-apart": Case(2, 1, 3, (3, 6), (3, 1), 6, (2, 17), (0, 0), "quadrature"),
}
# The types of x and of tokens; where they differ, autocast is at work.
TYPES = {
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float32": (torch.float32, torch.float32),
    "float32-to-bfloat16": (torch.float32, torch.bfloat16),
    "float32-to-float16": (torch.float32, torch.float16),
}

# Of those, the stems whose tokens one kernel makes: patches of the usual geometry, a width of whole chunks.
TOKENS = {
    "usual": STEMS["usual"],
    "time-major-without-bias": STEMS["usual-time-major"] | {"bias": False},
    "more-states": STEMS["more-states"],
    "overlap": {"stride": (16, 8), "num_states": 12, "encoder_dim": 24},
    "more-units": {"num_states": 20, "encoder_dim": 44},
}
SOME_TOKENS = {
    f"{types}-{options}-{features}": (TYPES[types], TOKENS[options], features)
    for types in ("bfloat16", "float32", "float32-to-bfloat16")
    for options in TOKENS
    for features in PLANES
    if features == "both" or options in ("usual", "more-states")
}

# What differs under autocast is how operands are stored and cotangents read.
SOME = {
    f"{types}-{options}-{features}": (TYPES[types], STEMS[options], features)
    for types in TYPES
    for options in STEMS
    for features in PLANES
    if "-to-" not in types or (options in ("usual", "odd-sizes") and features == "both")
}


def stem_of(dtype: torch.dtype, **options) -> AaPE:
    """What makes tokens in `dtype`, encoder and projection in float32."""
    stem = AaPE(**{"embed_dim": 40} | options)
    torch.nn.init.normal_(stem.fusion.weight, std=0.1)
    for part in (stem.proj, stem.fusion):
        part.to(dtype)
    return stem


def arguments_of(stem: AaPE) -> tuple[Weights, tuple[object, ...]]:
    """The weights of a stem of the usual geometry, and what else a backend's `embed` is given."""
    encoder = stem.encoder
    weights = Weights(
        stem.proj.weight, stem.proj.bias, encoder.w1, encoder.b1, encoder.w2, encoder.b2, stem.sblu.weight,
        stem.fusion.weight,
    )  # fmt: skip
    return weights, (PatchGrid((16, 16), (16, 16), 16), True, stem.decay, stem.band, False)


def check(types: tuple[torch.dtype, torch.dtype], size: tuple[int, int, int], **options) -> None:
    """Tokens and gradients of clips (batch, mel bins, frames); whatever is left unwritten is NaN."""
    given, tokens = types
    stem = stem_of(given, **options)
    batch, *sizes = size
    x = torch.randn(batch, stem.proj.in_channels, *sizes).to(given)
    cast = contextlib.nullcontext() if given == tokens else torch.autocast("cpu", dtype=tokens)
    with poisoned_memory(), cast:
        check_stem(stem, x, tokens)
