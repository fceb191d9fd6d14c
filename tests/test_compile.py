"""torch.compile, export, and the functional transforms.

Inductor spends half a minute of C++ compiling on a stem, so it runs once; what is asked of the traced graph (no break,
how many) is asked with `aot_eager`, which traces forward and backward all the same.
"""

import copy

import pytest
import torch
from oracle import relative_error
from torch._dynamo.utils import counters
from torch.export import Dim, export

from aape_kernels import AaPE, sblu
from aape_kernels.backends import cpu

NEEDS_NATIVE = pytest.mark.skipif(not cpu.NATIVE_BUILT, reason="the native module was not built")

OPTIONS = {
    "default": {},
    "overlap": {"stride": (10, 10)},
    "long-window-tf": {"window": 18, "layout": "TF"},
    "narrow-bilateral": {"window": 8, "kernel": "bilateral"},
}


@pytest.fixture(autouse=True, params=["reference", pytest.param("cpu", marks=NEEDS_NATIVE)])
def _fresh_compiler(request, monkeypatch):
    monkeypatch.setenv("AAPE_BACKEND", request.param)
    torch._dynamo.reset()
    counters.clear()


def step(stem, x):
    stem.zero_grad()
    tokens = stem(x)
    tokens.square().sum().backward()
    return [tokens.detach(), *(parameter.grad for parameter in stem.parameters())]


def check(compiled, stem, x):
    for got, want in zip(step(compiled, x), step(stem, x), strict=True):
        assert relative_error(got, want) <= 3e-5


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_fullgraph_forward_and_backward(options):
    stem = AaPE(embed_dim=16, num_states=4, encoder_dim=8, **options)
    compiled = torch.compile(copy.deepcopy(stem), fullgraph=True, backend="aot_eager")
    check(compiled, stem, torch.randn(2, 1, 64, 80))


# inductor itself calls the deprecated torch.jit.script
@pytest.mark.filterwarnings("ignore:`torch.jit.*is deprecated:DeprecationWarning")
def test_inductor_forward_and_backward():
    stem = AaPE(embed_dim=16, num_states=4, encoder_dim=8)
    compiled = torch.compile(copy.deepcopy(stem), fullgraph=True, dynamic=True)
    check(compiled, stem, torch.randn(2, 1, 64, 80))
    check(compiled, stem, torch.randn(3, 1, 64, 112))
    assert counters["stats"]["unique_graphs"] == 1


def test_one_graph_for_every_batch_and_length():
    stem = AaPE(embed_dim=16, num_states=4, encoder_dim=8)
    compiled = torch.compile(copy.deepcopy(stem), fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (2, 3, 8):
        for frames in (512, 1024):
            check(compiled, stem, torch.randn(batch, 1, 128, frames))
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(
    "sizes",
    [[(2, 512), (3, 512), (8, 512)], [(2, 512), (2, 1024), (2, 752)], [(2, 512), (3, 1024), (8, 512), (3, 512)]],
    ids=["batch", "frames", "both"],
)
def test_at_most_two_graphs_by_default(sizes):
    """A size that changes costs one more graph; PyTorch marks both as dynamic at once if they change at once."""
    stem = AaPE(embed_dim=16, num_states=4, encoder_dim=8)
    compiled = torch.compile(copy.deepcopy(stem), fullgraph=True, backend="aot_eager")
    for batch, frames in sizes:
        check(compiled, stem, torch.randn(batch, 1, 128, frames))
    assert counters["stats"]["unique_graphs"] <= 2


def test_autocast_compiles():
    stem, x = AaPE(embed_dim=16, num_states=4), torch.randn(2, 1, 32, 64)
    compiled = torch.compile(stem, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, want = compiled(x), stem(x)
    assert got.dtype == torch.bfloat16
    assert relative_error(got, want) <= 8e-3


def test_sblu_compiles():
    x, decay, weight = torch.randn(2, 1, 32, 64), torch.rand(2, 2, 4, 3), torch.randn(3, 1, 16)
    compiled = torch.compile(sblu, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(x, decay, 2 * decay, weight), sblu(x, decay, 2 * decay, weight)) <= 2e-6


def test_export_with_dynamic_batch_and_frames():
    stem = AaPE(embed_dim=16, num_states=4)
    sizes = {0: Dim("batch"), 3: 16 * Dim("patches", min=2, max=256)}
    program = export(stem, (torch.randn(2, 1, 128, 512),), dynamic_shapes={"x": sizes})
    x = torch.randn(3, 1, 128, 704)
    assert relative_error(program.module()(x), stem(x)) <= 1e-6


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_export_finds_dynamic_sizes(options):
    stem = AaPE(embed_dim=16, num_states=4, **options)
    x = torch.randn(2, 1, 130, 131)
    program = export(stem, (x,), dynamic_shapes={"x": {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}})
    x = torch.randn(5, 1, 96, 203)
    assert relative_error(program.module()(x), stem(x)) <= 1e-6


# the reference's unfold has no batching rule for its backward: slower there, and right
@pytest.mark.filterwarnings("ignore:There is a performance drop.*unfold_backward:UserWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.*is deprecated:DeprecationWarning")
def test_functional_call_and_vmap():
    stem = AaPE(embed_dim=16, num_states=4).double()
    parameters = dict(stem.named_parameters())
    x = torch.randn(3, 2, 1, 32, 48, dtype=torch.float64)
    scaled = {name: value * 0.5 for name, value in parameters.items()}
    halved = copy.deepcopy(stem)
    halved.load_state_dict(scaled)
    assert torch.equal(torch.func.functional_call(stem, scaled, (x[0],)), halved(x[0]))

    got = torch.func.vmap(stem)(x)
    assert relative_error(got, torch.stack([stem(one) for one in x])) <= 1e-14

    def loss(parameters, x):
        return torch.func.functional_call(stem, parameters, (x,)).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for index in range(3):
        stem.zero_grad()
        stem(x[index]).square().sum().backward()
        for name, value in stem.named_parameters():
            assert relative_error(per_sample[name][index], value.grad) <= 1e-13


# functorch itself calls the deprecated torch.jit.script
@pytest.mark.filterwarnings("ignore:`torch.jit.*is deprecated:DeprecationWarning")
def test_forward_mode_through_the_reference():
    stem = AaPE(embed_dim=16, num_states=4, backend="reference").double()
    x = torch.randn(1, 2, 1, 32, 48, dtype=torch.float64)
    tangent = torch.randn_like(x[0])
    _, got = torch.func.jvp(stem, (x[0],), (tangent,))
    step = 1e-6
    want = (stem(x[0] + step * tangent) - stem(x[0] - step * tangent)) / (2 * step)
    assert relative_error(got, want) <= 1e-7
