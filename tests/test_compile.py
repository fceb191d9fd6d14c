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
from torch.utils import _pytree as pytree

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


# The reference's graph takes a minute of C++ compiling; inductor itself calls the deprecated torch.jit.script.
@pytest.mark.slow
@pytest.mark.parametrize(
    "_fresh_compiler",
    [pytest.param("reference", marks=pytest.mark.exhaustive), pytest.param("cpu", marks=NEEDS_NATIVE)],
    indirect=True,
)
@pytest.mark.filterwarnings("ignore:`torch.jit.*is deprecated:DeprecationWarning")
def test_inductor_forward_and_backward():
    stem = AaPE(embed_dim=16, num_states=4, encoder_dim=8)
    compiled = torch.compile(copy.deepcopy(stem), fullgraph=True, dynamic=True)
    check(compiled, stem, torch.randn(2, 1, 64, 80))
    check(compiled, stem, torch.randn(3, 1, 64, 112))
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
def test_one_graph_for_every_batch_and_length():
    stem = AaPE(embed_dim=16, num_states=4, encoder_dim=8)
    compiled = torch.compile(copy.deepcopy(stem), fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (2, 3, 8):
        for frames in (128, 256):
            check(compiled, stem, torch.randn(batch, 1, 32, frames))
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param([(2, 128), (3, 128), (8, 128)], id="batch", marks=pytest.mark.slow),
        pytest.param([(2, 128), (2, 256), (2, 176)], id="frames", marks=pytest.mark.slow),
        pytest.param([(2, 128), (3, 256), (8, 128), (3, 128)], id="both"),
    ],
)
def test_at_most_two_graphs_by_default(sizes):
    """A size that changes costs one more graph; PyTorch marks both as dynamic at once if they change at once."""
    stem = AaPE(embed_dim=16, num_states=4, encoder_dim=8)
    compiled = torch.compile(copy.deepcopy(stem), fullgraph=True, backend="aot_eager")
    for batch, frames in sizes:
        check(compiled, stem, torch.randn(batch, 1, 32, frames))
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


def test_vmap_over_nothing():
    stem = AaPE(embed_dim=16, num_states=4)
    assert torch.func.vmap(stem)(torch.randn(0, 2, 1, 32, 48)).shape == (0, 2, 6, 16)


@pytest.mark.parametrize("form", ["NLC", "NCHW"])
def test_compiled_tokens_are_the_callers_to_write_on(form):
    stem = AaPE(embed_dim=16, num_states=4, output_fmt=form)
    x = torch.randn(2, 1, 32, 48)

    def masked(x):
        tokens = stem(x)
        tokens.masked_fill_(tokens.detach() > 0, 0.5)
        tokens[[1]] = 0.5 * tokens[[1]]
        return tokens

    assert relative_error(torch.compile(masked, backend="aot_eager", fullgraph=True)(x), masked(x)) <= 1e-6


