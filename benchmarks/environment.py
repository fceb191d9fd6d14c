"""The machine a run was made on, and the allocator it was made with."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from aape_kernels.backends import Call, reasons
from aape_kernels.doctor import cpu_model

__all__ = ["PINNED", "allocator", "allocator_environment", "cpu_model", "describe", "describe_gpu"]

# Freed memory is kept and every size comes from the heap: what glibc does by default, returning a block of 12 MB to
# the system and taking the page faults again at the next call, costs as much as the operations measured here.
PINNED = {
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_MMAP_THRESHOLD_": str(2**40),
    "MALLOC_TOP_PAD_": str(2**28),
}


def allocator_environment(wanted: str, environment: Mapping[str, str]) -> dict[str, str] | None:
    """The environment a process has to start with for the allocator setting `wanted`, "pinned" or "default".

    None if `environment` has it already, or where the allocator is not glibc's.
    """
    if platform.libc_ver()[0] != "glibc":
        return None
    fixed = {name: value for name, value in environment.items() if name not in PINNED}
    if wanted == "pinned":
        fixed |= PINNED
    return None if fixed == dict(environment) else fixed


def allocator(environment: Mapping[str, str]) -> str:
    """The allocator setting of a process started with `environment`: "pinned", "default" or what it is instead."""
    library, release = platform.libc_ver()
    if environment.get("LD_PRELOAD"):
        return f"LD_PRELOAD={environment['LD_PRELOAD']}"
    if library != "glibc":
        return f"{platform.system()}'s"
    setting = {name: environment[name] for name in PINNED if name in environment}
    kind = "default" if not setting else "pinned" if setting == PINNED else f"{setting}"
    return f"{kind} (glibc {release})"


def _busy_seconds() -> float | None:
    """What all cores have worked since the machine was started, stolen time included; None where Linux does not say."""
    try:
        _, *ticks = Path("/proc/stat").read_text().splitlines()[0].split()
    except (OSError, IndexError):
        return None
    user, nice, system, _, _, irq, softirq, steal = map(int, ticks[:8])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _load() -> float | None:
    """How many cores are kept busy by others, over a second in which this process sleeps.

    Elsewhere the load average of the last minute: a build that has just ended is still in it.
    """
    before, start = _busy_seconds(), time.monotonic()
    if before is None:
        return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    time.sleep(1)
    after = _busy_seconds()
    return None if after is None else round((after - before) / (time.monotonic() - start), 2)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _said(*command: str) -> str | None:
    """The first line that a command prints, None if it cannot."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None


def describe(device: torch.device) -> dict[str, Any]:
    """What the table's heading and a reader of the JSON need to know; call it before anything is timed."""
    missing = {
        op: {name: why for name, why in reasons(Call(op, device, torch.float32)).items() if why is not None}
        for op in ("embed", "sblu")
    }
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": cpu_model(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": _load(),
        "allocator": allocator(os.environ),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "python": platform.python_version(),
        "aape_kernels": _version("aape-kernels"),
        "pytest_benchmark": _version("pytest-benchmark"),
        "platform": sys.platform,
        "missing_backends": missing,
    }


def describe_gpu(device: torch.device) -> dict[str, Any]:
    """The same with the GPU's own numbers, and what pytest-benchmark would add: commit and date."""
    commit = _said("git", "rev-parse", "--short=10", "HEAD")
    if commit is not None and _said("git", "status", "--porcelain") is not None:
        commit += ", modified"
    about = describe(device) | {
        "driver": None,
        "triton": _version("triton"),
        "commit": commit or "unversioned",
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }
    if device.type != "cuda":
        return about
    properties = torch.cuda.get_device_properties(device)
    return about | {
        "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "memory_bytes": properties.total_memory,
    }
