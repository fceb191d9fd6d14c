"""Builds the native module with CMake. All metadata is in pyproject.toml; torch is not needed here.

The environment variable AAPE_NATIVE says what a machine without a C++ compiler means:
    auto      (unless set) leave the native module out, with one line saying so
    require   an error
    off       leave it out: a pure-Python wheel
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import SetupError

ROOT = Path(__file__).resolve().parent
MODE = os.environ.get("AAPE_NATIVE", "auto")
if MODE not in ("auto", "require", "off"):
    raise SetupError(f"AAPE_NATIVE: expected auto, require or off, got {MODE!r}")


def skip(why):
    """Leave the native module out with one line, or stop where it is required."""
    if MODE == "require":
        raise SetupError(f"aape_kernels: the native module cannot be built: {why} (AAPE_NATIVE=require)")
    print(f"aape_kernels: the native module is left out: {why}; the PyTorch backends work without it", file=sys.stderr)


def missing_tool():
    """What the build needs and this machine lacks, or None."""
    compilers = [os.environ.get("CXX", "").split(" ")[0], "c++", "g++", "clang++"]
    if sys.platform != "win32" and not any(name and shutil.which(name) for name in compilers):
        return "no C++ compiler was found (set CXX, or install g++ or clang++)"
    for tool in ("cmake", "ninja"):
        if not shutil.which(tool):
            return f"{tool} was not found"
    try:
        import pybind11  # noqa: F401
    except ImportError:
        return "pybind11 was not found"
    return None


class CMakeBuild(build_ext):
    """Hands the one extension to CMake; without a working compiler it is left out or an error, as AAPE_NATIVE says."""

    def build_extension(self, ext):
        """Configure and build, into the place where setuptools expects the module."""
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "cmake"
        configure = [
            "cmake",
            # a build folder left by another (isolated) environment points to tools that are gone
            "--fresh",
            *("-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DAAPE_VERSION={self.distribution.get_version()}",
        ]
        try:
            subprocess.run(configure, check=True)
            subprocess.run(["cmake", "--build", str(build)], check=True)
        except subprocess.CalledProcessError as error:
            skip(f"{error.cmd[0]} failed, see its output above")


extensions = []
if MODE != "off":
    lacking = missing_tool()
    if lacking:
        skip(lacking)
    else:
        extensions = [Extension("aape_kernels._native", sources=[], optional=MODE != "require")]

setup(ext_modules=extensions, cmdclass={"build_ext": CMakeBuild})
