"""What the ops cost, for `torch.utils.flop_counter`, which knows no op but PyTorch's own.

A multiply-add counts as two, as there. Of one token, P = C·P_f·P_t the pixels of its patch:

    projection 2 P S,  filters 8 K S,  encoder 2 P H + 4 S H,  product 2 D (P + planes·S)

A filter's step is a complex multiply-add by Horner's rule, four multiply-adds; what is left, the squashing and the
magnitudes, is not counted, as PyTorch does not count what is elementwise. Each gradient that a backward is asked for
costs what its product costs; the projection and the encoder are not computed twice.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import math
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from . import ops
from .geometry import PatchGrid

__all__ = ["register"]

Shape = Sequence[int]


def _sblu(x: Shape, weight: Shape, patch: Shape, stride: Shape, window: int) -> tuple[int, int]:
    """Of the projection and of the filters, for all tokens."""
    tokens = _tokens(x, patch, stride, window)
    return 2 * tokens * math.prod(weight) * patch[1], 8 * tokens * weight[0] * window


def _tokens(x: Shape, patch: Shape, stride: Shape, window: int) -> int:
    grid = PatchGrid((patch[0], patch[1]), (stride[0], stride[1]), window)
    return x[0] * math.prod(grid.tokens(x[2], x[3]))


def sblu(x: Shape, decay: Shape, frequency: Shape, weight: Shape, *sizes: Any, **_: Any) -> int:
    """Of `aape::sblu`."""
    return sum(_sblu(x, weight, *sizes[:3]))


def sblu_backward(
    grad: Shape, x: Shape, decay: Shape, frequency: Shape, weight: Shape,
    patch: Shape, stride: Shape, window: int, quadrature: bool, need: Sequence[bool], backend: str, **_: Any,
) -> int:  # fmt: skip
    """Of `aape::sblu_backward`: the projection again, its adjoints, and the filters' adjoint."""
    projection, filters = _sblu(x, weight, patch, stride, window)
    return projection * (1 + need[0] + need[3]) + 2 * filters


def _encoder(tokens: int, w1: Shape, w2: Shape) -> tuple[int, int]:
    """Of its two layers."""
    return 2 * tokens * math.prod(w1), 2 * tokens * math.prod(w2)


def embed(
    x: Shape, proj_w: Shape, proj_b: Shape | None, w1: Shape, b1: Shape, w2: Shape, b2: Shape, sblu_w: Shape,
    fusion_w: Shape, patch: Shape, stride: Shape, window: int, *_: Any, **__: Any,
) -> int:  # fmt: skip
    """Of `aape::embed`."""
    tokens = _tokens(x, patch, stride, window)
    products = 2 * tokens * (math.prod(proj_w) + math.prod(fusion_w))
    return products + sum(_encoder(tokens, w1, w2)) + sum(_sblu(x, sblu_w, patch, stride, window))


def embed_backward(
    grad: Shape, x: Shape, proj_w: Shape, proj_b: Shape | None, w1: Shape, b1: Shape, w2: Shape, b2: Shape,
    sblu_w: Shape, fusion_w: Shape, r: Shape, hidden: Shape,
    patch: Shape, stride: Shape, window: int, quadrature: bool, decay: Any, band: Any, time_major: bool,
    need: Sequence[bool], backend: str, **_: Any,
) -> int:  # fmt: skip
    """Of `aape::embed_backward`."""
    need_x, need_proj, _no_proj_b, need_w1, _no_b1, need_w2, _no_b2, need_sblu, need_fusion = need
    tokens = _tokens(x, patch, stride, window)
    patches, fusion = 2 * tokens * math.prod(proj_w), 2 * tokens * math.prod(fusion_w)
    first, second = _encoder(tokens, w1, w2)
    projection, filters = _sblu(x, sblu_w, patch, stride, window)
    # whatever lies before the features needs their cotangent, and whatever lies before r needs that of r
    before_r = need_x or any(need[3:7])
    before_features = before_r or need_sblu
    total = patches * (need_x + need_proj) + fusion * (before_features + need_fusion)
    total += before_features * (2 * filters + projection) + projection * (need_x + need_sblu)
    return total + second * (before_r + need_w2) + first * (need_x + need_w1)


FORMULAS: dict[str, Callable[..., int]] = {
    "sblu": sblu,
    "sblu_backward": sblu_backward,
    "embed": embed,
    "embed_backward": embed_backward,
}
COUNTER = "torch.utils.flop_counter"


def _tell(counter: ModuleType) -> None:
    for name, formula in FORMULAS.items():
        counter.register_flop_formula(getattr(ops, name).overloadpacket)(formula)


class _OnceImported(importlib.abc.MetaPathFinder):
    """Tells the counter of the formulas as soon as somebody imports it; to import it for them would bring Triton."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        """PyTorch's own, whose loader then also tells."""
        if name != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            _tell(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Make the formulas known to `torch.utils.flop_counter`, now or when it is imported."""
    if COUNTER in sys.modules:
        _tell(sys.modules[COUNTER])
    else:
        sys.meta_path.insert(0, _OnceImported())
