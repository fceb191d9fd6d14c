"""A ViT with AaPE for a stem, out of Python: ONNX by the reference, and a package compiled ahead of time."""

import pytest
import torch
from known_models import hf_ast, randomised, timm_vit
from oracle import relative_error
from torch import nn
from torch.export import Dim, export

from aape_kernels import AaPE, replace_stem

# what torch.onnx and inductor themselves call of torch is deprecated
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.*is deprecated:DeprecationWarning"),
]


def vit(backend: str) -> nn.Module:
    return randomised(replace_stem(timm_vit(), num_states=4, encoder_dim=8, backend=backend))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timm", "ast", "stem-tf"])
def test_onnx(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    options = {"num_states": 4, "encoder_dim": 8, "backend": "reference"}
    if name == "timm":
        model, x = vit("reference"), torch.randn(2, 1, 32, 64)
    elif name == "ast":
        model, x = randomised(replace_stem(hf_ast(), **options)), torch.randn(2, 64, 32)
    else:
        stem = AaPE(patch_size=(4, 8), embed_dim=8, stride=(3, 5), window=10, layout="TF", **options)
        model, x = randomised(stem), torch.randn(2, 1, 20, 24)
    file = tmp_path / "model.onnx"
    sizes = ({0: Dim("batch")},)
    torch.onnx.export(model, (x,), file, dynamo=True, opset_version=18, dynamic_shapes=sizes, verbose=False)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    x = torch.randn(3, *x.shape[1:])
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    want = model(x)
    assert relative_error(torch.from_numpy(got), want if isinstance(want, torch.Tensor) else want.logits) <= 1e-5


@pytest.mark.slow
def test_compiled_ahead_of_time(tmp_path):
    """AOTInductor's package; with a compiled backend it calls the registered op, so aape_kernels must be imported."""
    model = vit("auto")
    with torch.no_grad():
        program = export(model, (torch.randn(2, 1, 32, 64),), dynamic_shapes=({0: Dim("batch", min=2, max=64)},))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        x = torch.randn(5, 1, 32, 64)
        assert relative_error(torch._inductor.aoti_load_package(package)(x), model(x)) <= 1e-5


EXPORTED = {
    "replaced": lambda: replace_stem(nn.Sequential(nn.Conv2d(1, 8, 16, 16)), path="0", layout="FT", num_states=4),
    "stem": lambda: nn.Sequential(AaPE(embed_dim=8, num_states=4, features="magnitude")),
    "overlap-tf": lambda: nn.Sequential(AaPE(embed_dim=8, num_states=4, stride=10, window=18, layout="TF")),
    "odd-narrow": lambda: nn.Sequential(AaPE((32, 50), (8, 5), embed_dim=8, num_states=4, window=3)),
    "padded": lambda: nn.Sequential(AaPE(embed_dim=8, num_states=4, dynamic_img_pad=True, output_fmt="NHWC")),
}


@pytest.mark.filterwarnings("ignore:Converting a tensor to a Python:torch.jit.TracerWarning")
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", EXPORTED)
def test_traced(name, backend):
    """By `torch.jit.trace`: runs where our ops are not, for every batch. In float64: it asks for its own 1e-5 of every
    number, and in float32 one seed in a thousand has magnitudes so alike that n keeps fewer digits."""
    model = randomised(EXPORTED[name]()).double()
    model[0].backend = backend
    traced = torch.jit.trace(model, torch.randn(2, 1, 32, 50, dtype=torch.float64))
    assert not [node for node in traced.inlined_graph.nodes() if node.kind().startswith("aape")]
    for batch in (1, 3):
        x = torch.randn(batch, 1, 32, 50, dtype=torch.float64)
        assert relative_error(traced(x), model(x)) <= 1e-12
    for size in ((32, 66), (48, 50), (32, 51)):  # for no other size: it would leave the rest of the clip out
        with pytest.raises(RuntimeError, match="expanded size of the tensor"):
            traced(torch.randn(1, 1, *size, dtype=torch.float64))


# torch.onnx itself calls what is deprecated
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
@pytest.mark.parametrize("name", EXPORTED)
def test_onnx_from_the_default_backend(name, exporter, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model, x, file = randomised(EXPORTED[name]()), torch.randn(2, 1, 32, 50), tmp_path / "model.onnx"
    if exporter == "torchscript":
        torch.onnx.export(model, (x,), file, dynamo=False, opset_version=17)
    else:
        torch.onnx.export(model, (x,), file, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert relative_error(torch.from_numpy(got), model(x)) <= 1e-5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_onnx_pads_every_length(tmp_path):
    """The padding's arithmetic is in the graph, where divisions of negative numbers round another way."""
    onnxruntime = pytest.importorskip("onnxruntime")
    model, file = randomised(EXPORTED["padded"]()), tmp_path / "model.onnx"
    dynamic = ({0: "batch", 2: "bins", 3: "frames"},)
    torch.onnx.export(model, (torch.randn(2, 1, 32, 50),), file, dynamo=True, dynamic_shapes=dynamic, verbose=False)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for shape in ((2, 1, 16, 70), (1, 1, 33, 67), (3, 1, 5, 3)):
        x = torch.randn(*shape)
        (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        assert relative_error(torch.from_numpy(got), model(x)) <= 1e-5


class Doubled(AaPE):
    def forward(self, x):
        return 2 * super().forward(x)


def test_fx_runs_hooks_and_subclasses_once():
    stem, x = AaPE(embed_dim=8), torch.randn(2, 1, 32, 50)
    stem.register_forward_pre_hook(lambda module, given: (3 * given[0],))
    stem.register_forward_hook(lambda module, given, out: 2 * out)
    for model in (nn.Sequential(stem), nn.Sequential(Doubled(embed_dim=8))):
        assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))
    with pytest.raises(TypeError, match=r"torch\.fx: expected a model that holds the stem"):
        torch.fx.symbolic_trace(AaPE(embed_dim=8))


@pytest.mark.parametrize("name", EXPORTED)
def test_a_leaf_for_fx(name):
    model = nn.Sequential(randomised(EXPORTED[name]()), nn.GELU())
    traced = torch.fx.symbolic_trace(model)
    targets = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert targets == ["0.0", "1"]
    x = torch.randn(2, 1, 32, 50)
    assert torch.equal(traced(x), model(x))


def test_scripting_is_refused():
    with pytest.raises(NotImplementedError, match=r"torch\.jit\.trace\(model, x\) works"):
        torch.jit.script(nn.Sequential(AaPE(embed_dim=8)))
