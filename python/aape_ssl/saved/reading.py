"""Encoders out of checkpoints of pre-training; it needs torch only, not what trained them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from .._files import read_checkpoint
from .._messages import CheckpointError
from ..method.model import Encoder, make_stem

__all__ = ["Part", "load_encoder", "made_with", "read_pretraining"]

Part = Literal["teacher", "student"]

# Earlier default sizes and features of stems, for checkpoints that do not state them.
EARLIER = (
    {"num_states": 32, "encoder_dim": 64, "features": "both"},
    {"num_states": 32, "encoder_dim": 64, "features": "complex"},
    {"features": "complex"},
)


def _below(prefix: str, checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The parameters of the module at `prefix`, by their names in it."""
    state = checkpoint.get("state_dict", {})
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def made_with(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a checkpoint of pre-training, as today's `Encoder` takes them; none for other checkpoints.

    Options that were left out had the defaults of the time: 32 states and an encoder of 64 before they were 16 and 32,
    and of these the first had responses only, features "complex", as had the MLP of their size.
    """
    options = dict(checkpoint.get("options", {}))
    stem, given = options.get("stem"), options.get("stem_options") or {}
    shapes = {name: value.shape for name, value in _below("objective.student.stem.", checkpoint).items()}
    if stem in ("aape", "aape-fixed", "conv+mlp") and "proj.weight" in shapes:
        for defaults in ({}, *EARLIER):
            with torch.device("meta"):
                made = make_stem(stem, options["patch_size"], shapes["proj.weight"][0], {**defaults, **given})
            if {name: value.shape for name, value in made.state_dict().items()} == shapes:
                if defaults:
                    options["stem_options"] = {**defaults, **given}
                break
    return options


def read_pretraining(
    path: str | os.PathLike[str], part: Part = "teacher"
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any] | None]:
    """From a checkpoint of pre-training: the encoder's weights, its options, and what `ClipData` says of its input.

    Errors: `CheckpointError`, also for a checkpoint that is not of pre-training.
    """
    checkpoint = read_checkpoint(path)
    options, weights = made_with(checkpoint), _below(f"objective.{part}.", checkpoint)
    needed = ("size", "stem", "patch_size", "stem_options")
    if not weights or any(name not in options for name in needed):
        raise CheckpointError(f"{path}: expected a checkpoint of pre-training with a {part}, got another one")
    return weights, {name: options[name] for name in needed}, checkpoint.get("ClipData")


def load_encoder(path: str | os.PathLike[str], part: Part = "teacher") -> Encoder:
    """The bare encoder of a checkpoint, on the CPU, in evaluation mode; `pretrained.load` gives it its front end.

    Errors: `CheckpointError`, also for a checkpoint that is not of pre-training.
    """
    weights, options, _ = read_pretraining(path, part)
    encoder = Encoder(**options)
    encoder.load_state_dict(weights)
    return encoder.eval()
