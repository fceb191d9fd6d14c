"""from_pretrained and save_pretrained, in a folder; nothing is downloaded."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

import aape_kernels


def test_round_trip(tmp_path):
    pytest.importorskip("huggingface_hub")
    from aape_kernels.hub import AaPE

    options = {"num_states": 4, "encoder_dim": 8, "stride": (3, 5), "window": 6, "kernel": "bilateral", "layout": "TF"}
    stem = AaPE((40, 30), (4, 8), embed_dim=12, band=(0.1, 2.0), bias=False, flatten=False, **options)
    assert isinstance(stem, aape_kernels.AaPE)
    stem.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["stride"] == [3, 5]
    other = AaPE.from_pretrained(tmp_path)
    assert repr(other) == repr(stem)
    x = torch.randn(2, 1, 40, 30)
    assert torch.equal(other(x), stem(x))
    assert AaPE.from_pretrained(tmp_path, backend="reference").backend == "reference"
    stem.set_input_size((44, 38))
    stem.save_pretrained(tmp_path)
    assert AaPE.from_pretrained(tmp_path).img_size == (44, 38)


def test_a_file_that_lacks_a_parameter(tmp_path):
    pytest.importorskip("huggingface_hub")
    from safetensors.torch import load_file, save_file

    from aape_kernels.hub import AaPE

    AaPE(embed_dim=8).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["fusion.weight"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match=r"fusion\.weight"):
        AaPE.from_pretrained(tmp_path)
    assert AaPE.from_pretrained(tmp_path, strict=False).fusion.weight.shape == (8, 3, 16)


def test_what_was_a_convolution(tmp_path):
    pytest.importorskip("huggingface_hub")
    from aape_kernels.hub import AaPE

    conv, x = nn.Conv2d(2, 12, (8, 4), (5, 3)), torch.randn(2, 2, 30, 40)
    stem = AaPE.from_conv(conv, num_states=4)
    stem.save_pretrained(tmp_path)
    assert torch.equal(AaPE.from_pretrained(tmp_path)(x), stem(x))


def test_without_huggingface_hub():
    code = "import sys; sys.modules['huggingface_hub'] = None\nimport aape_kernels.hub"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert 'ImportError: aape_kernels.hub needs huggingface_hub: pip install "aape-kernels[hub]"' in run.stderr
