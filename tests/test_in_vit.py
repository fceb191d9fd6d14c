"""PyTorch's manners on a whole ViT with AaPE for a stem: compile, export, transforms, checkpointing, saving."""

import copy

import pytest
import torch
from known_models import hf_ast, randomised, timm_vit
from oracle import relative_error
from safetensors.torch import load_file, save_file
from torch import nn
from torch._dynamo.utils import counters
from torch.export import Dim, export
from torch.utils.checkpoint import checkpoint

from aape_kernels import AaPE, replace_stem

X = (2, 1, 32, 64)


def trained(model: nn.Module) -> nn.Module:
    """Replaced, and moved off its initial values, so that the branch counts."""
    return randomised(replace_stem(model, num_states=4, encoder_dim=8))


def gradients(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    out = model(x)
    out.square().sum().backward()
    return [out.detach(), *(parameter.grad for parameter in model.parameters() if parameter.requires_grad)]


# inductor itself calls the deprecated torch.jit.script
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.*is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    ("build", "graphs", "backend"),
    [
        (lambda **options: timm_vit(embed_layer=AaPE, **options), 1, "inductor"),
        (lambda **options: trained(timm_vit(**options)), 3, "aot_eager"),
    ],
    ids=["built", "replaced"],
)
def test_fullgraph_with_dynamic_time(build, graphs, backend):
    """Forward and backward, batch and frames dynamic. timm's own stem, which a replaced one sits in, makes a graph for
    every length. Positions are resampled in the graph; they are frozen, as PyTorch has no backward of that (bicubic,
    antialiased) for symbolic sizes."""
    torch._dynamo.reset()
    counters.clear()
    model = build(dynamic_img_size=True)
    model.pos_embed.requires_grad_(False)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, dynamic=True, backend=backend)
    for batch, frames in ((2, 96), (3, 112), (4, 160)):
        x = torch.randn(batch, 1, 32, frames)
        for got, want in zip(gradients(compiled, x), gradients(model, x), strict=True):
            assert relative_error(got, want) <= 3e-5
    assert counters["stats"]["unique_graphs"] == graphs


def test_compiled_after_replacing():
    """A model that was compiled before its stem was replaced compiles anew, and computes the branch."""
    torch._dynamo.reset()
    model, x = randomised(timm_vit()), torch.randn(X)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert relative_error(compiled(x), model(x)) <= 1e-6
    trained(model)
    assert relative_error(compiled(x), model(x)) <= 1e-6


def test_export():
    model, x = trained(timm_vit()), torch.randn(3, *X[1:])
    program = export(model, (torch.randn(X),), dynamic_shapes=({0: Dim("batch")},))
    assert relative_error(program.module()(x), model(x)) <= 1e-6


def test_gradient_checkpointing():
    """The stem itself recomputed in the backward, under autocast too, and transformers' own switch."""
    model, x = trained(timm_vit()), torch.randn(X)
    want = gradients(model, x)
    stem = model.patch_embed
    plain = stem.forward
    stem.forward = lambda x: checkpoint(plain, x, use_reentrant=False)
    for got, expected in zip(gradients(model, x), want, strict=True):
        assert torch.equal(got, expected)
    with torch.autocast("cpu", torch.bfloat16):
        stem(x).float().square().sum().backward()

    ast = trained(hf_ast()).train()
    ast.activation_checkpointing_enable()
    ast(torch.randn(2, 64, 32)).logits.sum().backward()
    assert ast.audio_spectrogram_transformer.embeddings.patch_embeddings.projection.fusion.weight.grad.any()


# functorch itself: what it calls is deprecated, and its batching rules do not cover attention
@pytest.mark.filterwarnings("ignore:`torch.jit.*is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:There is a performance drop.*scaled_dot_product:UserWarning")
def test_functional_call_and_per_sample_gradients():
    model, x = trained(timm_vit()).double(), torch.randn(3, *X[1:], dtype=torch.float64)
    parameters = dict(model.named_parameters())
    halved = {name: value.detach() / 2 for name, value in parameters.items()}
    other = copy.deepcopy(model)
    other.load_state_dict(halved)
    assert torch.equal(torch.func.functional_call(model, halved, (x,)), other(x))

    def loss(parameters, one):
        return torch.func.functional_call(model, parameters, (one[None],)).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for index in range(3):
        _, *want = gradients(model, x[index : index + 1])
        for name, expected in zip(parameters, want, strict=True):
            assert relative_error(per_sample[name][index], expected) <= 1e-11, name


def test_safetensors(tmp_path):
    model, x = trained(timm_vit()), torch.randn(X)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    other = replace_stem(timm_vit(), num_states=4, encoder_dim=8).eval()
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(other(x), model(x))
