"""timm, transformers and torchvision as the tests import them: beside a CPU build of torch too.

The wheels of torchvision and torchaudio that belong to CUDA builds of torch do not import beside a CPU build of it, and
timm imports the one, transformers the other where it is installed. Tests skip where a library is not installed.
"""

import sys
from importlib.util import find_spec

import pytest
import torch

from aape_ssl.audio import import_kaldi

_schemas: list[torch.library.Library] = []  # a schema lives as long as its Library


def _import_torchvision() -> None:
    """Its models are plain PyTorch, but it registers fakes for its compiled operators, which must have schemas."""
    try:
        import torchvision
    except ModuleNotFoundError:
        pytest.skip("torchvision is not installed", allow_module_level=True)
    except RuntimeError:
        for left in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[left]
        _schemas.append(torch.library.Library("torchvision", "DEF"))
        _schemas[0].define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _schemas[0].define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401


if find_spec("torchaudio"):
    import_kaldi()
_import_torchvision()
timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")
vision_transformer = sys.modules["torchvision"].models.vision_transformer
