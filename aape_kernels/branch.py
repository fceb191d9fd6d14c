"""The parameters of the stem's branch: Lambda Encoder, SBLU projection, fusion.

The stem reads them for one fused call, `functional.embed`. Their own `forward`s compute the same step by step, for when
a hook, or a module put in their place, has changed what calling them means (`stem`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from . import reference
from .functional import sblu

__all__ = ["BranchModule", "Filters", "Fusion", "LambdaEncoder", "as_made", "convolves", "hooked"]

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
FORWARD, CONV_FORWARD = nn.Conv2d.forward, nn.Conv2d._conv_forward  # torch's: people patch the class, too


def as_made(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling `module` would do what `kind` does with its parameters, and nothing else.

    False with hooks (weight_norm's, pruning's, accelerate's, FSDP's; those on all modules), with its own or a patched
    forward, or for another class (a LoRA adapter, a quantised or sharded module). Reading the parameters calls their
    parametrisations.
    """
    if type(module) is not kind and parametrize.type_before_parametrizations(module) is not kind:
        return False
    if "forward" in module.__dict__ or kind.forward is not FORWARDS.get(kind, kind.forward) or hooked(module):
        return False
    return not isinstance(module, nn.Conv2d) or convolves(module)


def hooked(module: nn.Module) -> bool:
    """Whether calling the module also calls hooks, its own or those on all (`register_module_forward_hook`)."""
    return any(map(module.__dict__.get, HOOKS)) or bool(torch.nn.modules.module._has_any_global_hook())


def convolves(conv: nn.Conv2d) -> bool:
    """Whether an `nn.Conv2d` convolves as torch's own does: neither it nor its class is patched."""
    patched = nn.Conv2d.forward is not FORWARD or type(conv)._conv_forward is not CONV_FORWARD
    return not patched and "_conv_forward" not in conv.__dict__


class BranchModule(nn.Module):
    """A module that holds parameters of AaPE's own and knows their initial values.

    A library that allocates parameters missing in a checkpoint, as transformers' `from_pretrained` does, must call
    `reset_parameters` on these (docs/models.md).
    """

    def reset_parameters(self) -> None:
        """Initialise the parameters afresh."""
        raise NotImplementedError


class LambdaEncoder(BranchModule):
    """Estimates decay and frequency from each patch: r = W2 · SiLU(W1 · vec(patch) + b1) + b2.

    Source: the paper's Lambda Encoder; its layers, ranges and initial values are ours (docs/maths.md §3).

    It has its own parameters rather than `nn.Linear` modules, because timm and transformers re-initialise those.
    """

    def __init__(self, channels: int, patch: tuple[int, int], hidden: int, states: int, **factory: Any) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(hidden, channels, *patch, **factory))
        self.b1 = nn.Parameter(torch.empty(hidden, **factory))
        self.w2 = nn.Parameter(torch.empty(2 * states, hidden, **factory))
        self.b2 = nn.Parameter(torch.empty(2 * states, **factory))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A fixed filter bank that learns to adapt: frequencies evenly over the band, decays mid-range."""
        uniform_fan_in(self.w1)
        self.b1.zero_()
        self.w2.normal_(std=0.02)
        states = len(self.b2) // 2
        share = (torch.arange(states, device=self.b2.device, dtype=torch.float64) + 0.5) / states
        # σ(r_ω) = (s + ½)/S
        copy_whole(self.b2, torch.cat([torch.zeros_like(share), torch.logit(share)]))

    def forward(self, patches: Tensor) -> Tensor:
        """Patches (…, C·P_f·P_t) -> r (…, 2S), S decay logits and S frequency logits."""
        return reference.logits(patches, self.w1, self.b1, self.w2, self.b2)


class Weight(BranchModule):
    """A module that holds one weight, for the names `sblu.weight` and `fusion.weight` in the state dict.

    Attributes:
        starts_at_zero: True for the fusion of a stem that must at first compute what a convolution computes.
    """

    starts_at_zero = False

    def __init__(self, *shape: int, **factory: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*shape, **factory))

    def reset_parameters(self) -> None:
        """Uniform ±1/√fan_in, or zero."""
        if self.starts_at_zero:
            nn.init.zeros_(self.weight)
        else:
            uniform_fan_in(self.weight)


class Filters(Weight):
    """SBLU's projection (S, C, P_f)."""

    def forward(self, x: Tensor, decay: Tensor, frequency: Tensor, **options: Any) -> Tensor:
        """`aape_kernels.sblu` of x (B, C, F, T), with the same options -> y (B, N_f, N_t, 2, S)."""
        return sblu(x, decay, frequency, self.weight.to(x.dtype), **options)


class Fusion(Weight):
    """The fusion (D, planes, S)."""

    def forward(self, features: Tensor) -> Tensor:
        """Features (…, planes·S) -> what they add to the tokens, (…, D)."""
        return F.linear(features, self.weight.flatten(1).to(features.dtype))


@torch.no_grad()
def uniform_fan_in(weight: Tensor) -> None:
    """Uniform ±1/√fan_in, the fan-in being all but the first axis."""
    bound = math.sqrt(weight.shape[0] / weight.numel())
    weight.uniform_(-bound, bound)


def copy_whole(parameter: Tensor, value: Tensor) -> None:
    """Set all of a parameter, which may be sharded: each process then keeps its share."""
    value = value.to(parameter)
    if hasattr(parameter, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value, parameter.device_mesh, parameter.placements)  # type: ignore[attr-defined]
    parameter.copy_(value)


# Their own, which people patch on the class, too.
FORWARDS: dict[type[nn.Module], Any] = {kind: kind.forward for kind in (LambdaEncoder, Filters, Fusion)}
