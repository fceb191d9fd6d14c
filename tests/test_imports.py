"""Importing the package needs torch and nothing else."""

import subprocess
import sys
from importlib.metadata import version

import aape_kernels

NOT_IMPORTED = (
    "triton",
    "torchaudio",
    "timm",
    "transformers",
    "torchvision",
    "huggingface_hub",
    "lightning",
    "aape_kernels._native",
    "aape_kernels.doctor",
    "aape_kernels.self_test",
    "aape_ssl",
    "matplotlib",
)


def test_import_brings_no_optional_library():
    code = (
        "import sys, torch; before = set(sys.modules)\n"
        "from aape_kernels import AaPE\n"
        "print(*sorted(set(sys.modules) - before))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    brought = run.stdout.split()
    assert "aape_kernels.stem" in brought
    assert not [name for name in brought if name.startswith(NOT_IMPORTED)]
    assert {name.partition(".")[0] for name in brought} <= {"aape_kernels", *sys.stdlib_module_names}


def test_public_names():
    names = {"AaPE", "band_from_hz", "decay_from_hz", "embed", "replace_stem", "revert_stem", "sblu"}
    assert set(aape_kernels.__all__) == names
    assert all(getattr(aape_kernels, name).__doc__ for name in aape_kernels.__all__)


def test_version():
    assert aape_kernels.__version__ == version("aape-kernels")
