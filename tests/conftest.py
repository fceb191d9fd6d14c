"""Shared by all tests: fresh random input on every run, reported so that a failure can be repeated."""

import os
import random

import pytest
import torch
from hypothesis import settings

from aape_kernels.backends import cpu, native

# Triton decides when it is first imported whether it interprets kernels: here, unless there is a GPU to compile for.
# Each test then starts without the variable, and those of the interpreter set it again.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

settings.register_profile("aape", deadline=None, print_blob=True)
settings.load_profile("aape")

SEED = int(os.environ.get("AAPE_TEST_SEED", random.SystemRandom().randrange(2**31)))


def pytest_report_header() -> str:
    return f"aape_kernels: AAPE_TEST_SEED={SEED}, torch {torch.__version__}, {torch.get_num_threads()} threads"


INSTRUCTION_SETS = tuple(native.load().build_info()["instruction_sets"]) if cpu.NATIVE_BUILT else ()


@pytest.fixture(params=["reference", *(f"cpu-{name}" for name in INSTRUCTION_SETS)])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every backend that runs here, the CPU's once per instruction set, as what "auto" takes."""
    name, _, instruction_set = request.param.partition("-")
    monkeypatch.setenv("AAPE_BACKEND", name)
    monkeypatch.setenv("AAPE_CPU_ISA", instruction_set)
    return name


@pytest.fixture(autouse=True)
def _seed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(SEED)
    for name in ("AAPE_BACKEND", "AAPE_CPU_ISA", "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)
