"""What the ops say that they cost, against what PyTorch counts in the reference."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from aape_kernels import AaPE, replace_stem, sblu
from aape_kernels.backends import cpu

pytestmark = pytest.mark.skipif(not cpu.NATIVE_BUILT, reason="the native module was not built")


def counted(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def filters(stem, batch, frames):
    """What the reference does elementwise, which PyTorch does not count: four multiply-adds a frame and state."""
    n_f, n_t = stem._grid.tokens(128, frames)
    return 8 * batch * n_f * n_t * stem.num_states * stem.window


@pytest.mark.parametrize("features", ["both", "complex", "magnitude"])
@pytest.mark.parametrize("options", [{}, {"window": 10, "kernel": "bilateral"}], ids=["default", "short-window"])
def test_forward_is_what_the_reference_does(features, options):
    stem = AaPE(embed_dim=24, num_states=8, encoder_dim=12, features=features, backend="cpu", **options)
    x = torch.randn(2, 1, 128, 64)
    with torch.no_grad():
        got = counted(lambda: stem(x))
        stem.backend = "reference"
        assert got == counted(lambda: stem(x)) + filters(stem, 2, 64)


@pytest.mark.parametrize("needs_x", [False, True])
def test_backward_is_what_the_reference_does(needs_x):
    stem = AaPE(embed_dim=24, num_states=8, encoder_dim=12, backend="cpu")
    x = torch.randn(2, 1, 128, 64, requires_grad=needs_x)
    got = counted(lambda: stem(x).sum().backward())
    stem.backend = "reference"
    want = counted(lambda: stem(x).sum().backward()) + 3 * filters(stem, 2, 64)
    # the kernels compute the projection again, and the product's cotangent for x in one with the features'
    assert got == pytest.approx(want, rel=0.15)


def test_only_what_is_asked_for():
    stem = AaPE(embed_dim=24, num_states=8, backend="cpu")
    x = torch.randn(2, 1, 128, 64)
    whole = counted(lambda: stem(x).sum().backward())
    stem.requires_grad_(False)
    forward = counted(lambda: stem(x))
    stem.proj.requires_grad_(True)
    proj = counted(lambda: stem(x).sum().backward())
    assert proj == forward + 2 * x.numel() * 24
    assert forward < proj < whole


def test_sblu():
    x, rates = torch.randn(2, 1, 32, 64), torch.rand(2, 2, 4, 8)
    weight = torch.randn(8, 1, 16)
    want = 2 * 2 * 2 * 4 * 8 * 16 * 16 + 8 * 2 * 2 * 4 * 8 * 16
    assert counted(lambda: sblu(x, rates, rates, weight, backend="cpu")) == want


def test_counted_beside_the_convolution_that_it_replaces():
    model, x = nn.Sequential(nn.Conv2d(1, 768, 16, 16)), torch.randn(8, 1, 128, 1024)
    before = counted(lambda: model(x))
    replace_stem(model, path="0", layout="FT")
    assert 1.1 < counted(lambda: model(x)) / before < 2


@pytest.mark.parametrize("order", ["aape_kernels, torch.utils.flop_counter", "torch.utils.flop_counter, aape_kernels"])
def test_whichever_is_imported_first(order):
    code = (
        f"import {order}, torch\n"
        "with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:\n"
        "    aape_kernels.AaPE(embed_dim=8)(torch.zeros(1, 1, 16, 16))\n"
        "print(counter.get_total_flops())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) > 0


def test_after_somebody_only_looked_for_the_counter():
    code = (
        "import importlib.util, aape_kernels, torch\n"
        "importlib.util.find_spec('torch.utils.flop_counter')\n"
        "from torch.utils.flop_counter import flop_registry\n"
        "print(torch.ops.aape.embed in flop_registry)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "True\n"
