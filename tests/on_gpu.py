"""What the tests on a GPU share: the backends that run there, sizes, and results beside the reference in float64."""

import contextlib
import copy
import os
import sys
import time

import pytest
import torch
from checks import compare

from aape_kernels import AaPE, embed, sblu
from aape_kernels.backends import BACKENDS, Call, reasons

DEVICE = torch.device("cuda")
# What the project's figures are stated for: 32 768 tokens, several times what an H100 works on at once.
FULL = {"batch": 64, "mel_bins": 128, "frames": 1024, "dim": 768, "states": 32}
# Where every program has little to do and compiling is all that takes time.
MODEST = {"batch": 4, "mel_bins": 64, "frames": 256, "dim": 96, "states": 32}


def running() -> list[str]:
    """The GPU backends that can run here; without a GPU, those that could."""
    named = [name for name, backend in BACKENDS.items() if backend.device == "cuda" and backend.run is not None]
    if not torch.cuda.is_available():
        return named
    return [name for name, why in reasons(Call("sblu", DEVICE, torch.float32)).items() if why is None and name in named]


@pytest.fixture(autouse=True)
def a_lost_device_ends_the_process():
    """After an illegal access everything fails in this process: where tests run side by side, a new one takes over."""
    yield
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" not in os.environ:
            raise
        print(f"the device is lost to this process: {error}", file=sys.stderr, flush=True)
        time.sleep(1)  # the failed test is still being reported
        os._exit(1)


def needs(gigabytes: float) -> None:
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    if total < gigabytes * 1e9:
        pytest.skip(f"takes {gigabytes:.0f} GB of GPU memory, there are {total / 1e9:.0f}")


def run(inputs, cotangent, options, backend: str) -> list[torch.Tensor]:
    """y and the gradients of the four inputs."""
    leaves = [value.detach().requires_grad_() for value in inputs]
    y = sblu(*leaves, **options, backend=backend)
    return [y, *torch.autograd.grad(y, leaves, cotangent)]


def check(inputs, cotangent, options, backend: str) -> None:
    """Against the reference in float64 at the same, already rounded numbers."""
    got = run(inputs, cotangent, options, backend)
    want = run([value.double() for value in inputs], cotangent.double(), options, "reference")
    compare(got, want, inputs, inputs[0].dtype)


def run_embed(inputs: dict[str, torch.Tensor], cotangent, options, backend: str) -> list[torch.Tensor]:
    """Tokens and the gradients of `embed`'s tensors, by their names."""
    leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
    tokens = embed(**{"proj_b": None} | leaves, **options, backend=backend)
    return [tokens, *torch.autograd.grad(tokens, list(leaves.values()), cotangent)]


def filling(sizes, dtype: torch.dtype, kernel="quadrature", **options):
    """Inputs, cotangent and options of `sblu` with 16 × 16 patches; 16-bit for x, weight and y only."""
    options = {"patch_size": (16, 16), "kernel": kernel} | options
    stride = options.get("stride", (16, 16))
    grid = tuple((sizes[axis] - 16) // step + 1 for axis, step in zip(("mel_bins", "frames"), stride, strict=True))
    rest = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    tokens = (sizes["batch"], *grid, sizes["states"])
    inputs = [
        torch.randn(sizes["batch"], 1, sizes["mel_bins"], sizes["frames"], device=DEVICE).to(dtype),
        torch.rand(tokens, device=DEVICE, dtype=rest) * 2 + 0.06,
        torch.rand(tokens, device=DEVICE, dtype=rest) * 2.9 + 0.2,
        (torch.randn(sizes["states"], 1, 16, device=DEVICE) / 4).to(dtype),
    ]
    cotangent = torch.randn(*tokens[:3], 2, sizes["states"], device=DEVICE).to(dtype)
    return inputs, cotangent, options


def stem_and_input(sizes, backend: str, dtype: torch.dtype = torch.float32, **options):
    """A stem whose parameters are off their special initial values, and its input, in the order of its layout."""
    stem = AaPE(embed_dim=sizes["dim"], num_states=sizes["states"], backend=backend, **options)
    with torch.no_grad():
        for parameter in stem.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    shape = (sizes["mel_bins"], sizes["frames"])
    shape = shape if stem.layout == "FT" else shape[::-1]
    return stem.to(DEVICE, dtype), torch.randn(sizes["batch"], 1, *shape, device=DEVICE).to(dtype)


def run_stem(stem: AaPE, x, cotangent) -> list[torch.Tensor]:
    """Tokens and the gradients of x and every parameter."""
    leaf = x.detach().requires_grad_()
    tokens = stem(leaf)
    return [tokens, *torch.autograd.grad(tokens, [leaf, *stem.parameters()], cotangent)]


def check_stem(stem: AaPE, x, dtype: torch.dtype, autocast: bool = False) -> None:
    """Against the reference in float64, at the parameters and the input as they are."""
    wide = copy.deepcopy(stem).double()
    wide.backend = "reference"
    with torch.no_grad():
        shape = wide(x[:1].double()).shape
    cotangent = torch.randn(x.shape[0], *shape[1:], device=DEVICE).to(dtype)
    with torch.autocast(DEVICE.type, dtype=dtype) if autocast else contextlib.nullcontext():
        got = run_stem(stem, x, cotangent)
    want = run_stem(wide, x.double(), cotangent.double())
    names = ("x", *dict(stem.named_parameters()))
    compare(got, want, (x, *stem.parameters()), dtype, names, whole_stem=True)
