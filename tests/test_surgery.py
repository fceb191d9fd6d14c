"""replace_stem and revert_stem on every known model: the same output before training, and what training then moves."""

import copy
import pickle
import re

import pytest
import torch
from known_models import ROWS, Row, logits, randomised, timm_vit
from oracle import relative_error
from torch import nn

from aape_kernels import AaPE, replace_stem, revert_stem
from aape_kernels.surgery import AaPEConv2d

BRANCH = {"encoder.w1", "encoder.b1", "encoder.w2", "encoder.b2", "sblu.weight", "fusion.weight"}


@pytest.fixture(params=ROWS.values(), ids=ROWS.keys())
def row(request) -> Row:
    return request.param


def stem_input(model: nn.Module, row: Row, x: torch.Tensor) -> torch.Tensor:
    """What the model feeds its stem with."""
    seen = []
    handle = model.get_submodule(row.stem).register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    model(x)
    handle.remove()
    return seen[0]


@torch.no_grad()
def test_output_stays_what_it_was(row):
    model, x = randomised(row.build()), torch.randn(row.x)
    into = stem_input(model, row, x)

    def outputs():
        stem, autocast = model.get_submodule(row.stem), torch.autocast("cpu", torch.bfloat16)
        with autocast:
            rounded = stem(into)
        return stem(into), logits(model, x), rounded

    before = outputs()
    assert replace_stem(model) is model
    after = outputs()
    stem = model.get_submodule(row.conv)
    assert isinstance(stem, AaPEConv2d)
    assert (stem.layout, stem.stride) == (row.layout, row.stride)
    assert stem.window == stem.kernel_size[1 if row.layout == "FT" else 0]
    assert after[0].shape == before[0].shape == row.tokens
    assert relative_error(after[0], before[0]) <= 1e-6
    assert relative_error(after[1], before[1]) <= 1e-5
    assert after[2].dtype == before[2].dtype == torch.bfloat16
    assert relative_error(after[2], before[2]) <= 4e-3


def test_a_checkpoint_of_the_model_loads(row):
    checkpoint = randomised(row.build()).state_dict()
    model = replace_stem(row.build())
    left = model.load_state_dict(checkpoint, strict=False)
    assert not left.unexpected_keys
    assert set(left.missing_keys) == {f"{row.conv}.{name}" for name in BRANCH}
    state = model.state_dict()
    for name, value in checkpoint.items():
        assert torch.equal(state[name], value), name


def test_the_first_step_moves_the_fusion_weights(row):
    model, x = replace_stem(randomised(row.build()), num_states=4), torch.randn(row.x)
    fusion = model.get_submodule(row.conv).fusion.weight
    assert not fusion.any()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    logits(model, x).square().sum().backward()
    optimiser.step()
    assert fusion.grad.any()
    assert fusion.any()
    # the encoder and the filters learn from then on
    optimiser.zero_grad()
    logits(model, x).square().sum().backward()
    for name, parameter in model.get_submodule(row.conv).named_parameters():
        assert parameter.grad.any(), name


@torch.no_grad()
def test_revert(row):
    model, x = randomised(row.build()), torch.randn(row.x)
    before, state, parameters = logits(model, x), model.state_dict(), list(model.parameters())
    words = repr(model)
    assert revert_stem(replace_stem(model)) is model
    assert torch.equal(logits(model, x), before)
    assert list(model.state_dict()) == list(state)
    assert all(now is then for now, then in zip(model.parameters(), parameters, strict=True))
    assert repr(model) == words
    assert not model.get_submodule(row.conv).training
    with pytest.raises(ValueError, match="model: expected one with a stem that replace_stem put there"):
        revert_stem(model)


@pytest.mark.parametrize("layout", ["FT", "TF"])
def test_it_computes_what_aape_computes(layout):
    """Fusion not zero: the module in the convolution's place against AaPE itself, tokens, analyse and gradients."""
    patch, size = ((6, 4), (19, 21)) if layout == "FT" else ((4, 6), (21, 19))
    model = nn.ModuleDict({"stem": nn.Conv2d(2, 24, patch, (5, 3))}).double()
    replace_stem(model, path="stem", layout=layout, num_states=3)
    got = model["stem"]
    nn.init.normal_(got.fusion.weight)
    want = AaPE(patch_size=patch, in_chans=2, embed_dim=24, stride=(5, 3), num_states=3, layout=layout).double()
    state = {f"proj.{name}" if "." not in name else name: value for name, value in got.state_dict().items()}
    want.load_state_dict(state)
    x = torch.randn(2, 2, *size, dtype=torch.float64)
    tokens = got(x).flatten(2).transpose(1, 2)
    assert torch.equal(tokens, want(x))
    assert tokens.is_contiguous()
    assert got(x).shape == nn.Conv2d(2, 24, patch, (5, 3)).double()(x).shape
    for one, other in zip(got.analyse(x), want.analyse(x), strict=True):
        assert torch.equal(one, other)
    assert got.no_weight_decay() == {"bias", "encoder.b1", "encoder.b2"}
    for stem in (got, want):
        stem(x).square().sum().backward()
    for (_, one), (_, other) in zip(got.named_parameters(), want.named_parameters(), strict=True):
        assert relative_error(one.grad, other.grad) <= 1e-12


