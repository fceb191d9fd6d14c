"""`replace_stem` and `revert_stem`: put AaPE into an existing model, and take it out again.

Only the `nn.Conv2d` of the model's patch embedding is swapped. All around it stays: the module that holds it, with its
checks, attributes, hooks and output format, and the names under which checkpoints know its weight and bias.
"""

from __future__ import annotations

import weakref
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .checks import LAYOUTS, check_name
from .finder import KNOWN, Known, find, get, is_conv, layout_of, listed, size_of
from .stem import AaPE, computes_conv

__all__ = ["KNOWN", "AaPEConv2d", "Known", "replace_stem", "revert_stem"]

Model = TypeVar("Model", bound=nn.Module)


class AaPEConv2d(AaPE, nn.Conv2d):  # type: ignore[misc]  # stride is a pair in both
    """AaPE in the place of the `nn.Conv2d` of a patch embedding, as `replace_stem` puts it there.

    It is called like the convolution, x (B, C, F, T) -> (B, D, N_f, N_t), or (B, C, T, F) -> (B, D, N_t, N_f) for
    layout "TF", and has its attributes: `weight`, `bias`, `in_channels`, `out_channels`, `kernel_size`, `stride`. The
    output has the memory layout of channels-last convolutions, so that `flatten(2).transpose(1, 2)` is a view.

    It passes for an `nn.Conv2d`: code that converts, adapts (LoRA) or initialises convolutions takes it for the one it
    replaces, which is right, as its weight, bias and output are that one's.

    Everything else is as in `AaPE`, `analyse` included; `proj` is the module itself. Source: ours.
    """

    padding = (0, 0)
    dilation = (1, 1)
    groups = 1
    padding_mode = "zeros"
    transposed = False
    output_padding = (0, 0)
    _is_proj = True
    _carried: frozenset[str] = frozenset()
    _replaced: type[nn.Conv2d] = nn.Conv2d

    def __new__(cls, *sizes: Any, **options: Any) -> Any:
        """A plain `nn.Conv2d` if called like one: LoRA makes its convolutions by `type(conv)(...)`."""
        return nn.Conv2d(*sizes, **options) if sizes or "in_channels" in options else super().__new__(cls)

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, flatten=False)
        # one level up: the names that the convolution's parameters have in the model's checkpoints
        proj = self._modules.pop("proj")
        assert isinstance(proj, nn.Conv2d)
        self.weight = proj.weight
        self.register_parameter("bias", proj.bias)  # type: ignore[arg-type]  # a Parameter or None
        self.in_channels, self.out_channels, self.kernel_size = self.in_chans, self.embed_dim, self.patch_size

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # a convolution's name for it
        """Tokens as the convolution lays them out, (B, D, N_f, N_t), or (B, D, N_t, N_f) for layout "TF"."""
        return super().forward(input)

    @property
    def proj(self) -> AaPEConv2d:  # type: ignore[override]
        """The module itself, which has the weight and bias that `AaPE` keeps in `proj`."""
        return self

    def reset_parameters(self) -> None:
        """Initialise every parameter afresh, weight and bias as `nn.Conv2d` does."""
        nn.Conv2d.reset_parameters(self)
        self._reset_branch()


