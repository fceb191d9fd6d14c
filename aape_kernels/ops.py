"""The registered ops `aape::…`: schemas, shapes for tracing, and the way to one backend. Torch only.

One schema serves every compiled backend; the last argument names it, and its module is imported when it first runs.
Arguments are trusted: `functional` has checked them.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from .geometry import PatchGrid
from .reference import full_precision, working_dtype
from .weights import Weights

__all__ = [
    "OPS",
    "TENSORS",
    "call",
    "embed",
    "embed_backward",
    "is_seen",
    "run",
    "sblu",
    "sblu_backward",
    "structured",
    "with_grid",
    "with_weights",
]

GRID = "int[2] patch, int[2] stride, int window, bool quadrature"
STEM = (
    "Tensor x, Tensor proj_w, Tensor? proj_b, Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor sblu_w, "
    "Tensor fusion_w"
)
RANGES = "float[2] decay, float[2] band, bool time_major"

# `Library` objects unregister what they hold when they are collected: this one lives as long as the module.
LIBRARY = torch.library.Library("aape", "DEF")
LIBRARY.define(f"sblu(Tensor x, Tensor decay, Tensor frequency, Tensor weight, {GRID}, str backend) -> Tensor")
LIBRARY.define(
    "sblu_backward(Tensor grad, Tensor x, Tensor decay, Tensor frequency, Tensor weight, "
    f"{GRID}, bool[4] need, str backend) -> (Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.define(f"embed({STEM}, {GRID}, {RANGES}, str backend) -> (Tensor, Tensor, Tensor)")
LIBRARY.define(
    f"embed_backward(Tensor grad, {STEM}, Tensor r, Tensor hidden, {GRID}, {RANGES}, bool[9] need, str backend) "
    f"-> ({', '.join(['Tensor'] * 9)})"
)

sblu = torch.ops.aape.sblu.default
sblu_backward = torch.ops.aape.sblu_backward.default
embed = torch.ops.aape.embed.default
embed_backward = torch.ops.aape.embed_backward.default
OPS = {"sblu": sblu, "sblu_backward": sblu_backward, "embed": embed, "embed_backward": embed_backward}


def _grid(patch: Sequence[int], stride: Sequence[int], window: int) -> PatchGrid:
    return PatchGrid((patch[0], patch[1]), (stride[0], stride[1]), window)


@functools.cache
def _implementation(backend: str, name: str) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(importlib.import_module(f"aape_kernels.backends.{backend}"), name)
    return function


# How many tensors an op's arguments begin with, behind which are the three sizes of a `PatchGrid`, and where a stem's
# `Weights` begin among them.
TENSORS = {"sblu": 4, "sblu_backward": 5, "embed": 9, "embed_backward": 12}
FIRST_WEIGHT = {"embed": 1, "embed_backward": 2}


def with_grid(name: str, arguments: Sequence[Any]) -> tuple[Any, ...]:
    """An op's arguments with a `PatchGrid` in place of its sizes: as they are passed on wherever no schema asks."""
    at = TENSORS[name]
    return *arguments[:at], _grid(*arguments[at : at + 3]), *arguments[at + 3 :]


def call(name: str, arguments: Sequence[Any]) -> Any:
    """Op `name`, through torch's dispatcher. Its arguments have a `PatchGrid`."""
    at = TENSORS[name]
    grid = arguments[at]
    return OPS[name](*arguments[:at], grid.patch, grid.stride, grid.window, *arguments[at + 1 :])


def with_weights(name: str, arguments: Sequence[Any]) -> Sequence[Any]:
    """Arguments that have a `PatchGrid` as what implements an op takes them: a stem's weights as `Weights`."""
    first = FIRST_WEIGHT.get(name)
    if first is None:
        return arguments
    end = first + len(Weights._fields)
    return *arguments[:first], Weights(*arguments[first:end]), *arguments[end:]


def structured(name: str, arguments: Sequence[Any]) -> Sequence[Any]:
    """The arguments that an op's schema lists, all but some of the last, as what implements it takes them."""
    return with_weights(name, with_grid(name, arguments))


def run(name: str, arguments: Sequence[Any]) -> Any:
    """What op `name` computes, by the backend that its last argument names; None for a gradient that is not needed. Its
    arguments have a `PatchGrid`."""
    if torch.is_grad_enabled() or torch._C._is_any_autocast_enabled():
        # An exported program calls the op itself, on parameters that require grad; and autocast, which settled the
        # dtypes above, would reach into the backend's products.
        with torch.no_grad(), full_precision(arguments[0].device):
            return _run(name, arguments)
    return _run(name, arguments)