@torch.no_grad()
def test_into_a_model_that_timm_builds_with_aape():
    trained = randomised(replace_stem(timm_vit()))
    model = timm_vit(embed_layer=AaPE).eval()
    model.load_state_dict(trained.state_dict())
    x = torch.randn(2, 1, 32, 64)
    assert relative_error(model(x), trained(x)) <= 1e-6


def test_what_is_kept():
    model = timm_vit().to(torch.bfloat16).train()
    model.patch_embed.proj.requires_grad_(False)
    weight = model.patch_embed.proj.weight
    replace_stem(model, num_states=4)
    stem = model.patch_embed.proj
    assert stem.weight is weight
    assert {parameter.dtype for parameter in stem.parameters()} == {torch.bfloat16}
    assert stem.training
    assert {name for name, parameter in stem.named_parameters() if parameter.requires_grad} == BRANCH
    assert (stem.in_channels, stem.out_channels, stem.kernel_size, stem.stride) == (1, 32, (16, 16), (16, 16))
    assert not replace_stem(timm_vit().eval()).patch_embed.proj.encoder.training


def test_on_the_meta_device():
    with torch.device("meta"):
        model = timm_vit()
    replace_stem(model)
    assert all(parameter.is_meta for parameter in model.parameters())
    model.to_empty(device="cpu")
    model.patch_embed.proj.reset_parameters()
    assert all(parameter.isfinite().all() for parameter in model.patch_embed.parameters())


def test_hooks_move_along():
    """Those on the convolution see the same shapes as before, do not see the check, and their handles remove them."""
    model, seen = timm_vit(), []
    outer = model.patch_embed.register_forward_hook(lambda module, given, out: seen.append(out.shape))
    inner = model.patch_embed.proj.register_forward_hook(lambda module, given, out: seen.append(out.shape))
    replace_stem(model)
    assert seen == []
    model(torch.randn(2, 1, 32, 64))
    assert seen == [(2, 32, 2, 4), (2, 8, 32)]
    outer.remove()
    inner.remove()
    model(torch.randn(2, 1, 32, 64))
    assert len(seen) == 2


def test_hooks_of_loading_move_along():
    """torch wraps them with a reference to the module they were registered on, which nobody else holds any more."""
    model, seen = nn.Sequential(nn.Conv2d(1, 8, 16, 16)), []
    model[0].register_load_state_dict_pre_hook(lambda module, *_: seen.append(module))
    replace_stem(model, path="0", layout="FT").load_state_dict(model.state_dict())
    assert seen == [model[0]]
    revert_stem(model).load_state_dict(model.state_dict())
    assert seen[1:] == [model[0]]


class Marked(nn.Conv2d):
    """Nothing of its own."""


def test_called_like_the_convolution():
    model, x = nn.Sequential(Marked(1, 8, 16, 16)), torch.randn(1, 1, 16, 32)
    want = model[0](input=x)
    replace_stem(model, path="0", layout="FT")
    assert relative_error(model[0](input=x), want) <= 1e-6
    assert type(type(model[0])(in_channels=1, out_channels=8, kernel_size=16)) is nn.Conv2d
    assert type(revert_stem(model)[0]) is Marked
    assert torch.equal(model[0](input=x), want)


def test_a_stem_that_is_not_its_own_is_not_reverted():
    """Offloaded, as accelerate does: the weight is elsewhere until its own forward brings it back."""
    model = replace_stem(nn.Sequential(nn.Conv2d(1, 8, 16, 16)), path="0", layout="FT")
    stem = model[0]
    stem.forward = lambda x: AaPEConv2d.forward(stem, x)
    with pytest.raises(ValueError, match=r"model: expected a stem with .* its class's forward, neither offloaded"):
        revert_stem(model)
    assert model[0] is stem


@torch.no_grad()
def test_copies():
    model, x = randomised(replace_stem(timm_vit())), torch.randn(1, 1, 32, 64)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
        assert other.patch_embed.proj.weight is not model.patch_embed.proj.weight
        assert other.patch_embed.proj.proj is other.patch_embed.proj
        assert isinstance(revert_stem(other).patch_embed.proj, nn.Conv2d)


