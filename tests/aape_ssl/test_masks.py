"""Masks over the token grid: exact counts, keys, and what blocks look like."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aape_ssl.method.masks import Masks, MaskSampler

SAMPLERS = st.builds(
    MaskSampler,
    num_masks=st.integers(1, 4),
    kind=st.sampled_from(["random", "inverse_block"]),
    ratio=st.none() | st.floats(0.01, 0.99),
    block=st.integers(1, 6),
    seed=st.integers(0, 2**40),
)
GRIDS = st.tuples(st.integers(1, 9), st.integers(1, 9)).filter(lambda grid: grid[0] * grid[1] > 1)
INDICES = st.lists(st.integers(0, 2**40), max_size=4).map(lambda indices: torch.tensor(indices, dtype=torch.int64))
STEPS = st.integers(0, 2**33)


@given(SAMPLERS, GRIDS, INDICES, STEPS, st.integers(0, 8))
def test_every_token_is_visible_or_masked_once(sampler, grid, index, step, micro_batch):
    masks = sampler(index, grid, step, micro_batch)
    tokens, visible = grid[0] * grid[1], sampler.num_visible(grid)
    assert masks.visible.shape == (len(index), sampler.num_masks, visible)
    every = torch.arange(tokens).expand(len(index), sampler.num_masks, -1)
    assert torch.equal(torch.cat(masks, -1).sort(-1).values, every)
    assert all((numbers.diff(dim=-1) > 0).all() for numbers in masks)
    ratio = sampler.ratio or {"random": 0.7, "inverse_block": 0.8}[sampler.kind]
    assert 1 <= visible < tokens
    assert abs(visible - (1 - ratio) * tokens) <= 0.5 or visible in (1, tokens - 1)


@given(SAMPLERS, GRIDS, INDICES, STEPS)
def test_a_clips_masks_depend_on_its_key_alone(sampler, grid, index, step):
    """Neither on the other clips of the batch, nor their order, nor global generators."""
    masks = sampler(index, grid, step)
    torch.manual_seed(step % 2**32)
    for i, clip in enumerate(index):
        assert all(
            map(torch.equal, Masks(masks.visible[i], masks.masked[i]), (m[0] for m in sampler(clip[None], grid, step)))
        )


@pytest.mark.parametrize("kind", ["random", "inverse_block"])
def test_every_part_of_the_key_matters(kind):
    index = torch.tensor([3])
    draws = [
        MaskSampler(kind=kind, seed=seed)(index + clip, (8, 8), step, micro_batch).visible
        for seed, step, micro_batch, clip in [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
    ]
    views = torch.cat(draws).flatten(0, 1)
    assert len(views.unique(dim=0)) == len(views) == 20


@pytest.mark.parametrize("kind", ["random", "inverse_block"])
def test_tokens_are_visible_equally_often(kind):
    """Over 4,000 masks every token of the random kind, and every one a block from the edge, within 5 σ."""
    sampler = MaskSampler(num_masks=4, kind=kind, block=3)
    grid = (10, 10)
    masks = sampler(torch.arange(1000), grid, 0)
    share = sampler.num_visible(grid) / 100
    often = torch.bincount(masks.visible.flatten(), minlength=100).view(grid) / 4000
    error = 5 * (share * (1 - share) / 4000) ** 0.5
    inner = often if kind == "random" else often[2:-2, 2:-2]
    assert (inner - inner.mean()).abs().max() < error
    assert (often - share).abs().max() < max(error, 0.1 * share)


def _blocks_in_turn(sampler: MaskSampler, grid: tuple[int, int], key: tuple[int, ...]) -> list[list[int]]:
    """The tokens of every block, in the order in which blocks turn visible."""
    generator = np.random.default_rng(key)
    generator.random((1, *grid))
    positions = torch.from_numpy(generator.random((1, grid[0] + sampler.block - 1, grid[1] + sampler.block - 1)))[0]
    blocks = []
    for position in positions.flatten().argsort().tolist():
        row, column = divmod(position, positions.shape[1])  # the block's last
        rows, columns = (range(max(last - sampler.block + 1, 0), last + 1) for last in (row, column))
        blocks.append([i * grid[1] + j for i in rows for j in columns if i < grid[0] and j < grid[1]])
    return blocks


@given(GRIDS, st.integers(1, 6), st.floats(0.05, 0.95), st.integers(0, 2**40))
def test_inverse_blocks_turn_visible_one_after_the_other(grid, block, ratio, clip):
    """All of the first ones, and of the last one, which would be too much, a part."""
    sampler = MaskSampler(1, "inverse_block", ratio, block, seed=7)
    visible = set(sampler(torch.tensor([clip]), grid, 5, 1).visible[0, 0].tolist())
    whole: set[int] = set()
    for tokens in _blocks_in_turn(sampler, grid, (7, 5, 1, clip)):
        if len(whole | set(tokens)) > len(visible):
            assert whole <= visible <= whole | set(tokens)
            break
        whole |= set(tokens)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "block"}, "kind: expected one of random, inverse_block, got 'block'"),
        ({"num_masks": 0}, "num_masks: expected an int, at least 1, got 0"),
        ({"block": 2.5}, "block: expected an int, at least 1, got 2.5"),
        ({"seed": -1}, "seed: expected an int, at least 0, got -1"),
        ({"ratio": 1.0}, r"ratio: expected a number in \(0, 1\), got 1.0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        MaskSampler(**options)


def test_a_single_token_cannot_be_masked():
    with pytest.raises(ValueError, match=r"grid: expected at least two tokens.*got \(1, 1\)"):
        MaskSampler()(torch.tensor([0]), (1, 1), 0)
