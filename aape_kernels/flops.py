"""What the ops cost, for `torch.utils.flop_counter`, which knows only PyTorch's own.

A multiply-add counts as two, as there. For one token, with P = C·P_f·P_t the pixels of its patch:

    projection 2 P S,  filters 8 K S,  encoder 2 P H + 4 S H,  product 2 D (P + planes·S)

A filter's step is a complex multiply-add by Horner's rule, four multiply-adds. The rest, squashing and magnitudes, is
not counted, as PyTorch does not count elementwise operations. Each gradient that a backward is asked for costs as much
as its product; the projection and the encoder are not computed twice.
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


def _sblu(x: Shape, weight: Shape, grid: PatchGrid) -> tuple[int, int]:
    """The cost of the projection and of the filters, for all tokens."""
    tokens = _tokens(x, grid)
    return 2 * tokens * math.prod(weight) * grid.patch[1], 8 * tokens * weight[0] * grid.window


def _tokens(x: Shape, grid: PatchGrid) -> int:
    return x[0] * math.prod(grid.tokens(x[2], x[3]))


def sblu(*arguments: Any, **more: Any) -> int:
    """The cost of `aape::sblu`."""
    x, _decay, _frequency, weight, grid, *_ = ops.structured("sblu", arguments)
    return sum(_sblu(x, weight, grid))


def sblu_backward(*arguments: Any, **more: Any) -> int:
    """The cost of `aape::sblu_backward`: the projection again, its adjoints, and the filters' adjoint."""
    _grad, x, _decay, _frequency, weight, grid, _quadrature, need, _ = ops.structured("sblu_backward", arguments)
    projection, filters = _sblu(x, weight, grid)
    need_x, _, _, need_weight = need
    total: int = projection * (1 + need_x + need_weight) + 2 * filters
    return total


def _encoder(tokens: int, shapes: Any) -> tuple[int, int]:
    """The cost of its two layers."""
    return 2 * tokens * math.prod(shapes.w1), 2 * tokens * math.prod(shapes.w2)


def embed(*arguments: Any, **more: Any) -> int:
    """The cost of `aape::embed`."""
    x, shapes, grid, *_ = ops.structured("embed", arguments)
    tokens = _tokens(x, grid)
    products: int = 2 * tokens * (math.prod(shapes.proj_w) + math.prod(shapes.fusion_w))
    return products + sum(_encoder(tokens, shapes)) + sum(_sblu(x, shapes.sblu_w, grid))


def embed_backward(*arguments: Any, **more: Any) -> int:
    """The cost of `aape::embed_backward`."""
    _grad, x, shapes, _r, _hidden, grid, *_, need, _ = ops.structured("embed_backward", arguments)
    need_x, need_proj, _no_proj_b, need_w1, _no_b1, need_w2, _no_b2, need_sblu, need_fusion = need
    tokens = _tokens(x, grid)
    patches, fusion = 2 * tokens * math.prod(shapes.proj_w), 2 * tokens * math.prod(shapes.fusion_w)
    first, second = _encoder(tokens, shapes)
    projection, filters = _sblu(x, shapes.sblu_w, grid)
    # whatever lies before the features needs their cotangent, and whatever lies before r needs that of r
    before_r = need_x or any(need[3:7])
    before_features = before_r or need_sblu
    total: int = patches * (need_x + need_proj) + fusion * (before_features + need_fusion)
    total += before_features * (2 * filters + projection) + projection * (need_x + need_sblu)
    total += second * (before_r + need_w2) + first * (need_x + need_w1)
    return total


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
    """Tells the counter of the formulas as soon as somebody imports it; importing it here would import Triton."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        """PyTorch's own spec, whose loader then also tells the counter."""
        if name != COUNTER:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            _tell(module)
            sys.meta_path.remove(self)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Make the formulas known to `torch.utils.flop_counter`, now or when it is imported."""
    if COUNTER in sys.modules:
        _tell(sys.modules[COUNTER])
    else:
        sys.meta_path.insert(0, _OnceImported())
