"""From the gradients that a backend has computed to what a backward op returns."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["like_inputs"]


def like_inputs(
    inputs: Mapping[str, Tensor | None], wanted: set[str], got: Mapping[str, Tensor]
) -> tuple[Tensor | None, ...]:
    """The gradient of every input, in order: contiguous, in the input's shape and dtype; None if not wanted.

    A wanted gradient that is missing from `got` is zero, as for an empty batch.
    """
    gradients: list[Tensor | None] = []
    for name, value in inputs.items():
        if name not in wanted or value is None:
            gradients.append(None)
        elif name in got:
            one = got[name]
            if one.shape != value.shape or one.dtype != value.dtype or not one.is_contiguous():
                one = one.reshape(value.shape).to(value.dtype).contiguous()
            gradients.append(one)
        else:
            gradients.append(torch.zeros_like(value, memory_format=torch.contiguous_format))
    return tuple(gradients)