def replace_stem(model: Model, *, path: str | None = None, layout: str | None = None, **options: Any) -> Model:
    """Swap the patch embedding of a ViT for AaPE, in place. The model computes the same as before until it is trained.

    The convolution's weight and bias remain the same parameter objects (with their `requires_grad`, and in optimisers
    that hold them), under the same names in the state dict. AaPE's own parameters are added beside them and are trained
    unless you freeze them: pass them to the optimiser. Device, dtype and training mode are kept, and hooks on the
    convolution move to what replaces it.

    Args:
        model: a ViT whose tokens come from one `nn.Conv2d`, by which the stem is found (`aape_kernels.finder`). Make
            copies of the model, such as moving averages, and optimisers afterwards.
        path: of the stem in `model`: an `nn.Conv2d`, or a module that holds just one. Needed if there are several, or
            other convolutions beside it.
        layout: of the input of that convolution: "FT" (B, C, F, T), "TF" (B, C, T, F). Known for the models of
            docs/models.md, but may be given if the model is fed otherwise; needed for others, and for image models that
            were built taller than wide.
        options: keywords of `AaPE`: num_states, encoder_dim, window, kernel, band, decay, backend.

    Returns:
        `model` itself.

    Errors: `TypeError` or `ValueError` naming what was looked for and what came; `RuntimeError` if the new stem's
    output has a different shape from the old one's. In each case the model is left as it was.
    Source: ours.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(1, 192, 16, 16), nn.Flatten(2))
        >>> replace_stem(model, path="0", layout="FT")(torch.zeros(2, 1, 128, 256)).shape
        torch.Size([2, 192, 128])
    """
    _check_model(model)
    settled = {"img_size", "flatten", "output_fmt", "norm_layer", "strict_img_size", "dynamic_img_pad"} & options.keys()
    if settled:
        raise TypeError(f"{', '.join(sorted(settled))}: expected to be left out, as the model's own code settles it")
    if layout is not None:
        check_name(layout, "layout", LAYOUTS)
    where = find(model) if path is None else _resolve(model, path)
    layout = layout or layout_of(model, where)
    if layout is None:
        size = size_of(model, where)
        built = f", built for {size}," if size else ""
        raise ValueError(
            f"layout: expected one of {', '.join(LAYOUTS)}, as nothing tells in which order "
            f"{type(model).__name__}{built} feeds {where!r} with mel bins (F) and frames (T), got None"
        )
    conv = model.get_submodule(where)
    assert isinstance(conv, nn.Conv2d)
    _check_plain(conv, where)

    stem = AaPEConv2d.from_conv(conv, layout, **options)
    assert isinstance(stem, AaPEConv2d)
    _check_shape(conv, stem)
    stem.weight, stem.bias, stem._replaced = conv.weight, conv.bias, type(conv)
    _carry(conv, stem, where)
    _put(model, conv, stem)
    return model


def revert_stem(model: Model) -> Model:
    """Put an `nn.Conv2d` back wherever `replace_stem` put AaPE, in place, and drop AaPE's own parameters.

    Weight and bias are the parameters that the model has now: right after `replace_stem`, it becomes what it was
    before; after training, it is the trained model without the branch.

    Returns:
        `model` itself.

    Errors: `TypeError`, or `ValueError` if `replace_stem` has replaced nothing in `model`. Source: ours.
    """
    _check_model(model)
    stems = [module for module in model.modules() if isinstance(module, AaPEConv2d) and module is not model]
    if not stems:
        raise ValueError(f"model: expected one with a stem that replace_stem put there, got {type(model).__name__}")
    for stem in stems:
        names = [name for name in ("weight", "bias") if name not in stem._parameters]
        if names or parametrize.is_parametrized(stem):
            raise ValueError(
                f"model: expected a stem whose {' and '.join(names) or 'weight'} is a parameter, without weight_norm, "
                "pruning or the like: remove these first (torch.nn.utils.parametrize.remove_parametrizations, "
                "torch.nn.utils.prune.remove)"
            )
        if "forward" in vars(stem) or type(stem.weight) is not nn.Parameter:
            raise ValueError(
                "model: expected a stem with a weight of its own and its class's forward, neither offloaded "
                f"(accelerate) nor sharded (FSDP), got a {type(stem.weight).__name__}: revert it before, or undo that"
            )
    for stem in stems:
        conv = nn.Conv2d(
            stem.in_channels,
            stem.out_channels,
            stem.patch_size,
            stem.stride,
            bias=stem.bias is not None,
            device="meta",
        )
        conv.weight, conv.bias = stem.weight, stem.bias
        conv.__class__ = stem._replaced
        for name in stem._carried & vars(stem).keys():
            setattr(conv, name, getattr(stem, name))
        _put(model, stem, conv.train(stem.training))
    return model


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
        raise ValueError("model: expected one that DistributedDataParallel does not wrap yet: swap the stem, then wrap")


