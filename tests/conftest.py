"""Shared by all tests: fresh random input on every run, reported so that a failure can be repeated."""

import os
import random

import pytest
import torch
from hypothesis import settings

settings.register_profile("aape", deadline=None, print_blob=True)
settings.load_profile("aape")

SEED = int(os.environ.get("AAPE_TEST_SEED", random.SystemRandom().randrange(2**31)))


def pytest_report_header() -> str:
    return f"aape_kernels: AAPE_TEST_SEED={SEED}, torch {torch.__version__}, {torch.get_num_threads()} threads"


@pytest.fixture(autouse=True)
def _seed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(SEED)
    monkeypatch.delenv("AAPE_BACKEND", raising=False)
