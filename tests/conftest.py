"""Shared by all tests: fresh random input on every run, reported so that a failure can be repeated."""

import gc
import importlib
import os
import random
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import triton_interpreter
from filelock import FileLock
from hypothesis import settings

from aape_kernels.backends import cpu, native, triton

# Triton decides when kernels are defined whether it interprets them: here, before any test can import them, unless
# there is a GPU to compile for. Each test then starts without the variable, and those of the interpreter set it again.
if triton.TRITON_INSTALLED and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    importlib.import_module("aape_kernels.backends.triton.launch")
    triton_interpreter.remember_builtins()

# what they assert is said in full, as in a test
pytest.register_assert_rewrite("checks", "on_gpu")

import emulated  # noqa: E402
from on_gpu import running  # noqa: E402  # it imports checks

settings.register_profile("aape", deadline=None, print_blob=True)
settings.load_profile("aape")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # workers wait for each other's OpenMP threads, where there are as many as processors

# A shell's background job ignores it, and so would every process that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Of all workers of pytest-xdist, which are processes of this one.
SEED = int(os.environ.setdefault("AAPE_TEST_SEED", str(random.SystemRandom().randrange(2**31))))


def pytest_report_header(config: pytest.Config) -> list[str]:
    lines = [f"AAPE_TEST_SEED={SEED}, torch {torch.__version__}, {torch.get_num_threads()} threads"]
    # pytest-xdist 3.8 writes a test's group into this attribute, which pytest 9.2 does not have
    if config.getoption("dist", "no") == "loadgroup" and not hasattr(pytest.Item, "_nodeid"):
        lines.append(
            f"pytest {pytest.__version__} knows no groups of pytest-xdist: what takes long is made by every worker"
        )
    return [f"aape_kernels: {line}" for line in lines]


# Fixtures that take long, which every worker of pytest-xdist would make for itself: their tests are one worker's.
OF_ONE_WORKER = frozenset({"cubins", "installed", "programs", "recorder", "site"})


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    there = torch.cuda.is_available()
    for item in items:
        if item.get_closest_marker("gpu") and not there:
            item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))
        for name in OF_ONE_WORKER.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.xdist_group(name))


INSTRUCTION_SETS = tuple(native.load().build_info()["instruction_sets"]) if cpu.NATIVE_BUILT else ()


@pytest.fixture(params=["reference", *(f"cpu-{name}" for name in INSTRUCTION_SETS)])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every backend that runs here, the CPU's once per instruction set, as what "auto" takes."""
    name, _, instruction_set = request.param.partition("-")
    monkeypatch.setenv("AAPE_BACKEND", name)
    monkeypatch.setenv("AAPE_CPU_ISA", instruction_set)
    return name


@pytest.fixture(params=running())
def gpu(request: pytest.FixtureRequest) -> str:
    """The name of a GPU backend that runs here."""
    return request.param


@pytest.fixture(scope="session")
def emulated_objects(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """csrc/cuda compiled for the CPU, on all processors: once, by the first of the workers that asks."""
    if emulated.compiler() is None:
        pytest.skip("no host compiler was found")
    root = tmp_path_factory.getbasetemp()
    shared = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "emulated"
    with FileLock(f"{shared}.lock"):
        if not shared.exists():
            building = tmp_path_factory.mktemp("building")
            emulated.build(building)
            building.rename(shared)
    return sorted(shared.glob("*.o"))


@pytest.fixture(scope="session")
def emulated_module(emulated_objects: list[Path], tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """Those objects as a module."""
    return emulated.link(emulated_objects, tmp_path_factory.mktemp("module"), "emulated_module")


@pytest.fixture
def much_memory() -> Iterator[None]:
    """One test at a time takes many gigabytes, also where tests run side by side."""
    import fcntl

    with open(Path(tempfile.gettempdir()) / "aape-gpu-memory.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        gc.collect()
        torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def _memory_goes_back() -> Iterator[None]:
    """To the device, for tests that run side by side."""
    yield
    if torch.cuda.is_available() and torch.cuda.memory_reserved() > 2**30:
        gc.collect()
        torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def _seed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(SEED)
    for name in ("AAPE_BACKEND", "AAPE_CPU_ISA", "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)
