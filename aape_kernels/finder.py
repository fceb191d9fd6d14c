"""Which convolution of a model is its patch embedding, and in which order the axes of its input come.

The convolution is found by structure: it is the one `nn.Conv2d` that cuts patches, whatever the classes around it are
called. Structure cannot tell the order of the axes: the table does, and it covers models that have other convolutions
beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeGuard

from torch import nn

from .stem import AaPE

__all__ = ["KNOWN", "Known", "find", "get", "is_conv", "layout_of", "listed", "size_of"]


@dataclass(frozen=True)
class Known:
    """What is known about a class of models.

    Attributes:
        models: which models these are.
        holder: names of the class that holds the patch embedding, at whatever depth; derived classes count too.
        library: the package that class comes from; "" for code that people copy into their own tree.
        path: from the holder to the `nn.Conv2d`; "" where structure finds it.
        layout: of that convolution's input: "FT" (B, C, F, T), "TF" (B, C, T, F). Tokens are frequency-major with
            the former, time-major with the latter.
        sized: whether it is a model for images of any size, which people feed spectrograms in either order: the layout
            then holds unless the model's size is taller than wide.
    """

    models: str
    holder: tuple[str, ...]
    library: str
    path: str
    layout: str
    sized: bool = False

    def holds(self, module: nn.Module) -> bool:
        """Whether `module` is of the holder's class."""
        return any(
            base.__name__ in self.holder and self.library in ("", base.__module__.partition(".")[0])
            for base in type(module).__mro__
        )


HTS_AT = ("HTSAT_Swin_Transformer", "ClapAudioEncoder")
OF_TRANSFORMERS = (
    *("ViTPatchEmbeddings", "ViTMAEPatchEmbeddings", "DeiTPatchEmbeddings", "BeitPatchEmbeddings"),
    *("Data2VecVisionPatchEmbeddings", "Dinov2PatchEmbeddings", "Dinov2WithRegistersPatchEmbeddings"),
    *("DINOv3ViTEmbeddings", "SiglipVisionEmbeddings", "Siglip2VisionEmbeddings", "CLIPVisionEmbeddings"),
)

# The more specific before the more general: if two rows find a convolution, the first counts. Patch and stride are
# the convolution's own; the holder's code decides what becomes of its output.
KNOWN = (
    Known("AudioMAE, EAT", ("PatchEmbed_new", "PatchEmbed_org"), "", "proj", "TF"),
    Known("EAT in fairseq", ("ImageEncoder",), "", "local_encoder.proj", "TF"),
    Known("BEATs, OpenBEATs, ESPnet", ("BEATs", "BeatsEncoder"), "", "patch_embedding", "TF"),
    Known("AST, SSAST and ASiT, the authors'", ("ASTModel", "ASiT"), "", "", "FT"),
    Known("M2D", ("M2DViT", "LocalViT", "M2DEncoderViT", "M2D_ViT", "PortableM2D", "RuntimeM2D"), "", "", "FT"),
    Known("PaSST and MAEST", ("PaSST", "MAEST"), "", "", "FT"),
    Known("CED and Dasheng", ("AudioPatchEmbed", "CedModel", "CedEncoder", "DashengModel", "Dasheng"), "", "", "FT"),
    Known("CAV-MAE, its audio", ("CAVMAE", "CAVMAEFT"), "", "patch_embed_a.proj", "FT"),
    Known("HTS-AT, in CLAP by LAION, by Microsoft and in transformers", HTS_AT, "", "patch_embed.proj", "FT"),
    Known("transformers AST", ("ASTPatchEmbeddings",), "transformers", "projection", "FT"),
    Known("transformers' image models", OF_TRANSFORMERS, "transformers", "", "FT", sized=True),
    Known("torchvision ViT", ("VisionTransformer",), "torchvision", "conv_proj", "FT", sized=True),
    Known("open_clip ViT", ("VisionTransformer",), "open_clip", "conv1", "FT", sized=True),
    Known("timm", ("PatchEmbed",), "timm", "proj", "FT", sized=True),
    Known("timm, with a stem of its own", ("VisionTransformer",), "timm", "", "FT", sized=True),
)


SMALLEST = 8  # pixels of a patch


