"""What pre-training and fine-tuning share: AdamW, its schedule, and which parameters weight decay leaves alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from .._messages import within

__all__ = ["adamw", "check_rates", "grouped", "warmup_cosine"]


def check_rates(lr: float, betas: tuple[float, float], weight_decay: float) -> None:
    """Check what AdamW does not: it accepts a negative weight decay, which makes weights grow.

    Errors: `ValueError` naming the argument.
    """
    within("[0, inf)", lr=lr, weight_decay=weight_decay)
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas: expected two numbers in [0, 1), got {betas}")


def warmup_cosine(step: int, warmup: int, steps: int) -> float:
    """Share of the highest learning rate at a step, counted from 0; 0 from `steps` on.

    (s + 1)/warmup,   then   ½ (1 + cos(π (s − warmup)/(steps − warmup)))
    """
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min((step - warmup) / max(steps - warmup, 1), 1)))


def adamw(groups: list[dict[str, Any]], betas: tuple[float, float], warmup: int, steps: int) -> dict[str, Any]:
    """AdamW for groups that have `lr` and `weight_decay`, and `warmup_cosine` every step, as Lightning takes them."""
    optimizer = torch.optim.AdamW(groups, betas=betas)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, warmup, steps))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def grouped(
    module: nn.Module, rate: Callable[[str], float], exempt: Collection[str], weight_decay: float
) -> list[dict[str, Any]]:
    """A module's parameters that learn, by learning rate, which follows from the name, the lowest first.

    Weight decay applies to matrices and kernels, except those in `exempt`, which a model asks to leave alone.
    """
    groups: dict[tuple[float, bool], list[Tensor]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((rate(name), parameter.dim() < 2 or name in exempt), []).append(parameter)
    return [
        {"params": groups[lr, spared], "lr": lr, "weight_decay": 0.0 if spared else weight_decay}
        for lr, spared in sorted(groups)
    ]
