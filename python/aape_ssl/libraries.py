"""Libraries whose compiled parts were built for another torch than the one installed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

__all__ = ["import_kaldi", "mend", "mend_torchvision"]

_schemas: list[object] = []  # a schema lives as long as its Library


def mend() -> None:
    """Let timm and transformers be imported even if torchvision or torchaudio were built for a different torch.

    Call it before importing them. Libraries that are not installed, or import as they are, are left alone.
    """
    if find_spec("torchaudio") is not None:
        import_kaldi()
    mend_torchvision()


def mend_torchvision() -> None:
    """Let `import torchvision` succeed beside a CPU build of torch, for which its usual wheels are not made.

    lightning imports it, through torchmetrics, if it is installed. Its models are plain PyTorch, but it registers fakes
    for its compiled operators, which must have schemas: they get some here. Nothing happens if torchvision is not
    installed or imports as it is.
    """
    import torch

    if find_spec("torchvision") is None:
        return
    try:
        import_module("torchvision")
    except RuntimeError:
        for left in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[left]
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _schemas.append(library)
        import_module("torchvision")


def _stub_extension(name: str) -> ModuleType:
    """What torchaudio's Python parts ask of `torchaudio._extension`, with every compiled part reported as absent."""

    def unchanged(function: Callable[..., Any]) -> Callable[..., Any]:
        return function

    stub, absent = ModuleType(name), {"_IS_TORCHAUDIO_EXT_AVAILABLE": False, "_IS_ALIGN_AVAILABLE": False}
    vars(stub).update(absent, fail_if_no_align=unchanged, _check_cuda_version=lambda: None)
    return stub


def import_kaldi() -> ModuleType:
    """`torchaudio.compliance.kaldi`, beside a CPU build of torch too.

    torchaudio's wheels hold a compiled extension that needs libtorch_cuda, so a plain `import torchaudio` fails beside
    a CPU torch, or one of another CUDA version. Its Python parts need no extension: only if the plain import fails,
    it is repeated with `torchaudio._extension` replaced by a stub.

    Errors: `ImportError` if torchaudio is not installed or does not import with the stub either.
    """
    name = "torchaudio._extension"
    try:
        from torchaudio.compliance import kaldi
    except (ImportError, OSError, RuntimeError) as error:
        if find_spec("torchaudio") is None:
            raise
        # the failed import leaves submodules of a package that is no longer there
        for left in [key for key in sys.modules if key.partition(".")[0] == "torchaudio"]:
            del sys.modules[left]
        sys.modules[name] = _stub_extension(name)
        try:
            from torchaudio.compliance import kaldi
        except Exception:  # whatever it is, the stub must not stay for the next import
            del sys.modules[name]
            raise ImportError(f"torchaudio does not import: {error}") from error
    module: ModuleType = kaldi
    return module
