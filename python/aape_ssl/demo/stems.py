"""The stems that the demo looks through, and what their states respond to."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from aape_kernels import AaPE
from aape_kernels.plot import Heard
from aape_kernels.reference import PLANES

from .._files import read_checkpoint
from .._messages import CheckpointError, one_line, why
from ..sound.audio import FrontEnd

__all__ = [
    "CheckpointError",
    "load_encoders_stem",
    "load_stem",
    "strongest_frequency",
    "untrained_stem",
]


def untrained_stem(seed: int = 0) -> AaPE:
    """The default stem as a fixed filter bank, for looking at sound before anything is trained.

    Initialised from `seed`, except for two weights:

    - `encoder.w2` = 0: decay and frequency are the same for every patch. The S frequencies lie evenly over the
      alias-prone band, 1.46 Hz apart, with a decay at the geometric middle of its range.
    - `sblu.weight` = 1/P_f: every state listens to the mean of its subband, so that responses are comparable between
      states, and modulation common to the subband is not cancelled by random signs.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        stem = AaPE()
    with torch.no_grad():
        stem.encoder.w2.zero_()
        stem.sblu.weight.fill_(1 / stem.patch_size[0])
    return stem.eval()


def load_encoders_stem(path: str | os.PathLike[str]) -> tuple[AaPE, FrontEnd] | None:
    """The stem of an encoder that `aape-ssl` wrote, with all its settings, and the front end it was trained behind.

    Args:
        path: a folder from `aape-ssl export` or `finetune`, or a checkpoint of `aape-ssl pretrain`: its teacher's stem.

    Returns: None for any other file.
    Errors: `CheckpointError`.
    """
    if not os.path.isdir(path) and not {"pytorch-lightning_version", "options", "ClipData"} <= _read(path).keys():
        return None
    try:
        from ..saved.pretrained import load
    except ModuleNotFoundError as error:
        raise CheckpointError(f'is of aape-ssl; to read it needs {error.name}: pip install ".[ssl]"') from error
    encoder = load(path)
    stem = encoder.encoder.stem
    if not isinstance(stem, AaPE):
        raise CheckpointError(f"its stem is a {type(stem).__name__}, which has no filters to look at")
    return stem, encoder.front_end


def load_stem(path: str | os.PathLike[str]) -> tuple[AaPE, str]:
    """A stem from a checkpoint, and the prefix its parameters were found under.

    Args:
        path: `torch.save` of a state dict (read with `weights_only=True`) or `.safetensors`. The stem's parameters
            may have a prefix such as `patch_embed.`, in a bigger state dict, which may itself be under a key such as
            `state_dict`. Of several stems, the first is taken.

    Features and the sizes of patch, states, encoder and embedding follow from the tensors' shapes. Stride, window,
    kernel, band and decay range, which shapes do not tell, are the defaults of `AaPE`. Parameters become float32; a
    stem of layout "TF" becomes the equal one of layout "FT" if its patch is not square (a square one does not tell
    its layout, which only reorders what `proj` sees).

    Errors: `CheckpointError`.
    """
    tensors, prefix = _find_stem(_read(path))
    try:
        channels, *patch = tensors["encoder.w1"].shape[1:]
        if channels != 1:
            raise CheckpointError(f"its stem has {channels} input channels, the demo's spectrograms have 1")
        if patch[0] != patch[1] and list(tensors["proj.weight"].shape[2:]) == patch[::-1]:
            tensors["proj.weight"] = tensors["proj.weight"].transpose(2, 3)
        stem = AaPE(
            patch_size=patch,
            embed_dim=tensors["proj.weight"].shape[0],
            num_states=tensors["sblu.weight"].shape[0],
            encoder_dim=tensors["encoder.w1"].shape[0],
            features=_features(tensors["fusion.weight"]),
            bias="proj.bias" in tensors,
        )
        stem.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    except CheckpointError:
        raise
    except (ValueError, TypeError, RuntimeError, IndexError) as error:
        raise CheckpointError(f"its stem's tensors do not fit together ({one_line(error)[:300]})") from error
    if not all(bool(parameter.isfinite().all()) for parameter in stem.parameters()):
        raise CheckpointError("its stem holds weights that are not finite")
    return stem.eval(), prefix


def _features(fusion: Tensor) -> str:
    planes = fusion.shape[1] if fusion.dim() == 3 else None
    known = {count: features for features, count in PLANES.items()}
    if planes not in known:
        raise CheckpointError(f"its fusion.weight is {tuple(fusion.shape)}, expected (D, 1 to 3 planes, S)")
    return known[planes]


def _read(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    if not os.fspath(path).endswith(".safetensors"):
        return read_checkpoint(path)
    try:
        from safetensors.torch import load_file

        return load_file(path)
    except ModuleNotFoundError as error:
        raise CheckpointError("reading .safetensors needs `pip install safetensors`") from error
    except Exception as error:  # readers of damaged files raise whatever they stumble over
        raise CheckpointError(f"the checkpoint cannot be read ({why(error)})") from error


def _find_stem(content: Mapping[str, Any]) -> tuple[dict[str, Tensor], str]:
    """The tensors of the first stem in `content` or in a dict one level below, by their names in `AaPE`."""
    names = {"proj.weight", "encoder.w1", "encoder.b1", "encoder.w2", "encoder.b2", "sblu.weight", "fusion.weight"}
    for level in (content, *(value for value in content.values() if isinstance(value, Mapping))):
        for key in level:
            prefix = str(key).removesuffix("sblu.weight")
            if prefix == key:
                continue
            found = {name: level.get(prefix + name) for name in (*names, "proj.bias")}
            tensors = {name: value for name, value in found.items() if isinstance(value, Tensor)}
            missing = names - tensors.keys()
            if missing:
                raise CheckpointError(f"lacks {', '.join(prefix + name for name in sorted(missing))}")
            return tensors, prefix
    raise CheckpointError("holds no AaPE stem (no key ends in sblu.weight)")


def strongest_frequency(responses: Heard) -> float:
    """The frequency in Hz of the state with the most energy, argmax_s Σ_patches |y_s|².

    If the encoder moves a state from patch to patch, the mean of its frequency, weighted by its energy.
    """
    state = int(responses.energy.sum((0, 1)).argmax())
    energy = responses.energy[..., state].double() + 1e-30  # the plain mean where nothing responds
    return float((energy * responses.hz[..., state]).sum() / energy.sum())
