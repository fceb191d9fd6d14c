"""The stem's parts as modules among modules: whatever people register on them, or put in their place, takes part."""

import copy

import pytest
import torch
from oracle import relative_error
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from aape_kernels import AaPE, replace_stem
from aape_kernels.surgery import AaPEConv2d

SIZES = {"embed_dim": 6, "num_states": 4, "encoder_dim": 5}
OPTIONS = {
    "default": {},
    "overlap": {"stride": (8, 6), "patch_size": (8, 8)},
    "time-major": {"layout": "TF", "patch_size": (4, 8), "kernel": "bilateral"},
    "complex": {"features": "complex", "patch_size": 8, "window": 12, "bias": False},
    "magnitude": {"features": "magnitude", "patch_size": 8, "window": 6},
}
PARTS = ["proj", "encoder", "sblu", "fusion"]


def make(**options):
    stem = AaPE(**{**SIZES, "patch_size": 8, **options})
    # far from a filter bank that no patch moves
    nn.init.normal_(stem.encoder.w2, std=0.5)
    return stem


def gradients(stem, x):
    x = x.detach().requires_grad_()
    tokens = stem(x)
    tokens.square().sum().backward()
    found = [tokens.detach(), x.grad, *(parameter.grad for parameter in stem.parameters())]
    stem.zero_grad()
    return found


def check_equal(stem, other, x):
    """In float64: now and then four random magnitudes are so alike that n loses half of float32's digits."""
    stem, other, x = stem.double(), other.double(), x.double()
    for got, want in zip(gradients(stem, x), gradients(other, x), strict=True):
        assert relative_error(got, want) <= 1e-12


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_step_by_step_is_the_same(options, part):
    stem = make(**options)
    x = torch.randn(2, 1, 24, 32)
    calls = []
    hooked = copy.deepcopy(stem)
    getattr(hooked, part).register_forward_hook(lambda module, args, out: calls.append(type(module)))
    check_equal(hooked, stem, x)
    assert calls == [type(getattr(stem, part))]


REGISTER = {
    "forward": lambda module, call: module.register_forward_hook(lambda *args: call()),
    "forward-pre": lambda module, call: module.register_forward_pre_hook(lambda *args: call()),
    "full-backward": lambda module, call: module.register_full_backward_hook(lambda *args: call()),
    "full-backward-pre": lambda module, call: module.register_full_backward_pre_hook(lambda *args: call()),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kind", REGISTER)
def test_every_hook_runs(part, kind):
    stem, calls = make(), []
    handle = REGISTER[kind](getattr(stem, part), lambda: calls.append(kind))
    x = torch.randn(1, 1, 16, 16, requires_grad=True)
    stem(x).sum().backward()
    assert calls
    handle.remove()
    calls.clear()
    stem(x).sum().backward()
    assert not calls
    assert stem._as_made_for_tokens()


EVERYWHERE = {
    "forward": nn.modules.module.register_module_forward_hook,
    "forward-pre": nn.modules.module.register_module_forward_pre_hook,
    "full-backward": nn.modules.module.register_module_full_backward_hook,
    "full-backward-pre": nn.modules.module.register_module_full_backward_pre_hook,
}


@pytest.mark.parametrize("kind", EVERYWHERE)
def test_hooks_on_all_modules_run_for_the_parts_too(kind):
    stem, seen = make(), []
    x = torch.randn(1, 1, 16, 16, requires_grad=True)
    before = stem(x)
    handle = EVERYWHERE[kind](lambda module, *args: seen.append(module) and None)
    try:
        tokens = stem(x)
        tokens.sum().backward()
    finally:
        handle.remove()
    assert relative_error(tokens, before) <= 2e-5
    assert all(getattr(stem, part) in seen for part in PARTS)
    assert stem._as_made_for_tokens()


@pytest.mark.parametrize("part", PARTS)
def test_what_a_hook_returns_is_what_counts(part):
    stem, x = make(), torch.randn(1, 1, 16, 16)
    before = stem(x)
    getattr(stem, part).register_forward_hook(lambda module, args, out: 2 * out)
    assert relative_error(stem(x), before) > 1e-3
    heard = stem.responses(x)
    assert relative_error(heard.decay, stem.analyse(x)[0]) == 0


@pytest.mark.parametrize("part", PARTS)
def test_a_forward_of_ones_own(part):
    """As accelerate puts one on each module whose weights it offloads."""
    stem, x, calls = make(), torch.randn(1, 1, 16, 16), []
    module = getattr(stem, part)
    plain = module.forward

    def forward(*args, **options):
        calls.append(part)
        return plain(*args, **options)

    before = stem(x)
    module.forward = forward
    assert relative_error(stem(x), before) <= 2e-5
    assert calls == [part]


def doubled(self, x, weight, bias):
    return 2 * torch.nn.functional.conv2d(x, weight, bias, self.stride)


@pytest.mark.parametrize("where", ["convolution", "replaced", "class"])
def test_what_a_convolution_calls_may_be_patched(where, monkeypatch):
    """As people patch `_conv_forward`, of one or of all, for circular padding."""
    x = torch.randn(1, 1, 16, 16)
    model = replace_stem(nn.Sequential(nn.Conv2d(1, 6, 8, 8)), path="0", layout="FT", num_states=4)
    stem = model[0] if where == "replaced" else make()
    if where == "convolution":
        nn.init.zeros_(stem.fusion.weight)
    before = stem(x)
    if where == "class":
        nn.init.zeros_(stem.fusion.weight)
        before = stem(x)
        monkeypatch.setattr(nn.Conv2d, "_conv_forward", doubled)
    else:
        stem.proj._conv_forward = doubled.__get__(stem.proj)
    assert relative_error(stem(x), 2 * before) <= 1e-6


@pytest.mark.parametrize("part", ["encoder", "sblu", "fusion"])
def test_a_parts_class_may_be_patched(part, monkeypatch):
    stem, x = AaPE(embed_dim=8, num_states=3), torch.randn(1, 1, 32, 48)
    nn.init.normal_(stem.fusion.weight)
    before = stem(x)
    kind = type(stem.get_submodule(part))
    made = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, *given, **options: made(self, *given, **options) * 0.5)
    after = stem(x)
    stem.get_submodule(part).register_forward_hook(lambda *given: None)  # so it is called in any case
    assert not torch.allclose(after, before)
    assert torch.equal(after, stem(x))


