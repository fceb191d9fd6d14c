"""`torch.autograd.Function`s around the registered ops, for every compiled backend alike.

The backward is a Function of its own: its backward, the double backward, computes once more through the reference.
Forward-mode AD is refused: through an opaque op it would silently give zeros.

`sblu` and `embed` have the signatures of `aape_kernels.reference`; `bind` makes them those of one backend.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from . import flops, ops, reference
from .weights import Weights

__all__ = ["bind"]


def _double_backward(
    forward: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    grad: Tensor,
    need: Sequence[bool],
    cotangents: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The gradients of (grad, *inputs) of Σ cotangent · gradient, all through the reference.

    Args:
        forward: the reference as a function of `inputs`.
        grad: the cotangent that the backward was given.
        need: whose gradients the backward was asked for.
        cotangents: of those gradients; None where there are none.
    """
    present = [k for k, value in enumerate(inputs) if value is not None]
    asked = [k for k in present if need[k] and cotangents[k] is not None]
    found: list[Tensor | None] = [None] * (1 + len(inputs))
    if not asked:
        return found

    def gradients(upstream: Tensor, *values: Tensor) -> Any:
        given = [*inputs]
        for k, value in zip(present, values, strict=True):
            given[k] = value

        def of(*chosen: Tensor) -> Tensor:
            for k, value in zip(asked, chosen, strict=True):
                given[k] = value
            return forward(*given)

        return torch.func.vjp(of, *(given[k] for k in asked))[1](upstream)

    # not by leaves of their own: so it nests in `torch.func`'s transforms, and can be differentiated once more; under
    # the forward's dtypes, whatever autocast says by now
    with reference.full_precision(grad.device):
        pull = torch.func.vjp(gradients, grad, *(inputs[k] for k in present))[1]
        second = pull(tuple(cotangents[k] for k in asked))
    for k, value in zip([0, *(1 + k for k in present)], second, strict=True):
        found[k] = value
    return found


def _below(name: str, arguments: Sequence[Any]) -> Any:
    """The op past the tape that its Function is for; below functorch's level there may be another, and is let be."""
    if not ops.is_seen(arguments[: ops.TENSORS[name]]):
        return ops.run(name, arguments)
    # a Function turns both modes of differentiation off
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True), torch._C._AutoDispatchBelowAutograd():
        return ops.call(name, arguments)


def _call(name: str, arguments: Sequence[Any]) -> Any:
    """The op, differentiable; past the dispatcher where nobody has to see it. Its arguments have a `PatchGrid`."""
    tensors = arguments[: ops.TENSORS[name]]
    _refuse_forward_mode(tensors, arguments[-1])
    if ops.is_seen(tensors):
        return ops.call(name, arguments)
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors):
        return _apply(FUNCTIONS[name], arguments)
    return ops.run(name, arguments)


def _apply(function: Any, arguments: Sequence[Any]) -> Any:
    """Past `Function.apply`, which leaves functorch's levels to functorch; it has come to the right one already."""
    return super(torch.autograd.Function, function).apply(*arguments)


# What nodes of the graph are called, with "Backward" behind it: in `grad_fn`, messages and profiles.
NODES = {"sblu": "SBLU", "embed": "Embed"}


def _functions(name: str, compute: Callable[..., Tensor]) -> tuple[type, type]:
    """The Functions of op `name` and of its backward.

    They take the op's arguments with a `PatchGrid`: tensors and then options, the last of which is the backend's name.
    The op's first output is differentiable; others are for the backward, which takes (grad, tensors, others, options,
    need, backend) and gives a gradient for every tensor.

    Args:
        compute: the reference, with the op's arguments but the backend's name, `ops.with_weights`.
    """
    tensors, others = ops.TENSORS[name], len(ops.OPS[name]._schema.returns) - 1

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(*arguments: Any) -> Any:
            return _below(f"{name}_backward", arguments)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.save_for_backward(*inputs[: 1 + tensors])
            ctx.options = inputs[1 + tensors + others :]

        @staticmethod
        def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
            grad, *inputs = ctx.saved_tensors
            *options, need, _ = ctx.options

            def forward(*values: Tensor | None) -> Tensor:
                return compute(*ops.with_weights(name, (*values, *options)))

            # the other outputs follow from the inputs: the reference computes them again
            second = _double_backward(forward, inputs, grad, need, cotangents)
            return *second, *[None] * (others + len(ctx.options))

    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(*arguments: Any) -> Any:
            return _below(name, arguments)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            kept = output[1:] if others else ()
            ctx.mark_non_differentiable(*kept)
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*inputs[:tensors], *kept)
            ctx.options = inputs[tensors:]

        @staticmethod
        def backward(ctx: Any, grad: Tensor | None, *_: Any) -> Any:
            need = ctx.needs_input_grad
            if grad is None:
                return (None,) * len(need)
            *options, backend = ctx.options
            given = (grad, *ctx.saved_tensors, *options, need[:tensors], backend)
            gradients = _call(f"{name}_backward", given)
            return *_present(gradients, need), *[None] * len(ctx.options)

    for function, title in ((Forward, NODES[name]), (Backward, f"{NODES[name]}Backward")):
        node = function._backward_cls
        function.__name__ = function.__qualname__ = title
        node.__name__ = node.__qualname__ = f"{title}Backward"
    return Forward, Backward


