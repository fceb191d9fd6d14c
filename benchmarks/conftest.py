"""Options, the allocator (by starting the process anew), and what a run records about its machine."""

from __future__ import annotations

import datetime
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from .environment import allocator_environment, describe
from .measure import Session
from .peers import Peer, peers
from .table import render
from .warm import warm

# If every row was refused.
NOTHING_SAVED = "Not saving anything"
# Warnings that are errors by the project's configuration and say nothing about a stem: torch.compile's own use of
# torch.jit, and what pytest-benchmark has to say of a peer that was refused.
HARMLESS = (
    "ignore:.torch.jit.script_method:DeprecationWarning",
    "ignore:Benchmark fixture was not used:pytest_benchmark.logger.PytestBenchmarkWarning",
    f"ignore:{NOTHING_SAVED}:pytest_benchmark.logger.PytestBenchmarkWarning",
)

SESSION = pytest.StashKey[Session]()
MACHINE = pytest.StashKey[dict[str, Any]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """What `pytest benchmarks --help` lists under "stem benchmarks"."""
    group = parser.getgroup("stem benchmarks")
    group.addoption("--device", default="cpu", help="where to run: cpu, cuda or cuda:1 (default: %(default)s)")
    group.addoption("--threads", type=int, default=None, help="CPU threads (default: PyTorch's own choice)")
    group.addoption(
        "--allocator",
        choices=("pinned", "default"),
        default="pinned",
        help="pinned: glibc keeps freed memory; default: as a program finds it (default: %(default)s)",
    )


def _restart(config: pytest.Config, environment: dict[str, str]) -> None:
    """Replace this process by itself with another environment: glibc reads its settings only at the start."""
    capture = config.pluginmanager.getplugin("capturemanager")
    if capture is not None:  # puts the real stdin, stdout and stderr back
        capture.stop_global_capturing()
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise pytest.UsageError(f"--device: expected cpu, cuda or cuda:N, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise pytest.UsageError(f"--device: expected cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError(f"--device {name}: this PyTorch ({torch.__version__}) sees no CUDA device")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise pytest.UsageError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices")
    return device


def pytest_configure(config: pytest.Config) -> None:
    """Settle allocator, device and threads before anything runs."""
    device = _device(config.getoption("--device", "cpu"))
    threads = config.getoption("--threads", None)
    if threads is not None and threads < 1:
        raise pytest.UsageError(f"--threads: expected at least 1, got {threads}")
    # without the option this directory was not named on the command line, and the process is not ours to replace
    wanted = config.getoption("--allocator", None)
    environment = None if wanted is None else allocator_environment(wanted, os.environ)
    if environment is not None:
        _restart(config, environment)
    if threads is not None:
        torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = False  # cuDNN's default would round the Conv2d stem's operands to 10 bits
    if device.type == "cuda":
        torch.cuda.set_device(device)
    for line in HARMLESS:
        config.addinivalue_line("filterwarnings", line)
    # said after the last test, where those lines reach or do not reach by the order of plugins
    warnings.filterwarnings("ignore", NOTHING_SAVED)
    config.option.benchmark_quiet = True  # the table is this suite's own
    config.stash[SESSION] = Session(device)
    config.stash[MACHINE] = describe(device)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Add what pytest-benchmark does not know, and leave out the host's name."""
    machine_info.pop("node", None)
    machine_info["run"] = config.stash[MACHINE]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The table, without the JSON that `python -m benchmarks.table` reads."""
    benchmarks = getattr(getattr(config, "_benchmarksession", None), "benchmarks", [])
    infos = [{"extra_info": bench.extra_info} for bench in benchmarks if "op" in bench.extra_info]
    if infos and MACHINE in config.stash:
        today = datetime.datetime.now().isoformat()
        run = {"benchmarks": infos, "machine_info": {"run": config.stash[MACHINE]}, "datetime": today}
        terminalreporter.write_line("")
        terminalreporter.write_line(render(run))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test a peer that can run on the device chosen."""
    if "stem" in metafunc.fixturenames:
        _parametrize(metafunc, "stem")
    if "own_or_products" in metafunc.fixturenames:
        own = ("aape", "products")
        _parametrize(metafunc, "own_or_products", "stem", lambda row: row.formula in own and not row.compiled)
    if "own_stem" in metafunc.fixturenames:
        _parametrize(metafunc, "own_stem", "stem", lambda row: row.formula == "aape" and not row.compiled)
    if "filters" in metafunc.fixturenames:
        _parametrize(metafunc, "filters", "sblu")


def _parametrize(
    metafunc: pytest.Metafunc, argument: str, op: str | None = None, wanted: Callable[[Peer], bool] = lambda row: True
) -> None:
    device = metafunc.config.stash[SESSION].device
    rows = [row for row in peers(op or argument, device) if wanted(row)]
    metafunc.parametrize(argument, rows, ids=[row.name for row in rows])


@pytest.fixture(scope="session")
def session(request: pytest.FixtureRequest) -> Session:
    """The run's shared state."""
    return request.config.stash[SESSION]


@pytest.fixture(scope="session", autouse=True)
def _compiled_ahead(request: pytest.FixtureRequest, session: Session) -> None:
    cases = []
    for item in request.session.items:
        chosen = getattr(item, "callspec", None)
        values = {} if chosen is None else chosen.params
        peer = values.get("stem") or values.get("filters")
        if peer is not None and peer.compiled:
            op = "stem" if "stem" in values else "sblu"
            cases.append((op, peer.name, values["direction"], values["batch"]))
    warm(cases, session.device)


@pytest.fixture(autouse=True)
def _forget_compiled_graphs() -> None:
    """Every compiled peer starts from nothing; PyTorch would stop compiling at its eighth graph of one function."""
    torch.compiler.reset()