def _run(name: str, arguments: Sequence[Any]) -> Any:
    return _implementation(arguments[-1], name)(*with_weights(name, arguments[:-1]))


PLAIN = (Tensor, torch.nn.Parameter)
keys_of = torch._C._dispatch_keys
# Who has to see an op, of those that need not be told by the tensors: an export that is not by dynamo has a mode. By
# these names, as behind a large call every module that is asked for an attribute costs a µs.
WATCHERS = (
    torch._C._is_tracing,
    torch._C._are_functorch_transforms_active,
    torch._C._len_torch_dispatch_stack,
    torch._C._is_torch_function_mode_enabled,
    torch._C._autograd._profiler_enabled,
)


def _extraordinary() -> int:
    """The dispatch keys, as bits, that a tensor has only if its numbers are not what its memory holds: of transforms
    and of vmap of old, of what is negated on reading, of zeros without memory, of layouts other than strides."""
    names = ("CPU", "CUDA", "Meta", "AutogradCPU", "AutogradCUDA", "AutogradMeta", "ADInplaceOrView", "AutocastCPU")
    bits = 0
    for name in (*names, "AutocastCUDA"):
        bits |= torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)).raw_repr()
    return ~bits


EXTRAORDINARY = _extraordinary()


def is_seen(tensors: Sequence[Tensor | None]) -> bool:
    """Whether an op has to go through torch's dispatcher, as somebody there has to see it: a compiler, a transform of
    `torch.func` (also of late: its tensors outlive it), `torch.jit.trace`, a mode, the profiler, or what stands behind
    a tensor that is of another class or not what its memory holds.

    Where nobody has, `run` gives the same, and for a small call saves a fifth of what the host does
    (benchmarks/NOTES.md).
    """
    if is_dynamo_compiling():
        return True
    for asks in WATCHERS:
        if asks():
            return True
    for value in tensors:  # not by `any`, whose generator is one more
        if value is not None and (type(value) not in PLAIN or keys_of(value).raw_repr() & EXTRAORDINARY):
            return True
    return False


def _registered(name: str) -> Callable[..., Any]:
    def op(*arguments: Any) -> Any:
        return run(name, with_grid(name, arguments))

    def backward(grad: Tensor, x: Tensor, *others: Any) -> Any:
        return tuple(x.new_empty(0) if one is None else one for one in op(grad, x, *others))  # as a schema wants it

    return backward if name.endswith("_backward") else op


for _name in TENSORS:
    for _key in ("CPU", "CUDA"):
        LIBRARY.impl(_name, _registered(_name), _key)


# The fakes are untyped as torch passes them what the schemas say.


@torch.library.register_fake("aape::sblu")
def _(x, decay, frequency, weight, patch, stride, window, quadrature, backend):  # type: ignore[no-untyped-def]
    return x.new_empty(*decay.shape[:3], 2, decay.shape[3])


@torch.library.register_fake("aape::sblu_backward")
def _(grad, x, decay, frequency, weight, patch, stride, window, quadrature, need, backend):  # type: ignore[no-untyped-def]
    return _like((x, decay, frequency, weight), need, x)


@torch.library.register_fake("aape::embed")
def _(*arguments):  # type: ignore[no-untyped-def]
    x, weights, grid, *_ = structured("embed", arguments)
    n_f, n_t = grid.tokens(x.shape[2], x.shape[3])
    tokens = x.new_empty(x.shape[0], n_f * n_t, weights.dim, dtype=weights.proj_w.dtype)
    rows, work = x.shape[0] * n_f * n_t, working_dtype(x.dtype)
    return tokens, x.new_empty(rows, 2 * weights.states, dtype=work), x.new_empty(rows, weights.hidden, dtype=work)


@torch.library.register_fake("aape::embed_backward")
def _(*arguments):  # type: ignore[no-untyped-def]
    _, x, weights, *_, need, _ = structured("embed_backward", arguments)
    return _like((x, *weights), need, x)


def _like(inputs: Sequence[Tensor | None], need: Sequence[bool], x: Tensor) -> tuple[Tensor, ...]:
    """Contiguous gradients of the inputs, empty where not needed."""
    return tuple(
        x.new_empty(0)
        if value is None or not wanted
        else torch.empty_like(value, memory_format=torch.contiguous_format)
        for value, wanted in zip(inputs, need, strict=True)
    )