def test_a_patched_class_is_not_replaced(monkeypatch):
    model = nn.Sequential(nn.Conv2d(1, 6, 8, 8))
    monkeypatch.setattr(nn.Conv2d, "_conv_forward", doubled)
    with pytest.raises(ValueError, match=r"no forward but nn\.Conv2d's"):
        replace_stem(model, path="0", layout="FT")


class Adapted(nn.Module):
    """LoRA as adapters write it: a module around the one that it adapts."""

    def __init__(self, base):
        super().__init__()
        self.base, self.scale = base, nn.Parameter(torch.ones(()))

    def forward(self, *args, **options):
        return self.scale * self.base(*args, **options)


@pytest.mark.parametrize("part", PARTS)
def test_a_module_in_its_place(part):
    stem, x = make(), torch.randn(1, 1, 16, 16)
    before = stem(x)
    setattr(stem, part, Adapted(getattr(stem, part)))
    tokens = stem(x)
    assert relative_error(tokens, before) <= 2e-5
    tokens.square().sum().backward()
    assert getattr(stem, part).scale.grad.abs() > 0


def test_other_modules_that_take_and_give_the_same():
    stem, x = make(), torch.randn(1, 1, 16, 16)
    stem.encoder = nn.Linear(64, 2 * 4)
    stem.fusion = nn.Linear(3 * 4, 6)
    stem(x).sum().backward()
    assert all(parameter.grad is not None for parameter in stem.parameters())
    assert stem.responses(x).y.shape == (1, 2, 2, 2, 4)


@pytest.mark.parametrize("shape", [(1, 3, 4), (6, 3, 4)], ids=["fusion", "proj"])
def test_no_sum_of_tokens_of_other_shapes(shape):
    """Where parts are called, what they give could be broadcast in silence."""
    stem = make()
    if shape[0] == 6:
        stem.proj = nn.Sequential(nn.Conv2d(1, 6, 16, 16))
    stem.fusion.weight = nn.Parameter(torch.randn(shape))
    stem.fusion.register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match=r"fusion: expected tokens of the shape .* that proj gives, \(1, \d, 6\), got"):
        stem(torch.randn(1, 1, 16, 16))


