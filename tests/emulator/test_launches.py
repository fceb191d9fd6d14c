"""What a step of the stem launches on a GPU, counted on the CPU: PyTorch's operators and the CUDA kernels, in order."""

import on_tensor_cores
import pytest
import torch
from emulated import compiler, use
from torch.utils._python_dispatch import TorchDispatchMode

from aape_kernels import AaPE
from aape_kernels.backends import cuda
from aape_kernels.geometry import PatchGrid

pytestmark = pytest.mark.skipif(compiler() is None, reason="no host compiler was found")

KERNELS = (
    "stem", "warp_stem", "warp_tokens", "warp_stem_backward", "gradients", "sblu", "warp_sblu_backward",
    "sblu_backward_states", "sblu_backward_weight", "sblu_backward_windows", "overlap_add", "gather", "standardise",
)  # fmt: skip
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty"}


class Launches(TorchDispatchMode):
    """The names of operators that do something with memory, and of the native module's kernels."""

    def __init__(self, monkeypatch, module) -> None:
        super().__init__()
        self.names: list[str] = []
        for name in KERNELS:
            monkeypatch.setattr(module, name, self.named(name, getattr(module, name)))

    def named(self, name, kernel):
        def run(*arguments):
            done = kernel(*arguments)
            if done is not False:  # one that cannot do it
                self.names.append(name)
            return done

        return run

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition("::")[2]
        if not func.is_view and name not in ALLOCATIONS and name != "_unsafe_view":
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def step(monkeypatch, module, stem):
    """What a forward and a backward launch, each."""
    use(monkeypatch, module)
    x = torch.randn(2, 1, 32, 48).to(stem.proj.weight.dtype)
    weights, options = on_tensor_cores.arguments_of(stem)
    counted = Launches(monkeypatch, module)
    with torch.no_grad(), counted:
        tokens, r, hidden = cuda.embed(x, weights, *options)
        forward, counted.names = counted.names, []
        cuda.embed_backward(torch.ones_like(tokens), x, weights, r, hidden, *options, [False] + [True] * 8)
    return forward, [name for name in counted.names if name != "ones_like"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_training_step(emulated_module, monkeypatch, dtype):
    """Weights side by side, one kernel and one product; a product, one kernel, two products and their gradients."""
    stem = on_tensor_cores.stem_of(dtype, embed_dim=24)
    forward, backward = step(monkeypatch, emulated_module, stem)
    assert forward == ["warp_stem", "cat", "addmm"]
    assert backward == ["mm", "warp_stem_backward", "mm", "mm", "gradients"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_training_step_whose_tokens_are_made_by_one_kernel(emulated_module, monkeypatch, dtype):
    """After one that sets out the product's weights."""
    stem = on_tensor_cores.stem_of(dtype, embed_dim=32)
    forward, backward = step(monkeypatch, emulated_module, stem)
    assert forward == ["warp_tokens"]
    assert backward == ["mm", "warp_stem_backward", "mm", "mm", "gradients"]


def test_a_training_step_that_is_not_on_tensor_cores(emulated_module, monkeypatch):
    """The backward in steps: the features' cotangent, that of r, the encoder, the projection, the product."""
    forward, backward = step(monkeypatch, emulated_module, AaPE(embed_dim=24, encoder_dim=70))
    assert forward == ["stem", "cat", "addmm"]
    kernels = {"sblu", "sblu_backward_states", "sblu_backward_weight", "gather"}
    assert [name for name in backward if name in kernels] == [
        "sblu", "sblu_backward_states", "sblu_backward_weight", "gather",
    ]  # fmt: skip
    assert len(backward) == 17, backward


def test_a_step_of_sblu_alone(emulated_module, monkeypatch):
    """One kernel forward; backward one, which x's gradient is written by, and the sum over its blocks."""
    use(monkeypatch, emulated_module)
    grid, tokens = PatchGrid((16, 16), (16, 16), 16), (2, 2, 3, 8)
    inputs = torch.randn(2, 1, 32, 48), torch.rand(tokens), torch.rand(tokens), torch.randn(8, 1, 16)
    counted = Launches(monkeypatch, emulated_module)
    with torch.no_grad(), counted:
        y = cuda.sblu(*inputs, grid, True)
        forward, counted.names = counted.names, []
        cuda.sblu_backward(y, *inputs, grid, True, [True] * 4)
    assert forward == ["sblu"]
    assert counted.names == ["warp_sblu_backward", "sum"]