@NEEDS_NATIVE  # the reference's is torch's, which autocast does change
def test_a_double_backward_under_autocast_keeps_the_forwards_precision():
    stem = AaPE(embed_dim=16, num_states=4, backend="cpu")

    def second(cast):
        x = torch.randn(2, 1, 32, 48, generator=torch.Generator().manual_seed(0)).requires_grad_()
        (gradient,) = torch.autograd.grad(stem(x).square().sum(), x, create_graph=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            return torch.autograd.grad(gradient.square().sum(), x)[0]

    assert relative_error(second(True), second(False)) <= 1e-6


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


def transforms(stem):
    """Functions of x that `torch.func` makes of a stem; the loss's parameters require grad, as a model's do."""

    def loss(x):
        return stem(x).square().sum()

    def few(x):
        return stem(x).sum((0, 1))[:3]

    return {
        "grad": torch.func.grad(loss),
        "vjp": lambda x: torch.func.vjp(stem, x)[1](torch.ones_like(stem(x)))[0],
        "jacrev": torch.func.jacrev(few),
        "vmap-grad": lambda x: torch.func.vmap(torch.func.grad(loss))(x.unsqueeze(1)),
        "grad-grad": torch.func.grad(lambda x: torch.func.grad(loss)(x).square().sum()),
        "grad-by-parameters": lambda x: torch.func.grad(
            lambda parameters: torch.func.functional_call(stem, parameters, (x,)).square().sum()
        )({name: value.detach() for name, value in stem.named_parameters()}),
    }


FUNCTIONAL = ["grad", "vjp", "jacrev", "vmap-grad", "grad-grad", "grad-by-parameters"]


# dynamo looks at .grad of what it traces
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:There is a performance drop.*:UserWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.*is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    ("_fresh_compiler", "compiled"),
    [
        pytest.param("reference", False, id="reference-eager"),
        pytest.param("cpu", False, marks=NEEDS_NATIVE, id="cpu-eager"),
        # what is compiled here are PyTorch's own operations alone
        pytest.param("reference", True, marks=[pytest.mark.slow, pytest.mark.exhaustive], id="reference-compiled"),
        pytest.param("cpu", True, marks=[pytest.mark.slow, NEEDS_NATIVE], id="cpu-compiled"),
    ],
    indirect=["_fresh_compiler"],
)
@pytest.mark.parametrize("name", FUNCTIONAL)
def test_gradients_through_functional_transforms(name, compiled):
    """Against the reference without a compiler; a compiler may look through the Functions at the ops alone."""
    stem = AaPE(embed_dim=6, patch_size=8, num_states=4, encoder_dim=4).double()
    plain = copy.deepcopy(stem)
    plain.backend = "reference"
    x = torch.randn(2, 1, 16, 24, dtype=torch.float64)
    function = transforms(stem)[name]
    got = (torch.compile(function, backend="aot_eager") if compiled else function)(x)
    want = transforms(plain)[name](x)
    for one, other in zip(pytree.tree_leaves(got), pytree.tree_leaves(want), strict=True):
        assert other.abs().max() > 0
        assert relative_error(one, other) <= 1e-10


@pytest.mark.parametrize("what", ["sblu", "stem"])
def test_gradients_of_exported_programs(what):
    """They hold the ops, without the Functions around them."""
    stem = AaPE(embed_dim=6, patch_size=8, num_states=4, encoder_dim=4).double()
    x = torch.randn(2, 1, 16, 24, dtype=torch.float64)
    model = stem if what == "stem" else Filters(stem.sblu.weight.detach().clone())
    exported = export(model, (x,)).module()
    exported(x).square().sum().backward()
    model(x).square().sum().backward()
    got = {name: value.grad for name, value in exported.named_parameters()}
    assert got.keys() == dict(model.named_parameters()).keys()
    for name, value in model.named_parameters():
        assert relative_error(got[name], value.grad) <= 1e-12


class Filters(torch.nn.Module):
    """SBLU of fixed filters."""

    def __init__(self, weight):
        super().__init__()
        self.weight = torch.nn.Parameter(weight)

    def forward(self, x):
        decay = x.new_full((2, 2, 3, 4), 0.5)
        frequency = x.new_full((2, 2, 3, 4), 1.5)
        return sblu(x, decay, frequency, self.weight, patch_size=8)


# functorch itself calls the deprecated torch.jit.script
@pytest.mark.filterwarnings("ignore:`torch.jit.*is deprecated:DeprecationWarning")
def test_third_derivatives():
    stem = AaPE(embed_dim=2, patch_size=4, num_states=2, encoder_dim=2).double()
    x = torch.randn(1, 1, 4, 4, dtype=torch.float64)
    along = torch.randn_like(x)

    def derivative(of, x):
        return (torch.func.grad(of)(x) * along).sum()

    def third(x):
        return derivative(lambda x: derivative(lambda x: derivative(lambda x: stem(x).square().sum(), x), x), x)

    def second(x):
        return derivative(lambda x: derivative(lambda x: stem(x).square().sum(), x), x)

    step = 1e-5
    want = (second(x + step * along) - second(x - step * along)) / (2 * step)
    assert relative_error(third(x), want) <= 1e-5
