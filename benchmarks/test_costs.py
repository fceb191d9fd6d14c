"""Rows of the table: the patch-embedding stem and SBLU alone, and the time to import the package."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from .cases import Sizes
from .check import DIRECTIONS
from .measure import Session, spread
from .peers import Peer

batches = pytest.mark.parametrize("batch", [1, 8], ids=["B1", "B8"])
directions = pytest.mark.parametrize("direction", DIRECTIONS)

# Batch and sizes: narrow models, short clips and few tokens have less of a product to hide behind; many clips have all.
NARROW = {"patch": (16, 4), "stride": (16, 4), "window": 4}
OTHERS = {
    "B8-D384": (8, Sizes(dim=384)),
    "B8-D192": (8, Sizes(dim=192)),
    "B1-D192": (1, Sizes(dim=192)),
    "B64": (64, Sizes()),
    "B8-128x128": (8, Sizes(frames=128)),
    "B8-80x208-16x4": (8, Sizes(mel_bins=80, frames=208, **NARROW)),
    "B8-80x208": (8, Sizes(mel_bins=80, frames=208)),
    "B8-80x208-D192": (8, Sizes(mel_bins=80, frames=208, dim=192)),
}

# Under bfloat16 autocast.
AUTOCAST = {
    "B8": (8, Sizes()),
    "B8-D384": (8, Sizes(dim=384)),
    "B8-D192": (8, Sizes(dim=192)),
    "B1": (1, Sizes()),
}

# What of the responses reaches the token, and how many states there are to respond.
FEATURES = {
    f"{features}-S{states}-D{dim}": Sizes(dim=dim, states=states, features=features)
    for dim in (768, 192)
    for states in (16, 32)
    for features in ("complex", "magnitude", "both")
    if (states, features) != (16, "both")  # which are above
}

IMPORT = """
import time
import torch
start = time.perf_counter()
from aape_kernels import AaPE
print(time.perf_counter() - start)
"""
IMPORT_LIMIT = 0.2  # seconds beyond torch
IMPORT_ROUNDS = 5


@batches
@directions
def test_stem(benchmark: Any, session: Session, stem: Peer, direction: str, batch: int) -> None:
    """The whole stem, (B, 1, 128, 1024) -> contiguous (B, 512, 768)."""
    session.measure(benchmark, stem, "stem", direction, batch)


@pytest.mark.parametrize("case", OTHERS.values(), ids=OTHERS.keys())
@directions
def test_other_sizes(
    benchmark: Any, session: Session, own_or_products: Peer, direction: str, case: tuple[int, Sizes]
) -> None:
    """This package's stems where Conv2d's product is smaller, or larger, and the products that they cannot avoid."""
    batch, sizes = case
    session.measure(benchmark, own_or_products, "stem", direction, batch, sizes)


@pytest.mark.parametrize("case", AUTOCAST.values(), ids=AUTOCAST.keys())
@directions
def test_autocast(benchmark: Any, session: Session, own_stem: Peer, direction: str, case: tuple[int, Sizes]) -> None:
    """This package's stems beside Conv2d's, both under bfloat16 autocast."""
    batch, sizes = case
    session.measure(benchmark, own_stem, "stem", direction, batch, sizes, mode="autocast bfloat16")


@pytest.mark.parametrize("sizes", FEATURES.values(), ids=FEATURES.keys())
@directions
def test_features(benchmark: Any, session: Session, own_stem: Peer, direction: str, sizes: Sizes) -> None:
    """This package's stems at batch 8 by features and states."""
    session.measure(benchmark, own_stem, "stem", direction, 8, sizes)


@batches
@directions
def test_sblu(benchmark: Any, session: Session, filters: Peer, direction: str, batch: int) -> None:
    """SBLU alone, (B, 1, 128, 1024) -> (B, 8, 64, 2, 16)."""
    session.measure(benchmark, filters, "sblu", direction, batch)


def test_import(benchmark: Any) -> None:
    """Seconds that `from aape_kernels import AaPE` takes beyond `import torch`, in processes of their own."""
    seconds = []

    def run() -> None:
        output = subprocess.run([sys.executable, "-c", IMPORT], check=True, capture_output=True, text=True).stdout
        seconds.append(float(output))

    benchmark.group = "import"
    benchmark.pedantic(run, rounds=IMPORT_ROUNDS)
    benchmark.extra_info.update(op="import", seconds=spread(seconds), limit=IMPORT_LIMIT, rounds=len(seconds))