def _resolve(model: nn.Module, path: str) -> str:
    """The path of the one convolution at or below `path`."""
    if not isinstance(path, str):
        raise TypeError(f"path: expected a str such as 'patch_embed.proj', got {path!r}")
    module = get(model, path)
    inside = [] if module is None else [name for name, m in module.named_modules() if is_conv(m)]
    if len(inside) != 1 or not (path or inside[0]):
        what = "no module" if module is None else f"{type(module).__name__} with {len(inside)} of them"
        raise ValueError(
            f"path: expected that of an nn.Conv2d in {type(model).__name__}, or of a module that holds just one, got "
            f"{path!r} ({what}); there are: {listed([n for n, m in model.named_modules() if is_conv(m)])}"
        )
    return ".".join(filter(None, (path, inside[0])))


def _check_plain(conv: nn.Conv2d, path: str) -> None:
    """Refuse what only looks like a convolution with its weight: its forward would be lost."""
    if not computes_conv(conv) or type(conv._parameters.get("weight")) is not nn.Parameter:
        raise ValueError(
            f"model: expected {path!r} to be an nn.Conv2d with a weight of its own (not parametrised, sharded, "
            f"quantised or lazy, and no forward but nn.Conv2d's), got {type(conv).__name__}"
        )
    others = [*conv._parameters.keys() - {"weight", "bias"}, *conv._buffers, *conv._modules]
    if others:
        raise ValueError(
            f"model: expected {path!r} to hold weight and bias alone, got {type(conv).__name__} with "
            f"{listed(sorted(others))} too, for which AaPE has no place"
        )
    own = {name for kind in type(conv).__mro__ if not issubclass(nn.Conv2d, kind) for name in vars(kind)}
    lost = sorted(name for name in own if not name.startswith("_") and not hasattr(nn.Conv2d, name))
    if lost:
        raise ValueError(
            f"model: expected {path!r} to have what an nn.Conv2d has, got {type(conv).__name__} with {listed(lost)} "
            "too, which AaPE in its place would not have"
        )


@torch.no_grad()
def _check_shape(conv: nn.Conv2d, stem: AaPEConv2d) -> None:
    """Run one small input through both, bypassing their hooks."""
    height, width = (patch + n * step for patch, step, n in zip(stem.patch_size, stem.stride, (1, 2), strict=True))
    x = conv.weight.new_zeros(1, stem.in_chans, height, width)
    old, new = conv.forward(x).shape, stem.forward(x).shape
    if old != new:
        raise RuntimeError(f"replace_stem: expected output {tuple(old)}, the old stem's, got {tuple(new)}")


def _carry(conv: nn.Conv2d, stem: AaPEConv2d, path: str) -> None:
    """Copy the convolution's other attributes, such as a library's marks; not functions, which may be bound to it."""
    found = {name: value for name, value in vars(conv).items() if name not in vars(stem) and not callable(value)}
    usual = vars(nn.Conv2d(1, 1, 1, device="meta"))
    taken = sorted(name for name in found if name not in usual and hasattr(stem, name))
    if taken:
        raise ValueError(f"model: expected {path!r} without an attribute {listed(taken)}, which AaPE has for itself")
    stem._carried = frozenset(found)
    for name, value in found.items():
        setattr(stem, name, value)


def _put(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever `old` is, with the very dicts of its hooks, so that existing handles still remove them."""
    for name in vars(new):
        if "hook" in name:
            setattr(new, name, getattr(old, name))
    for hook in new._load_state_dict_pre_hooks.values():
        if getattr(hook, "with_module", False):  # torch's own wrapper, which holds the module that it is called with
            setattr(hook, "module", weakref.ref(new))  # noqa: B010  # no name of Callable's
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if child is old:
                setattr(module, name, new)
