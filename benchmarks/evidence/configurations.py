"""What is compared: stems, their sizes, and how their encoder learns."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from aape_kernels import AaPE
from aape_ssl.method.model import StemName, make_stem

__all__ = ["COMPARED", "Configuration", "adapting", "multiply_adds", "sizes"]

# of AaPE that say what is computed; whatever its defaults become, results are kept under what they were made with
SETTLED = ("num_states", "encoder_dim", "features", "kernel", "window", "band", "decay")


@dataclass(frozen=True)
class Configuration:
    """One row of a table: an encoder's stem, and what of its training is its own.

    Attributes:
        name: what reports call it; letters that a file may have.
        stem, options: name and further keywords of the stem (`aape_ssl.method.model.make_stem`).
        patch: P_f × P_t.
        w2_std: standard deviation of AaPE's W2 at first; None for the stem's own, 0.02.
        encoder_rate: learning rate of AaPE's encoder in pre-training, as a multiple of everything else's.
        encoder_from: share of pre-training during which AaPE's encoder stays as it is.
    """

    name: str
    stem: StemName
    options: dict[str, Any] = field(default_factory=dict)
    patch: tuple[int, int] = (16, 16)
    w2_std: float | None = None
    encoder_rate: float = 1.0
    encoder_from: float = 0.0

    def key(self, dim: int) -> dict[str, Any]:
        """What results depend on: the fields, and what the stem's defaults are today."""
        with torch.random.fork_rng(devices=[]):
            stem = self.make(dim)
        settled = {name: getattr(stem, name) for name in SETTLED} if isinstance(stem, AaPE) else {}
        return {**asdict(self), "settled": settled, "parameters": sum(p.numel() for p in stem.parameters())}

    def make(self, dim: int) -> nn.Module:
        """The stem alone."""
        return make_stem(self.stem, self.patch, dim, self.options)


COMPARED = {
    each.name: each
    for each in (
        Configuration("aape", "aape"),
        Configuration("aape-complex", "aape", {"features": "complex"}),
        Configuration("aape-fixed", "aape-fixed"),
        Configuration("conv", "conv"),
        Configuration("conv+mlp", "conv+mlp"),
    )
}
"""The stems of `make ssl`: AaPE; with responses alone, without magnitudes; with filters that no patch moves; the plain
convolution; the convolution and an MLP of AaPE's size."""


def sizes() -> list[Configuration]:
    """States S and hidden units H, adaptive and fixed, on patches of 16 × 16 and 16 × 32."""
    found = []
    for patch in ((16, 16), (16, 32)):
        where = "" if patch == (16, 16) else "-p32"
        for states in (8, 16, 32):
            for hidden in (16, 32, 64):
                options = {"num_states": states, "encoder_dim": hidden}
                found.append(Configuration(f"s{states}-h{hidden}{where}", "aape", options, patch))
            # its encoder computes a constant: H is nothing to it
            options = {"num_states": states, "encoder_dim": 16}
            found.append(Configuration(f"s{states}-fixed{where}", "aape-fixed", options, patch))
    return found


def adapting(states: int = 16, hidden: int = 32) -> list[Configuration]:
    """How AaPE's encoder might learn more: from larger weights, at a higher rate, after the rest has begun."""
    variants: dict[str, dict[str, float]] = {
        "w2-0.1": {"w2_std": 0.1},
        "w2-0.3": {"w2_std": 0.3},
        "rate3": {"encoder_rate": 3.0},
        "rate10": {"encoder_rate": 10.0},
        "rate3-from0.3": {"encoder_rate": 3.0, "encoder_from": 0.3},
    }
    return [
        Configuration(
            f"s{states}-h{hidden}-{name}{where}",
            "aape",
            {"num_states": states, "encoder_dim": hidden},
            patch,
            **own,
        )
        for where, patch in (("", (16, 16)), ("-p32", (16, 32)))
        for name, own in variants.items()
    ]


def multiply_adds(configuration: Configuration, dim: int) -> float:
    """Of the stem for one token, in those of the plain convolution's; the encoder's of fixed filters are not counted.

    With P pixels a patch: P D of the convolution; P H + 2 S H of AaPE's encoder, P_t (P_f + 4) S of projection and
    filters, and p S D of the fusion, p being its planes; of an MLP its weights.

    Source: evidence gathered before (patch 16 × 16: 256 H + 2 S H, 256 S + 64 S, 3 S D).
    """
    with torch.random.fork_rng(devices=[]):
        stem = configuration.make(dim)
    pixels = math.prod(configuration.patch)
    if isinstance(stem, AaPE):
        states, hidden = stem.num_states, 0 if configuration.stem == "aape-fixed" else stem.encoder_dim
        branch = pixels * hidden + 2 * states * hidden
        branch += configuration.patch[1] * (configuration.patch[0] + 4) * states
        branch += stem.fusion.weight.shape[1] * states * dim
    else:
        branch = sum(p.numel() for name, p in stem.named_parameters() if name.startswith("branch") and p.dim() > 1)
    return 1 + branch / (pixels * dim)
