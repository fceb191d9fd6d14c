"""Aliasing-aware Patch Embedding (AaPE, arXiv 2512.03637): fused kernels and a drop-in stem for audio ViTs."""

from .functional import embed, sblu
from .ranges import band_from_hz, decay_from_hz
from .stem import AaPE
from .surgery import replace_stem, revert_stem

__all__ = ["AaPE", "band_from_hz", "decay_from_hz", "embed", "replace_stem", "revert_stem", "sblu"]
__version__ = "0.1.0"
