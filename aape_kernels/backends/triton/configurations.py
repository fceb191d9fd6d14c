"""Launch configurations: from a small table, or with `AAPE_AUTOTUNE=1` the fastest of a few, searched once and kept.

The table is keyed by compute capability and size class. Without a measured row, the default applies.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import triton

__all__ = ["CANDIDATES", "DEFAULTS", "Configuration", "candidates", "configuration"]

LOG = logging.getLogger("aape_kernels")


@dataclass(frozen=True)
class Configuration:
    """How a kernel is launched.

    Attributes:
        tokens: tokens that a program works on at once, a power of 2, at least 16.
        num_warps: warps per program.
        num_stages: depth of the software pipeline for loads in loops.
    """

    tokens: int
    num_warps: int
    num_stages: int


# Below this many tokens, programs take smaller blocks, so that every multiprocessor gets some.
SMALL = 8192

# (kernel, size class) -> configuration if TABLE has none for the capability, and on AMD: the largest blocks that spill
# no register on any target of the tests.
DEFAULTS = {
    ("sblu_fwd", "small"): Configuration(16, 4, 1),
    ("sblu_fwd", "large"): Configuration(16, 4, 1),
    ("sblu_bwd_state", "small"): Configuration(16, 4, 1),
    ("sblu_bwd_state", "large"): Configuration(16, 4, 1),
    ("sblu_bwd_weight", "small"): Configuration(16, 4, 1),
    ("sblu_bwd_weight", "large"): Configuration(32, 4, 1),
    ("sblu_bwd_window", "small"): Configuration(16, 4, 1),
    ("sblu_bwd_window", "large"): Configuration(32, 4, 1),
    ("stem_fwd", "small"): Configuration(16, 4, 1),
    ("stem_fwd", "large"): Configuration(16, 4, 1),
    ("gather", "small"): Configuration(16, 4, 1),
    ("gather", "large"): Configuration(32, 4, 1),
}

# (major compute capability, kernel, size class, whether products have 16-bit operands and states are few) -> the
# configuration that measured better, with no spills: on an H200, for 32,768 tokens of 32 states (benchmarks/results).
TABLE = {
    (9, "sblu_bwd_weight", "large", False): Configuration(16, 2, 1),
    (9, "stem_fwd", "large", True): Configuration(32, 2, 1),
}

# What `AAPE_AUTOTUNE=1` tries: more tokens per warp spill registers in every kernel.
CANDIDATES = tuple(
    Configuration(tokens, warps, 1) for tokens in (16, 32, 64) for warps in (2, 4, 8) if tokens <= 16 * warps
)
# Kernels whose loops Triton pipelines: for the others, the stages do not even change the machine code.
PIPELINED = ("stem_fwd",)
STAGES = (1, 2, 3)


def candidates(kernel: str) -> tuple[Configuration, ...]:
    """The configurations that a search tries for `kernel`."""
    stages = STAGES if kernel in PIPELINED else STAGES[:1]
    return tuple(replace(candidate, num_stages=n) for n in stages for candidate in CANDIDATES)


def configuration(
    kernel: str,
    rows: int,
    key: str,
    device: torch.device,
    run: Callable[[Configuration], None],
    narrow: bool = False,
) -> Configuration:
    """The configuration for `kernel` on `rows` tokens.

    Args:
        narrow: whether its products have 16-bit operands and its blocks at most 32 states.
        key: what else a search depends on: sizes and dtypes of the call, except those that vary with the batch.
        run: launches the kernel with a configuration; a search calls it many times, so it must only write outputs.
    """
    size = "small" if rows < SMALL else "large"
    found = TABLE.get((_capability(device), kernel, size, narrow))
    usual = DEFAULTS[kernel, size] if found is None else found
    if device.type == "cuda" and os.environ.get("AAPE_AUTOTUNE") == "1":
        return _searched(f"{_machine(device.index or 0)} {kernel} {size} {key}", kernel, run, usual)
    return usual


@functools.cache
def _capability(device: torch.device) -> int:
    """The major compute capability; 0 for anything but an NVIDIA GPU."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    return int(torch.cuda.get_device_properties(device).major) if nvidia else 0


@functools.cache
def _machine(index: int) -> str:
    return f"{torch.cuda.get_device_name(index)}, triton {triton.__version__},"


def cache_file() -> Path:
    """Where searched configurations are kept: `AAPE_AUTOTUNE_CACHE`, or a file in the user's cache folder."""
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(os.environ.get("AAPE_AUTOTUNE_CACHE") or os.path.join(folder, "aape_kernels", "autotune.json"))


def _searched(key: str, kernel: str, run: Callable[[Configuration], None], usual: Configuration) -> Configuration:
    """The fastest candidate, kept in memory and in `cache_file()`. While a graph is being captured, nothing can be
    timed: then the one found before, or the usual one."""
    kept = _kept()
    if key not in kept:
        if torch.cuda.is_current_stream_capturing():
            return usual
        times = timed(key, run, dict.fromkeys((usual, *candidates(kernel))))
        kept[key] = min(times, key=times.__getitem__, default=usual)
        LOG.info("AAPE_AUTOTUNE: %s takes %s", key, kept[key])
        _keep(key, kept[key])
    return kept[key]


def timed(
    key: str, run: Callable[[Configuration], None], chosen: Iterable[Configuration]
) -> dict[Configuration, float]:
    """Milliseconds of each configuration that can run, by `triton.testing.do_bench`.

    Those that cannot are left out, whatever the reason: a search must not fail where the usual configuration works.

    Errors: `RuntimeError` if a candidate has left the device in an error state, as an illegal access does: everything
        after it in this process fails, too.
    """
    times: dict[Configuration, float] = {}
    for candidate in chosen:
        try:
            times[candidate] = triton.testing.do_bench(functools.partial(run, candidate), warmup=5, rep=20)
        except triton.runtime.errors.OutOfResources:
            continue
        except Exception as error:
            try:
                torch.cuda.synchronize()
            except Exception as sticky:
                raise RuntimeError(f"AAPE_AUTOTUNE: {key} with {candidate}: the device is lost: {sticky}") from error
            LOG.warning("AAPE_AUTOTUNE: %s with %s cannot run: %s: %s", key, candidate, type(error).__name__, error)
    return times


def _read() -> dict[str, Configuration]:
    try:
        found = json.loads(cache_file().read_text(encoding="utf-8"))
        return {key: Configuration(**value) for key, value in found.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        LOG.warning("AAPE_AUTOTUNE: %s cannot be read and is searched anew: %s", cache_file(), error)
        return {}


@functools.cache
def _kept() -> dict[str, Configuration]:
    return _read()


def _keep(key: str, found: Configuration) -> None:
    """Add to the cache, keeping what other processes have put there. It is written to another file and renamed, so
    that no reader sees half of it. A failure costs only another search."""
    path = cache_file()
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        every = _read() | {key: found}
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
            temporary = file.name
            json.dump({name: asdict(value) for name, value in every.items()}, file, indent=1)
        os.replace(temporary, path)
    except OSError as error:
        LOG.warning("AAPE_AUTOTUNE: %s cannot be written: %s", path, error)
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
