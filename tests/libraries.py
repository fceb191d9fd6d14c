"""timm, transformers and torchvision as the tests import them: beside a CPU build of torch too.

The wheels of torchvision and torchaudio that belong to CUDA builds of torch do not import beside a CPU build of it, and
timm imports the one, transformers the other where it is installed. Tests skip where a library is not installed.
"""

import sys
from importlib.util import find_spec

import pytest

from aape_ssl.libraries import mend_torchvision
from aape_ssl.sound.audio import import_kaldi

if find_spec("torchaudio"):
    import_kaldi()
mend_torchvision()
pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")
vision_transformer = sys.modules["torchvision"].models.vision_transformer
