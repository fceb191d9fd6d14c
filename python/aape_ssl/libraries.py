"""Libraries whose compiled parts were built for another torch than the one that is there."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec

__all__ = ["mend_torchvision"]

_schemas: list[object] = []  # a schema lives as long as its Library


def mend_torchvision() -> None:
    """Let `import torchvision` succeed beside a CPU build of torch, for which its usual wheels are not made.

    lightning imports it, through torchmetrics, where it is installed. Its models are plain PyTorch, but it registers
    fakes for its compiled operators, which must have schemas: they get some. Nothing happens where it is not installed
    or imports as it is.
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