def by_type(module: nn.Module) -> None:
    """How models without a method for it are initialised: `model.apply` on torch's own types."""
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.LayerNorm)):
        module.weight.data.fill_(0.5)


@pytest.mark.parametrize(
    ("name", "initialise"),
    [
        ("timm", lambda model: model.init_weights()),
        ("hf-ast", lambda model: model.init_weights()),
        ("hf-vit", lambda model: model.init_weights()),
        ("torchvision", lambda model: model.apply(by_type)),
    ],
    ids=["timm", "hf-ast", "hf-vit", "torchvision"],
)
def test_initial_values_survive(name, initialise):
    """What is initialised afresh with a model is none of the branch's, or is what it was."""
    row = ROWS[name]
    model = replace_stem(row.build(), num_states=4)
    stem = model.get_submodule(row.conv)
    initialise(model)
    assert not stem.fusion.weight.any()
    share = (torch.arange(4) + 0.5) / 4
    torch.testing.assert_close(torch.sigmoid(stem.encoder.b2), torch.cat([torch.full((4,), 0.5), share]))
    assert stem.encoder.w1.abs().max() <= 1 / stem.encoder.w1[0].numel() ** 0.5
    assert stem.encoder.w2.std().item() == pytest.approx(0.02, rel=0.2)


def test_marks_on_the_convolution_stay():
    """Libraries write on modules, as transformers does `_is_hf_initialized`; a compiled call of the old one must go."""
    model = nn.Sequential(nn.Conv2d(1, 8, 16, 16))
    model[0].mark = 5
    model[0].compile(backend="eager")
    replace_stem(model, path="0", layout="FT")
    assert model[0].mark == 5
    nn.init.normal_(model[0].fusion.weight)
    x = torch.randn(1, 1, 16, 32)
    assert torch.equal(model(x), model[0].forward(x))
    assert revert_stem(model)[0].mark == 5


def test_in_a_compiled_model():
    model = nn.Sequential(nn.Conv2d(1, 8, 16, 16))
    compiled, x = torch.compile(model, backend="eager"), torch.randn(1, 1, 16, 32)
    compiled(x)
    replace_stem(compiled, path="_orig_mod.0", layout="FT")
    nn.init.normal_(model[0].fusion.weight)
    assert torch.equal(compiled(x), model(x))


def test_a_stem_inside_another_model():
    """Lightning modules, classifiers, wrappers: the stem is found at any depth, and where it is shared, at each."""
    backbone = timm_vit()
    model = nn.ModuleDict({"student": backbone, "head": nn.Linear(5, 2)})
    model["again"] = nn.Module()
    model["again"].conv = backbone.patch_embed.proj
    replace_stem(model)
    assert isinstance(backbone.patch_embed.proj, AaPEConv2d)
    assert model["again"].conv is backbone.patch_embed.proj
    revert_stem(model)
    assert model["again"].conv is backbone.patch_embed.proj


def test_several_stems_need_a_path():
    model = nn.ModuleDict({"a": timm_vit(), "b": timm_vit()})
    with pytest.raises(ValueError, match=r"path: expected one of 'a\.patch_embed\.proj', 'b\.patch_embed\.proj'"):
        replace_stem(model)
    replace_stem(model, path="b.patch_embed")
    assert isinstance(model["a"].patch_embed.proj, nn.Conv2d)
    assert isinstance(model["b"].patch_embed.proj, AaPEConv2d)
    replace_stem(model, path="a", layout="TF")
    assert model["a"].patch_embed.proj.layout == "TF"
    assert revert_stem(model) is model
    assert not any(isinstance(module, AaPE) for module in model.modules())


class Scaled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Masked(nn.Conv2d):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("mask", torch.ones(1))


class Called(nn.Conv2d):
    def __call__(self, x):
        return 2 * super().__call__(x)


class WithTokens(nn.Conv2d):
    def tokens(self, x):
        return self(x).flatten(2)


def with_attribute(name, value) -> nn.Module:
    conv = nn.Conv2d(1, 8, 16, 16)
    setattr(conv, name, value)
    return other(stem=conv)


def other(**convolutions) -> nn.Module:
    return nn.ModuleDict(convolutions)


def parametrised() -> nn.Module:
    return other(stem=nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 8, 16, 16)))