CHANGES = {
    "weight-norm": lambda module: parametrizations.weight_norm(module),
    "spectral-norm": lambda module: parametrizations.spectral_norm(module),
    "pruning": lambda module: prune.l1_unstructured(module, "weight", 0.5),
    "old-spectral-norm": lambda module: nn.utils.spectral_norm(module),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize("part", ["proj", "sblu", "fusion"])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_the_ones_that_count(part, change):
    stem, x = make().eval(), torch.randn(1, 1, 16, 16)
    module = getattr(stem, part)
    CHANGES[change](module)
    got = stem(x)
    plain = make().eval()
    plain.load_state_dict({name: dict(changed_weights(stem))[name].detach() for name in plain.state_dict()})
    assert relative_error(got, plain(x)) <= 2e-5


def changed_weights(stem):
    for name in PARTS:
        module = getattr(stem, name)
        for own in ("weight", "bias", "w1", "b1", "w2", "b2"):
            if getattr(module, own, None) is not None:
                yield f"{name}.{own}", getattr(module, own)


def test_a_parametrised_part_keeps_the_fused_call():
    stem = make()
    parametrizations.weight_norm(stem.fusion)
    assert parametrize.is_parametrized(stem.fusion)
    assert stem._as_made_for_tokens()


@pytest.mark.parametrize("part", ["encoder", "sblu", "fusion"])
def test_in_the_place_of_a_convolution(part):
    model = nn.Sequential(nn.Conv2d(1, 6, 8, 8), nn.Flatten(2))
    x = torch.randn(2, 1, 16, 24)
    before = model(x)
    stem = replace_stem(model, path="0", layout="FT", num_states=4)[0]
    calls = []
    getattr(stem, part).register_forward_hook(lambda *args: calls.append(1))
    assert relative_error(model(x), before) <= 1e-6
    assert calls
    nn.init.normal_(stem.fusion.weight)
    stepwise = model(x)
    getattr(stem, part)._forward_hooks.clear()
    assert relative_error(stepwise, model(x)) <= 2e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_and_autocast(dtype):
    stem = make()
    x = torch.randn(1, 1, 16, 32)
    hooked = copy.deepcopy(stem)
    hooked.fusion.register_forward_hook(lambda *args: None)
    with torch.autocast("cpu", dtype):
        got, want = hooked(x), stem(x)
    assert got.dtype == want.dtype == dtype
    assert relative_error(got, want) <= 2e-2
    got, want = hooked.to(dtype)(x.to(dtype)), stem.to(dtype)(x.to(dtype))
    assert got.dtype == want.dtype == dtype
    assert relative_error(got, want) <= 2e-2


@pytest.mark.parametrize(
    ("name", "value"),
    [("stride", (4, 4)), ("padding", (1, 1)), ("padding", "same"), ("dilation", (2, 2)), ("groups", 2)],
)
def test_what_a_convolution_lets_people_set(name, value):
    """A convolution does as it is told afterwards; the stem refuses, on the module and on what it holds."""
    stem = make()
    setattr(stem.proj, name, value)
    with pytest.raises(ValueError, match=rf"proj\.{name}: expected .*, as the stem was made, got"):
        stem(torch.zeros(1, 1, 16, 16))
    replaced = replace_stem(nn.Sequential(nn.Conv2d(1, 6, 8, 8)), path="0", layout="FT", num_states=4)[0]
    assert isinstance(replaced, AaPEConv2d)
    with pytest.raises(AttributeError, match=rf"^{name}: cannot be set"):
        setattr(replaced, name, value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("stride", 8), ("stride", [8, 8]), ("padding", 0), ("padding", "valid"), ("dilation", 1), ("groups", 1)],
)
def test_what_a_convolution_takes_for_the_same(name, value):
    x = torch.randn(1, 1, 16, 24)
    replaced = replace_stem(nn.Sequential(nn.Conv2d(1, 6, 8, 8)), path="0", layout="FT", num_states=4)[0]
    for stem, where in ((made := make(), made.proj), (replaced, replaced)):
        before = stem(x)
        setattr(where, name, value)
        assert torch.equal(stem(x), before)
    assert replaced.feat_ratio(as_scalar=False) == (8, 8)


@pytest.mark.parametrize(
    ("name", "value"),
    [("stride", (4, 4)), ("window", 10), ("kernel", "bilateral"), ("features", "complex"), ("band", (0.1, 3.0)),
     ("decay", (0.1, 1.0)), ("layout", "TF"), ("patch_size", 4), ("num_states", 8), ("embed_dim", 3)],
)  # fmt: skip
def test_settled_attributes(name, value):
    stem = make()
    with pytest.raises(AttributeError, match=rf"^{name}: cannot be set"):
        setattr(stem, name, value)
    setattr(stem, name, getattr(stem, name))  # what it is already
    stem.backend = "reference"


def test_from_conv_refuses_what_is_no_plain_convolution():
    class Standardised(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) / 2

    own = nn.Conv2d(1, 4, 8, 8)
    own.forward = lambda x: x
    stem = replace_stem(nn.Sequential(nn.Conv2d(1, 4, 8, 8)), path="0", layout="FT")[0]
    for conv in (Standardised(1, 4, 8, 8), own, stem):
        with pytest.raises(TypeError, match=r"conv: expected an nn\.Conv2d with nn\.Conv2d's forward"):
            AaPE.from_conv(conv)
    with pytest.raises(ValueError, match=r"no forward but nn\.Conv2d's"):
        replace_stem(nn.Sequential(own), path="0", layout="FT")


def test_replaced_stems_are_convolutions_to_those_who_ask():
    """Libraries convert, initialise and adapt by class."""
    model = replace_stem(nn.Sequential(nn.Conv2d(1, 6, 8, 8)), path="0", layout="FT", num_states=4)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.weight.data = module.weight.data.bfloat16()
            module.bias.data = module.bias.data.bfloat16()
    assert model(torch.randn(1, 1, 16, 16).bfloat16()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="with AaPE in it"):
        replace_stem(model)


def test_shared_by_hooks_and_compiler():
    stem, x = make(), torch.randn(1, 1, 16, 16)
    seen = []
    stem.fusion.register_forward_hook(lambda module, args, out: seen.append(out.shape) or 2 * out)
    compiled = torch.compile(stem, backend="aot_eager")
    assert relative_error(compiled(x), stem(x)) <= 1e-6
    assert seen
