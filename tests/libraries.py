"""timm, transformers and torchvision as the tests import them: beside a CPU build of torch too.

The wheels of torchvision and torchaudio that belong to CUDA builds of torch do not import beside a CPU build of it, and
timm imports the one, transformers the other where it is installed: `mend` is what README tells users to call. Tests
skip where a library is not installed.
"""

import sys

import pytest

from aape_ssl.libraries import mend

mend()
pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")
vision_transformer = sys.modules["torchvision"].models.vision_transformer