def _present(gradients: Sequence[Tensor], need: Sequence[bool]) -> list[Tensor | None]:
    return [gradient if wanted else None for gradient, wanted in zip(gradients, need, strict=False)]


def _is_dual(value: Tensor) -> bool:
    # what vmap maps cannot be asked; below its level the op is called again
    return not torch._C._functorch.is_batchedtensor(value) and forward_ad.unpack_dual(value).tangent is not None


def _refuse_forward_mode(tensors: Sequence[Tensor | None], backend: str) -> None:
    # outside a dual level, as nearly always, this costs one comparison
    if forward_ad._current_level >= 0 and any(value is not None and _is_dual(value) for value in tensors):
        raise NotImplementedError(
            f"forward-mode AD: expected backend 'reference', the one that has it, got {backend!r} "
            "(AaPE(backend='reference') or AAPE_BACKEND=reference)"
        )


def _one_by_one(function: Any, info: Any, in_dims: tuple[int | None, ...], arguments: tuple[Any, ...]) -> Any:
    """vmap by a loop over the mapped axis: the ops have a batch axis of their own, use that where speed matters."""
    count, results = info.batch_size, []
    for k in range(max(count, 1)):
        picked = [
            value
            if dim is None or not isinstance(value, Tensor)
            else (value.select(dim, k) if count else value.sum(dim))  # of an axis without entries, for its shape
            for value, dim in zip(arguments, in_dims, strict=True)
        ]
        results.append(function(*picked))
    if isinstance(results[0], Tensor):
        return torch.stack(results)[:count], 0
    columns = zip(*results, strict=True)
    stacked = tuple(torch.stack(parts)[:count] if isinstance(parts[0], Tensor) else None for parts in columns)
    return stacked, tuple(None if part is None else 0 for part in stacked)


def _register(name: str, function: Any) -> None:
    """Make an op itself differentiable, by its Function, and mapped: so it is wherever it is called from, below
    `torch.func`'s transforms, in a compiled graph and in an exported program."""
    op = ops.OPS[name]

    def run(keyset: Any, *arguments: Any) -> Any:
        tensors = arguments[: ops.TENSORS[name]]
        _refuse_forward_mode(tensors, arguments[-1])
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors):
            with enable_single_level_autograd_function():
                return _apply(function, ops.with_grid(name, arguments))
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    ops.LIBRARY.impl(name, run, "Autograd", with_keyset=True)

    def mapped(info: Any, in_dims: Any, *arguments: Any) -> Any:
        return _one_by_one(op, info, in_dims, arguments)

    torch.library.register_vmap(f"aape::{name}", mapped)


# Of every op, what differentiates it.
FUNCTIONS = {
    op: function
    for name in ("sblu", "embed")
    for op, function in zip((name, f"{name}_backward"), _functions(name, getattr(reference, name)), strict=True)
}
for _name, _function in FUNCTIONS.items():
    _register(_name, _function)
flops.register()


def bind(backend: str) -> SimpleNamespace:
    """`sblu` and `embed` of a compiled backend, differentiable, in the signatures of `aape_kernels.reference`."""

    def sblu(*arguments: Any) -> Tensor:
        y: Tensor = _call("sblu", (*arguments, backend))
        return y

    def embed(x: Tensor, weights: Weights, *options: Any) -> Tensor:
        tokens: Tensor = _call("embed", (x, *weights, *options, backend))[0]
        return tokens

    return SimpleNamespace(sblu=sblu, embed=embed)
