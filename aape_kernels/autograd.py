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
from .geometry import PatchGrid

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


Size = tuple[int, int]
Range = tuple[float, float]

# Arguments that are no tensors: grid sizes, flags and the backend's name; they get no gradient.
SBLU_OPTIONS = 5
EMBED_OPTIONS = 8


def _below(op: Callable[..., Any], *arguments: Any) -> Any:
    """The op past the tape that its Function is for; below functorch's level there may be another, and is let be."""
    with torch.enable_grad(), torch._C._AutoDispatchBelowAutograd():
        return op(*arguments)


class SBLU(torch.autograd.Function):
    """x, decay, frequency, weight, (patch, stride, window, quadrature, backend) -> y."""

    @staticmethod
    def forward(
        x: Tensor, decay: Tensor, frequency: Tensor, weight: Tensor,
        patch: Size, stride: Size, window: int, quadrature: bool, backend: str,
    ) -> Tensor:  # fmt: skip
        y: Tensor = _below(ops.sblu, x, decay, frequency, weight, patch, stride, window, quadrature, backend)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:4])
        ctx.options = inputs[4:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        *options, backend = ctx.options
        arguments = (grad, *ctx.saved_tensors, *options, tuple(ctx.needs_input_grad[:4]), backend)
        gradients = ops.sblu_backward(*arguments)
        return *_present(gradients, ctx.needs_input_grad), *[None] * SBLU_OPTIONS


class SBLUBackward(torch.autograd.Function):
    """grad, x, decay, frequency, weight, options, need -> the four gradients."""

    @staticmethod
    def forward(
        grad: Tensor, x: Tensor, decay: Tensor, frequency: Tensor, weight: Tensor,
        patch: Size, stride: Size, window: int, quadrature: bool, need: tuple[bool, ...], backend: str,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        out: tuple[Tensor, ...] = _below(
            ops.sblu_backward, grad, x, decay, frequency, weight, patch, stride, window, quadrature, need, backend
        )
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:5])
        ctx.options = inputs[5:]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        grad, *inputs = ctx.saved_tensors
        patch, stride, window, quadrature, need, _ = ctx.options
        grid = PatchGrid(tuple(patch), tuple(stride), window)

        compute: Callable[..., Tensor] = reference.sblu

        def forward(*values: Tensor | None) -> Tensor:
            return compute(*values, grid, quadrature)

        return *_double_backward(forward, inputs, grad, need, cotangents), *[None] * (SBLU_OPTIONS + 1)


class Embed(torch.autograd.Function):
    """x and the eight parameters, (patch, stride, window, quadrature, decay, band, time_major, backend) ->
    tokens, r, hidden; the latter two are for the backward only."""

    @staticmethod
    def forward(
        x: Tensor, proj_w: Tensor, proj_b: Tensor | None, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor,
        sblu_w: Tensor, fusion_w: Tensor,
        patch: Size, stride: Size, window: int, quadrature: bool, decay: Range, band: Range, time_major: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        out: tuple[Tensor, Tensor, Tensor] = _below(
            ops.embed,
            x, proj_w, proj_b, w1, b1, w2, b2, sblu_w, fusion_w,
            patch, stride, window, quadrature, decay, band, time_major, backend,
        )  # fmt: skip
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:9], *output[1:])
        ctx.options = inputs[9:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> Any:
        if grad is None:
            return (None,) * (9 + EMBED_OPTIONS)
        *options, backend = ctx.options
        arguments = (grad, *ctx.saved_tensors, *options, tuple(ctx.needs_input_grad[:9]), backend)
        gradients = ops.embed_backward(*arguments)
        return *_present(gradients, ctx.needs_input_grad), *[None] * EMBED_OPTIONS


class EmbedBackward(torch.autograd.Function):
    """grad, x and the eight parameters, r, hidden, options, need -> the nine gradients."""

    @staticmethod
    def forward(
        grad: Tensor, x: Tensor, proj_w: Tensor, proj_b: Tensor | None, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor,
        sblu_w: Tensor, fusion_w: Tensor, r: Tensor, hidden: Tensor,
        patch: Size, stride: Size, window: int, quadrature: bool, decay: Range, band: Range, time_major: bool,
        need: tuple[bool, ...], backend: str,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        out: tuple[Tensor, ...] = _below(
            ops.embed_backward,
            grad, x, proj_w, proj_b, w1, b1, w2, b2, sblu_w, fusion_w, r, hidden,
            patch, stride, window, quadrature, decay, band, time_major, need, backend,
        )  # fmt: skip
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:10])
        ctx.options = inputs[12:]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        grad, *inputs = ctx.saved_tensors
        patch, stride, window, quadrature, decay, band, time_major, need, _ = ctx.options
        grid = PatchGrid(tuple(patch), tuple(stride), window)

        compute: Callable[..., Tensor] = reference.embed

        def forward(*values: Tensor | None) -> Tensor:
            return compute(*values, grid, quadrature, tuple(decay), tuple(band), time_major)

        # r and hidden follow from the inputs: the reference computes them again
        second = _double_backward(forward, inputs, grad, need, cotangents)
        return *second, None, None, *[None] * (EMBED_OPTIONS + 1)


def _present(gradients: Sequence[Tensor], need: Sequence[bool]) -> list[Tensor | None]:
    return [gradient if wanted else None for gradient, wanted in zip(gradients, need, strict=False)]


def _refuse_forward_mode(tensors: Sequence[Tensor | None], backend: str) -> None:
    # outside a dual level, as nearly always, this costs one comparison
    if forward_ad._current_level >= 0 and any(
        value is not None and forward_ad.unpack_dual(value).tangent is not None for value in tensors
    ):
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
    op = getattr(ops, name)

    def run(keyset: Any, *arguments: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            # past `Function.apply`, which leaves functorch's levels to functorch: it has come to this one already
            with enable_single_level_autograd_function():
                return super(torch.autograd.Function, function).apply(*arguments)
        _refuse_forward_mode([value for value in arguments if isinstance(value, Tensor)], arguments[-1])
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    ops.LIBRARY.impl(name, run, "Autograd", with_keyset=True)

    def mapped(info: Any, in_dims: Any, *arguments: Any) -> Any:
        return _one_by_one(op, info, in_dims, arguments)

    torch.library.register_vmap(f"aape::{name}", mapped)


_register("sblu", SBLU)
_register("sblu_backward", SBLUBackward)
_register("embed", Embed)
_register("embed_backward", EmbedBackward)
flops.register()


def bind(backend: str) -> SimpleNamespace:
    """`sblu` and `embed` of a compiled backend, differentiable, in the signatures of `aape_kernels.reference`."""

    def sblu(*given: Any) -> Tensor:
        *tensors, grid, quadrature = given
        _refuse_forward_mode(tensors, backend)
        arguments = (*tensors, grid.patch, grid.stride, grid.window, quadrature, backend)
        y: Tensor = ops.sblu(*arguments)
        return y

    def embed(*given: Any) -> Tensor:
        *tensors, grid, quadrature, decay, band, time_major = given
        _refuse_forward_mode(tensors, backend)
        sizes = (grid.patch, grid.stride, grid.window)
        arguments = (*tensors, *sizes, quadrature, decay, band, time_major, backend)
        tokens: Tensor = ops.embed(*arguments)[0]
        return tokens

    return SimpleNamespace(sblu=sblu, embed=embed)
