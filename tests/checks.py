"""Comparisons and ways to lay out inputs, shared by the tests of every backend."""

import contextlib
import math

import pytest
import torch
from cases import NAMES
from oracle import bound, relative_error
from torch import Tensor

from aape_kernels import sblu

BEYOND = 2**31


def compare(got, want, inputs, dtype: torch.dtype, names=NAMES, whole_stem: bool = False) -> None:
    """The output, then the gradient of each input, within the bounds of `dtype`; each in the dtype it is to have."""
    (output, *gradients), (expected, *wanted) = got, want
    assert output.dtype == dtype
    assert output.is_contiguous()
    assert relative_error(output, expected) <= bound(dtype, whole_stem)
    for name, value, gradient, expected in zip(names, inputs, gradients, wanted, strict=True):
        assert gradient.dtype == value.dtype, name
        assert relative_error(gradient, expected) <= bound(dtype, whole_stem, gradient=True), name


def same_bits(got, want) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def spread(value: Tensor) -> Tensor:
    """The same numbers as every second element of a bigger tensor, axes back to front."""
    big = torch.randn(*(2 * n for n in reversed(value.shape)), dtype=value.dtype, device=value.device)
    view = big[tuple(slice(None, None, 2) for _ in value.shape)].permute(*reversed(range(value.dim())))
    view.copy_(value)
    assert not view.is_contiguous()
    return view


def far_apart(*values: Tensor) -> list[Tensor]:
    """Views whose second batch lies 2³¹ elements behind the first; the memory between is never touched."""
    far = BEYOND + 256
    giant = torch.empty(far + sum(value[0].numel() for value in values), device=values[0].device)
    views, start = [], 0
    for value in values:
        assert len(value) == 2
        views.append(giant[start:].as_strided(value.shape, (far, *value.stride()[1:])).copy_(value))
        start += value[0].numel()
    return views


def check_strides(run, inputs, cotangent, output: float, gradient: float) -> None:
    """Inputs and cotangents through their strides, spread and expanded: results are as of contiguous ones.

    Args:
        run: from inputs and cotangent to y and the gradients of the inputs.
        output, gradient: relative errors allowed.
    """
    y, *gradients = run(inputs, cotangent)
    y2, *gradients2 = run([spread(value) for value in inputs], spread(cotangent))
    assert relative_error(y2, y) <= output
    for got, want in zip(gradients2, gradients, strict=True):
        assert relative_error(got, want) <= gradient

    x, decay, frequency, weight = inputs
    same = [x[:1].expand_as(x), decay[:, :1, :1].expand_as(decay), frequency[:1].expand_as(frequency), weight]
    ones = torch.ones((), dtype=cotangent.dtype, device=cotangent.device).expand_as(cotangent)
    for got, want in zip(run(same, ones), run([value.clone() for value in same], ones.clone()), strict=True):
        assert relative_error(got, want) <= gradient


def check_gain_and_z(window: int, points: int, frames: int) -> None:
    """An impulse at the innermost frame answers γ, one a frame further out γz: to a few ulp over all of §6's range.

    Args:
        points: of half the range of decay, and of frequency.
        frames: of the window, from the first on, that get the impulse.
    """
    alpha = torch.cat([torch.linspace(0, 0.5, points), torch.linspace(0.5, 10, points)])
    omega = torch.cat([torch.linspace(0, 0.5, points), torch.linspace(0.5, math.pi, points)])
    decay, frequency = (value.reshape(1, 1, 1, -1) for value in torch.meshgrid(alpha, omega, indexing="ij"))
    weight = torch.ones(decay.shape[3], 1, 1)
    options = {"patch_size": (1, window), "kernel": "bilateral"}
    for frame in range(frames):
        x = torch.zeros(1, 1, 1, window)
        x[..., frame] = 1
        got = sblu(x, decay, frequency, weight, **options)[0, 0, 0].double()
        wide = [value.double() for value in (x, decay, frequency, weight)]
        want = sblu(*wide, **options, backend="reference")[0, 0, 0]
        error = torch.hypot(*(got - want)) / torch.hypot(*want)
        assert error.max() <= 2e-6


@contextlib.contextmanager
def poisoned_memory():
    """Whatever the allocator hands out is filled with NaN first."""
    plain = torch.Tensor.new_empty
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", lambda self, *a, **k: plain(self, *a, **k).fill_(math.nan))
        assert torch.zeros(1).new_empty(3).isnan().all()
        yield
