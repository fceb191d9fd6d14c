"""The problems the peers solve, and the float64 result each is checked against before it is timed."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aape_kernels import AaPE, sblu
from aape_kernels.geometry import PatchGrid

__all__ = ["Problem", "Sizes", "Truth", "truth"]


@dataclass(frozen=True)
class Sizes:
    """Everything but the batch. The default is the case the project's figures are stated for.

    Sizes in mel bins × frames; `window` in frames; `dim`, `states` and `hidden` are D, S and the encoder's width.
    """

    mel_bins: int = 128
    frames: int = 1024
    patch: tuple[int, int] = (16, 16)
    stride: tuple[int, int] = (16, 16)
    window: int = 16
    channels: int = 1
    dim: int = 768
    states: int = 16
    hidden: int = 32
    kernel: str = "quadrature"
    features: str = "both"

    def __str__(self) -> str:
        usual = Sizes()
        more = f", {self.patch[0]} × {self.patch[1]} patches" if self.patch != usual.patch else ""
        more += f", S = {self.states}" if self.states != usual.states else ""
        more += f", {self.features}" if self.features != usual.features else ""
        return f"{self.mel_bins} × {self.frames}, D = {self.dim}{more}"

    @property
    def grid(self) -> PatchGrid:
        """The patch grid."""
        return PatchGrid.make(self.patch, self.stride, self.window)

    @property
    def tokens(self) -> tuple[int, int]:
        """(N_f, N_t)."""
        return self.grid.tokens(self.mel_bins, self.frames)

    def stem(self, backend: str, **factory: Any) -> AaPE:
        """An AaPE stem of these sizes."""
        return AaPE(
            patch_size=self.patch,
            in_chans=self.channels,
            embed_dim=self.dim,
            stride=self.stride,
            num_states=self.states,
            encoder_dim=self.hidden,
            window=self.window,
            kernel=self.kernel,
            features=self.features,
            backend=backend,
            **factory,
        )


@dataclass(frozen=True)
class Problem:
    """Input, parameters and cotangent of one operation at one batch size.

    `op` "stem": x (B, C, F, T), `parameters` an AaPE state dict, cotangent (B, N, D). `op` "sblu": the same x,
    `parameters` decay and frequency (B, N_f, N_t, S) and weight (S, C, P_f), cotangent (B, N_f, N_t, 2, S).
    """

    op: str
    sizes: Sizes
    batch: int
    x: Tensor = field(repr=False)
    parameters: dict[str, Tensor] = field(repr=False)
    cotangent: Tensor = field(repr=False)

    def mlp(self) -> nn.Module:
        """The control with as many parameters in an MLP: the same random numbers on every device and every run."""
        from aape_ssl.method.model import ConvMLPStem

        sizes = self.sizes
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            stem = ConvMLPStem(
                sizes.patch, sizes.channels, sizes.dim, sizes.states, sizes.hidden, features=sizes.features
            )
        stem.proj.stride = stem.branch[0].stride = sizes.stride  # those of pre-training do not overlap
        return stem.to(self.x.device, self.x.dtype)

    def operand(self) -> tuple[Tensor, Tensor]:
        """Rows [patch | features] of random numbers, and the weight that makes tokens of them."""
        weight = torch.cat([self.parameters[name].flatten(1) for name in ("proj.weight", "fusion.weight")], dim=1)
        generator = torch.Generator().manual_seed(1)
        rows = torch.randn(self.batch * math.prod(self.sizes.tokens), weight.shape[1], generator=generator)
        return rows.to(self.x), weight

    def under_autocast(self) -> Problem:
        """The same with tokens, and so a cotangent, of bfloat16."""
        return replace(self, cotangent=self.cotangent.bfloat16())

    @classmethod
    def make(
        cls, op: str, sizes: Sizes, batch: int, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> Problem:
        """The same random numbers on every device and every run.

        Decay and frequency are spread over the default ranges, (1/K, 2) per frame and (π/S_t, π) rad/frame.
        """
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator)

        n_f, n_t = sizes.tokens
        x = torch.randn(batch, sizes.channels, sizes.mel_bins, sizes.frames, generator=generator)
        if op == "stem":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                parameters = {name: value.detach() for name, value in sizes.stem("reference").named_parameters()}
            shape: tuple[int, ...] = (batch, n_f * n_t, sizes.dim)
        else:
            token_shape = (batch, n_f, n_t, sizes.states)
            fan_in = sizes.channels * sizes.patch[0]
            parameters = {
                "decay": (2 * sizes.window) ** draw(*token_shape) / sizes.window,
                "frequency": math.pi * (1 - (1 - 1 / sizes.stride[1]) * draw(*token_shape)),
                "weight": (2 * draw(sizes.states, sizes.channels, sizes.patch[0]) - 1) / math.sqrt(fan_in),
            }
            shape = (batch, n_f, n_t, 2, sizes.states)
        cotangent = torch.randn(*shape, generator=generator)
        return cls(
            op,
            sizes,
            batch,
            x.to(device, dtype),
            {name: value.to(device, dtype) for name, value in parameters.items()},
            cotangent.to(device, dtype),
        )


@dataclass(frozen=True)
class Truth:
    """An output and its gradients by parameter name, in float64 at the problem's own (rounded) numbers."""

    output: Tensor
    gradients: dict[str, Tensor]


def truth(problem: Problem, formula: str) -> Truth:
    """What a peer that computes `formula` has to return.

    `formula` is "plain" (the Conv2d stem), "mlp" (with an MLP beside it), "products" (of the stem's operand), "aape"
    (the whole stem) or "sblu"; the last two by the package's float64 reference. Gradients are those of
    Σ output · cotangent, for every parameter that the formula has.
    """
    sizes = problem.sizes
    x = problem.x.double()
    values = {name: value.double().requires_grad_() for name, value in problem.parameters.items()}
    if formula == "plain":
        values = {name: value for name, value in values.items() if name.startswith("proj.")}
        tokens = F.conv2d(x, values["proj.weight"], values["proj.bias"], sizes.stride)
        output = tokens.flatten(2).transpose(1, 2)
    elif formula == "mlp":
        control = problem.mlp().double()
        values = dict(control.named_parameters())
        output = control(x)
    elif formula == "products":
        rows, weight = (value.double() for value in problem.operand())
        patch = problem.parameters["proj.weight"][0].numel()
        values = {"features": rows[:, patch:].clone(), "weight": weight, "bias": values["proj.bias"].detach()}
        values = {name: value.requires_grad_() for name, value in values.items()}
        product = F.linear(torch.cat([rows[:, :patch], values["features"]], dim=1), values["weight"], values["bias"])
        output = product.view(problem.batch, -1, sizes.dim)
    elif formula == "aape":
        stem = sizes.stem("reference", device=x.device, dtype=torch.float64)
        output = torch.func.functional_call(stem, values, (x,))
    else:
        output = sblu(x, **values, patch_size=sizes.patch, stride=sizes.stride, window=sizes.window,
                      kernel=sizes.kernel, backend="reference")  # fmt: skip
    gradients = torch.autograd.grad(output, list(values.values()), problem.cotangent.double())
    return Truth(output.detach(), dict(zip(values, gradients, strict=True)))