def is_conv(module: nn.Module | None) -> TypeGuard[nn.Conv2d]:
    """Whether it is a convolution, and not AaPE in the place of one."""
    return isinstance(module, nn.Conv2d) and not isinstance(module, AaPE)


def find(model: nn.Module) -> str:
    """The path of the model's patch embedding.

    Errors: `ValueError` with the reason, in one line, if there is none, or several.
    """
    named = dict(_named(model))
    if len(named) > 1:
        raise ValueError(
            f"path: expected one of {listed(list(named))}, the known stems in {type(model).__name__}, got None"
        )
    return next(iter(named), "") or _only_patches(model)


def layout_of(model: nn.Module, path: str) -> str | None:
    """The order of the axes of its input, "FT" or "TF"; None if nothing tells.

    None, too, for an image model if the size that it was built for says that time may come first.
    """
    row = dict(_named(model)).get(path)
    if row is None:
        rows = (row for module in _above(model, path) for row in KNOWN if not row.path and row.holds(module))
        row = next(rows, None)
    if row is None:
        return None
    size = size_of(model, path) if row.sized else None
    return None if size is not None and size[0] > size[1] else row.layout


def _named(model: nn.Module) -> Iterator[tuple[str, Known]]:
    """The path of every convolution that a row of the table names, once, with the first such row."""
    seen = set()
    for row in KNOWN:
        for name, module in model.named_modules() if row.path else ():
            path = f"{name}.{row.path}" if name else row.path
            conv = get(model, path) if row.holds(module) else None
            if is_conv(conv) and conv not in seen:
                seen.add(conv)
                yield path, row


def get(model: nn.Module, path: str) -> nn.Module | None:
    """The submodule at `path`, or None."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _above(model: nn.Module, path: str) -> Iterator[nn.Module]:
    """The modules that hold the one at `path`, the nearest first."""
    parts = path.split(".")
    for count in range(len(parts) - 1, -1, -1):
        yield model.get_submodule(".".join(parts[:count]))


def cuts_patches(conv: nn.Conv2d) -> bool:
    """Whether it may be a patch embedding: its kernel covers several pixels and moves by more than one."""
    (height, width), (down, right) = conv.kernel_size, conv.stride
    steps = down * right > 1 and down <= height and right <= width
    return steps and conv.groups == 1 and height * width >= SMALLEST


def _only_patches(model: nn.Module) -> str:
    """The path of the one convolution that cuts patches; no other may look at more than a pixel."""
    what = type(model).__name__
    if any(isinstance(module, AaPE) for module in model.modules()):
        raise ValueError(f"model: expected one whose stem is an nn.Conv2d, got {what} with AaPE in it")
    convs = {name: module for name, module in model.named_modules() if is_conv(module)}
    wide = {name: conv for name, conv in convs.items() if conv.kernel_size != (1, 1)}
    patches = [name for name, conv in wide.items() if cuts_patches(conv)]
    if not convs:
        reason = "it has no nn.Conv2d: its patches are cut by other means, which have no place for AaPE"
    elif not patches:
        reason = f"none of its nn.Conv2d cuts patches (there are: {listed(convs)})"
    elif len(patches) > 1 and len(patches) == len(wide):
        reason = f"several cut patches, name one by path: {listed(patches)}"
    elif len(wide) > 1:
        others = [name for name in wide if name != patches[0]]
        reason = f"it has others beside {patches[0]!r} ({listed(others)}); if that makes the tokens, name it by path"
    elif patches == [""]:
        reason = "it is itself a convolution: AaPE.from_conv(conv) makes a stem of one"
    else:
        return str(patches[0])
    raise ValueError(f"model: expected a ViT, whose one nn.Conv2d makes the tokens, got {what}: {reason}")


def listed(names: Iterable[str]) -> str:
    """A few of the paths, for a message."""
    paths = [repr(name) for name in names]
    return ", ".join(paths[:4] + ["…"] * (len(paths) > 4)) or "none"


def size_of(model: nn.Module, path: str) -> tuple[int, int] | None:
    """(height, width) that the model was built for, under timm's, transformers' and torchvision's names."""
    for module in _above(model, path):
        for of in (module, getattr(module, "config", None)):
            for name in ("img_size", "image_size"):
                size = getattr(of, name, None)
                if isinstance(size, (tuple, list)) and len(size) == 2 and all(isinstance(n, int) for n in size):
                    return size[0], size[1]
    return None
