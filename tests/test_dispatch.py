"""Ops go past torch's dispatcher where nobody there has to see them, and through it where somebody has."""

from typing import ClassVar

import pytest
import torch
from cases import SQUARE
from checks import same_bits
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from aape_kernels import AaPE, ops, sblu
from aape_kernels.backends import cpu

pytestmark = pytest.mark.skipif(not cpu.NATIVE_BUILT, reason="the native module was not built")
X = torch.randn(2, 1, 32, 48, generator=torch.Generator().manual_seed(0))


class Dispatched(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(function.name())
        return function(*args, **(kwargs or {}))


class Called(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if isinstance(function, torch._ops.OpOverload):
            self.seen.append(function.name())
        return function(*args, **(kwargs or {}))


class Profiled:
    def __enter__(self):
        self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        self.profiler.__enter__()
        return self

    def __exit__(self, *what):
        self.profiler.__exit__(*what)

    @property
    def seen(self):
        return [event.name for event in self.profiler.events()]


class Wrapper(torch.Tensor):
    seen: ClassVar[list[str]] = []

    @staticmethod
    def __new__(cls, inner):
        wrapper = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)
        wrapper.inner = inner
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        cls.seen.append(function.name())
        plain = [value.inner if isinstance(value, cls) else value for value in args]
        return function(*plain, **(kwargs or {}))


def stem() -> AaPE:
    torch.manual_seed(0)
    made = AaPE(embed_dim=8, num_states=4, encoder_dim=4, backend="cpu")
    torch.nn.init.normal_(made.fusion.weight)
    return made


def step(x, made=None):
    """The tokens and all gradients."""
    made = stem() if made is None else made
    tokens = made(x)
    return tokens.detach(), *torch.autograd.grad(tokens.square().sum(), list(made.parameters()))


@pytest.fixture
def no_dispatcher(monkeypatch):
    """The registered ops cannot be called."""

    def refuse(*arguments):
        raise AssertionError("an op went to the dispatcher")

    monkeypatch.setattr(ops, "call", refuse)


def test_past_the_dispatcher_where_nobody_looks(no_dispatcher):
    inputs = [value.requires_grad_() for value in SQUARE.inputs(torch.float32)[0]]
    y = sblu(*inputs, **SQUARE.options, backend="cpu")
    torch.autograd.grad(y.sum(), inputs)
    step(X)
    with torch.inference_mode():
        assert stem()(X).is_inference()
    with torch.autocast("cpu", torch.bfloat16):
        assert step(X)[0].dtype == torch.bfloat16
    frozen = stem().requires_grad_(False)
    assert not frozen(X).requires_grad
    with pytest.raises(AssertionError, match="an op went to the dispatcher"), Dispatched():
        stem()(X)


@pytest.mark.parametrize("watcher", [Dispatched, Called, Profiled])
def test_who_looks_sees_ops_forward_and_backward(watcher):
    with watcher() as watching:
        seen = step(X)
    # a function's mode is off in what it calls, `torch.autograd.grad` here
    expected = {"aape::embed"} if watcher is Called else {"aape::embed", "aape::embed_backward"}
    assert expected <= set(watching.seen)
    assert same_bits(seen, step(X))


def test_what_is_seen_without_gradients():
    with torch.no_grad(), Dispatched() as watching:
        tokens = stem()(X)
    assert watching.seen.count("aape::embed") == 1
    with torch.no_grad():
        assert torch.equal(tokens, stem()(X))


@pytest.mark.filterwarnings("ignore:Converting a tensor to a Python:torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.*is deprecated:DeprecationWarning")
@pytest.mark.parametrize("grad", [True, False])
def test_a_trace_holds_the_op(grad):
    """Of a backend that is named: with what it computed for the trace's own input as a constant, it would be wrong."""
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(stem(), X)
        assert torch.equal(traced(-X), stem()(-X))


def test_tensors_of_another_class_see_the_op():
    Wrapper.seen.clear()
    with torch.no_grad():
        tokens = stem()(Wrapper(X))
    assert Wrapper.seen.count("aape::embed") == 1
    with torch.no_grad():
        assert torch.equal(tokens, stem()(X))


def test_tensors_that_outlive_a_transform():
    """What `torch.func.grad` hands out is of torch's class still, and wraps the numbers."""
    inputs, _ = SQUARE.inputs(torch.float32)
    kept = []

    def total(x):
        kept.append(x * 1)
        return sblu(kept[-1], *inputs[1:], **SQUARE.options, backend="cpu").sum()

    torch.func.grad(total)(inputs[0])
    weight = inputs[3].clone().requires_grad_()
    both = [sblu(x, *inputs[1:3], weight, **SQUARE.options, backend="cpu") for x in (kept[0], inputs[0])]
    assert torch.equal(*both)
    assert torch.equal(*(torch.autograd.grad(y.square().sum(), weight)[0] for y in both))


def test_double_backward_past_the_dispatcher(no_dispatcher):
    made = stem()
    (first,) = torch.autograd.grad(made(X).square().sum(), made.sblu.weight, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), made.encoder.b2)
    assert second.abs().sum() > 0


def negated(value):
    """The same numbers with the negative bit: memory holds them with the other sign."""
    return torch._neg_view(-value.detach())


def test_numbers_are_not_always_what_memory_holds():
    """Negative bits and zeros without memory, of input, weights and cotangents; vmap of old, for batched gradients."""
    stem = AaPE(embed_dim=8, patch_size=8, num_states=4, backend="cpu")
    x = X.clone().requires_grad_()
    tokens, cotangent = stem(x), torch.randn(2, 24, 8)
    want = torch.autograd.grad(tokens, [x, *stem.parameters()], cotangent, retain_graph=True)
    assert torch.equal(stem(negated(X)), tokens)
    assert torch.equal(stem.responses(negated(X)).y, stem.responses(X).y)
    assert same_bits(torch.autograd.grad(tokens, [x, *stem.parameters()], negated(cotangent), retain_graph=True), want)
    weights = {name: negated(value) for name, value in stem.named_parameters()}
    assert torch.equal(torch.func.functional_call(stem, weights, (X,)), tokens)

    nothing = torch._efficientzerotensor
    assert torch.equal(stem(nothing(2, 1, 32, 48)), stem(torch.zeros(2, 1, 32, 48)))
    (gradient,) = torch.autograd.grad(tokens, x, nothing(2, 24, 8), retain_graph=True)
    assert not gradient.any()

    several = torch.stack([cotangent, -2 * cotangent])
    (gradient,) = torch.autograd.grad(tokens, x, several, is_grads_batched=True)
    assert torch.equal(gradient, torch.stack([want[0], -2 * want[0]]))


def test_memory_that_was_freed():
    """As FSDP frees parameters: a message instead of the end of the process."""
    stem = AaPE(embed_dim=8, patch_size=8, backend="cpu")
    stem.encoder.w1.data.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"expected tensors that have memory.*shape \(32, 1, 8, 8\).*FSDP"):
        stem(X)
