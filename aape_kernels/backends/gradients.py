"""What a backward op returns, from what a backend has computed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["like_inputs"]


def like_inputs(inputs: Mapping[str, Tensor | None], wanted: set[str], got: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """For every input, in order: its gradient, contiguous, in its shape and dtype; empty where it is not wanted.

    A wanted gradient that is not among those `got` is zero, as of an empty batch.
    """
    (like, *_) = (value for value in inputs.values() if value is not None)
    gradients = []
    for name, value in inputs.items():
        if name not in wanted or value is None:
            gradients.append(like.new_empty(0))
        elif name in got:
            one = got[name]
            if one.shape != value.shape or one.dtype != value.dtype or not one.is_contiguous():
                one = one.reshape(value.shape).to(value.dtype).contiguous()
            gradients.append(one)
        else:
            gradients.append(torch.zeros_like(value, memory_format=torch.contiguous_format))
    return tuple(gradients)
