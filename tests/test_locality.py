"""Which tokens a pixel reaches: its own, exactly."""

import math

import pytest
import torch
from cases import AWKWARD, SQUARE, Case
from hypothesis import given, settings
from hypothesis import strategies as st

from aape_kernels import AaPE, sblu

pytestmark = pytest.mark.usefixtures("backend")


def stem_for(case: Case) -> AaPE:
    stem = AaPE(
        patch_size=case.patch,
        in_chans=case.channels,
        embed_dim=6,
        stride=case.stride,
        num_states=case.states,
        encoder_dim=4,
        window=case.window,
        kernel=case.kernel,
        band=(0.1, 3.0),
    )
    return stem.double()


def tokens_holding(case: Case, mel: int, frame: int, patch: bool, window: bool) -> torch.Tensor:
    """Mask (N_f, N_t) of the tokens whose patch or window holds a pixel."""
    mask = torch.zeros(case.grid, dtype=torch.bool)
    offset = (case.patch[1] - case.window) // 2
    for i in range(case.grid[0]):
        for j in range(case.grid[1]):
            first_mel, first = i * case.stride[0], j * case.stride[1]
            in_row = first_mel <= mel < first_mel + case.patch[0]
            in_patch = first <= frame < first + case.patch[1]
            in_window = first + offset <= frame < first + offset + case.window
            mask[i, j] = in_row and ((patch and in_patch) or (window and in_window))
    return mask


NARROW = Case(1, 1, 2, (3, 8), (2, 9), 4, (2, 3), (0, 3), "quadrature")
"""K < P_t, with gaps between patches."""


def test_a_non_finite_pixel_reaches_exactly_the_tokens_that_hold_it():
    @settings(max_examples=60)
    @given(case=st.sampled_from([SQUARE, AWKWARD, NARROW]), data=st.data())
    def every(case, data):
        check_non_finite(case, data)

    every()


def check_non_finite(case, data):
    (x, decay, frequency, weight), _ = case.inputs()
    mel = data.draw(st.integers(0, case.size[0] - 1))
    frame = data.draw(st.integers(0, case.size[1] - 1))
    x[0, -1, mel, frame] = data.draw(st.sampled_from([math.nan, math.inf, -math.inf]))

    y = sblu(x, decay, frequency, weight, **case.options)
    reached = ~y.isfinite().flatten(3).all(-1)
    assert torch.equal(reached[0], tokens_holding(case, mel, frame, patch=False, window=True))
    assert not reached[1:].any()

    tokens = stem_for(case)(x).unflatten(1, case.grid)
    reached = ~tokens.isfinite().all(-1)
    assert torch.equal(reached[0], tokens_holding(case, mel, frame, patch=True, window=True))
    assert not reached[1:].any()


@pytest.mark.parametrize("window", [2, 8, 12])
def test_a_pixel_moves_its_neighbours_only_with_a_longer_window(window):
    case = Case(1, 1, 4, (4, 8), (4, 8), window, (2, 5), (0, 0), "quadrature")
    stem = stem_for(case)
    x = torch.randn(1, 1, *case.size, dtype=torch.float64)
    changed = x.clone()
    changed[0, 0, 4:, 16:24] += 1.0  # token (1, 2)
    moved = (stem(changed) - stem(x)).abs().amax(-1).unflatten(1, case.grid)[0] > 0
    expected = torch.zeros(case.grid, dtype=torch.bool)
    expected[1, 2] = True
    if window > 8:
        expected[1, 1] = expected[1, 3] = True
    assert torch.equal(moved, expected)


def test_gradients_of_one_token_stay_in_its_patch():
    stem = stem_for(SQUARE)
    x = torch.randn(1, 1, *SQUARE.size, dtype=torch.float64, requires_grad=True)
    stem(x)[0, 4].square().sum().backward()  # token (1, 1)
    assert x.grad[0, 0, 4:8, 8:16].all()
    x.grad[0, 0, 4:8, 8:16] = 0
    assert not x.grad.any()