CONV = nn.Conv2d(1, 8, 16, 16)
BY_PATH = {"path": "stem", "layout": "FT"}
ERRORS = {
    "no-module": (lambda: [1], {}, TypeError, "model: expected an nn.Module, got list"),
    "unknown": (
        lambda: other(stem=CONV, later=nn.Conv2d(8, 8, 3)),
        {},
        ValueError,
        r"model: expected a ViT, whose one nn.Conv2d makes the tokens, got ModuleDict: it has others beside 'stem' "
        r"\('later'\); if that makes the tokens, name it by path",
    ),
    "itself": (lambda: CONV, {"path": "", "layout": "FT"}, ValueError, "path: expected that of an nn.Conv2d in Conv2d"),
    "twice": (lambda: replace_stem(timm_vit()), {}, ValueError, "model: expected one whose stem is an nn.Conv2d"),
    "no-path": (
        lambda: other(stem=CONV),
        {"path": "embed", "layout": "FT"},
        ValueError,
        r"path: expected that of an nn.Conv2d .*got 'embed' \(no module\); there are: 'stem'",
    ),
    "path-of-none": (
        lambda: other(stem=nn.Linear(2, 2)),
        BY_PATH,
        ValueError,
        r"path: .*got 'stem' \(Linear with 0 of them\); there are: none",
    ),
    "path-of-two": (
        lambda: other(stem=nn.Sequential(CONV, nn.Conv2d(8, 8, 1))),
        BY_PATH,
        ValueError,
        r"path: .*\(Sequential with 2 of them\)",
    ),
    "path-type": (lambda: other(stem=CONV), {"path": 3}, TypeError, "path: expected a str .*, got 3"),
    "no-layout": (
        lambda: other(stem=CONV),
        {"path": "stem"},
        ValueError,
        r"layout: expected one of FT, TF, as nothing tells in which order ModuleDict feeds 'stem' with mel bins",
    ),
    "layout": (timm_vit, {"layout": "BTF"}, ValueError, "layout: expected one of FT, TF, got 'BTF'"),
    "settled-by-the-model": (timm_vit, {"img_size": 32}, TypeError, "img_size: expected to be left out"),
    "settled-by-the-conv": (timm_vit, {"patch_size": 8}, TypeError, "patch_size: expected to be left out"),
    "option": (timm_vit, {"num_states": 0}, ValueError, "num_states: expected at least 1, got 0"),
    "padding": (lambda: other(stem=nn.Conv2d(1, 8, 3, padding=1)), BY_PATH, ValueError, "conv: expected padding"),
    "frame-stride": (lambda: other(stem=nn.Conv2d(1, 8, 3)), BY_PATH, ValueError, "band: expected"),
    "other-forward": (
        lambda: other(stem=Scaled(1, 8, 16, 16)),
        BY_PATH,
        ValueError,
        "model: expected 'stem' to be an nn.Conv2d with a weight of its own .*got Scaled",
    ),
    "other-call": (lambda: other(stem=Called(1, 8, 16, 16)), BY_PATH, ValueError, "no forward but .*got Called"),
    "more-than-a-weight": (
        lambda: other(stem=Masked(1, 8, 16, 16)),
        BY_PATH,
        ValueError,
        "model: expected 'stem' to hold weight and bias alone, got Masked with 'mask' too",
    ),
    "method": (
        lambda: other(stem=WithTokens(1, 8, 16, 16)),
        BY_PATH,
        ValueError,
        "model: expected 'stem' to have what an nn.Conv2d has, got WithTokens with 'tokens' too",
    ),
    "name-that-is-ours": (
        lambda: with_attribute("norm", None),
        BY_PATH,
        ValueError,
        "model: expected 'stem' without an attribute 'norm', which AaPE has for itself",
    ),
    "property-that-is-ours": (lambda: with_attribute("proj", 3), BY_PATH, ValueError, "without an attribute 'proj'"),
    "parametrised": (parametrised, BY_PATH, ValueError, "model: expected 'stem' to be .*got ParametrizedConv2d"),
    "lazy": (lambda: other(stem=nn.LazyConv2d(8, 16, 16)), BY_PATH, ValueError, "got LazyConv2d"),
}


@pytest.mark.parametrize(("build", "options", "error", "words"), ERRORS.values(), ids=ERRORS.keys())
def test_errors_leave_the_model_as_it_was(build, options, error, words):
    model = build()
    modules = list(model.modules()) if isinstance(model, nn.Module) else None
    with pytest.raises(error, match=words):
        replace_stem(model, **options)
    if modules is not None:
        assert all(now is then for now, then in zip(model.modules(), modules, strict=True))


def test_another_output_shape_leaves_the_model_as_it_was(monkeypatch):
    model = timm_vit()
    monkeypatch.setattr(AaPEConv2d, "forward", lambda stem, x: AaPE.forward(stem, x).flatten(2))
    with pytest.raises(RuntimeError, match=re.escape("expected output (1, 32, 2, 3), the old stem's, got (1, 32, 6)")):
        replace_stem(model)
    assert type(model.patch_embed.proj) is nn.Conv2d
