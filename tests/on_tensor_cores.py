"""Stems that the CUDA backend runs on tensor cores, in every type that it does: for its emulators."""

import contextlib

import torch
from checks import poisoned_memory
from test_stem import check as check_stem

from aape_kernels import AaPE

# The usual geometry, and any with up to 16 rows, 32 states and 64 units.
STEMS = {
    "usual": {},
    "usual-time-major": {"layout": "TF"},
    "more-states": {"num_states": 32, "encoder_dim": 64},
    "odd-sizes": {"patch_size": (8, 8), "stride": (4, 6), "num_states": 7, "encoder_dim": 21},
    "long-window": {"patch_size": (8, 4), "window": 12, "num_states": 20, "encoder_dim": 20},
    "short-window": {"patch_size": (4, 10), "window": 4, "num_states": 6, "encoder_dim": 40},
    "two-channels": {"in_chans": 2, "patch_size": (8, 16), "stride": (8, 8)},
}
# The types of x and of tokens; where they differ, autocast is at work.
TYPES = {
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float32": (torch.float32, torch.float32),
    "float32-to-bfloat16": (torch.float32, torch.bfloat16),
    "float32-to-float16": (torch.float32, torch.float16),
}


def stem_of(dtype: torch.dtype, **options) -> AaPE:
    """What makes tokens in `dtype`, encoder and projection in float32."""
    stem = AaPE(**{"embed_dim": 40} | options)
    torch.nn.init.normal_(stem.fusion.weight, std=0.1)
    for part in (stem.proj, stem.fusion):
        part.to(dtype)
    return stem


def check(types: tuple[torch.dtype, torch.dtype], size: tuple[int, int, int], **options) -> None:
    """Tokens and gradients of clips (batch, mel bins, frames); whatever is left unwritten is NaN."""
    given, tokens = types
    stem = stem_of(given, **options)
    batch, *sizes = size
    x = torch.randn(batch, stem.proj.in_channels, *sizes).to(given)
    cast = contextlib.nullcontext() if given == tokens else torch.autocast("cpu", dtype=tokens)
    with poisoned_memory(), cast:
        check_stem(stem, x, tokens)
