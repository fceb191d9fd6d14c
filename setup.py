"""Builds the native module with CMake. All metadata is in pyproject.toml; torch is not needed here.

The environment variable AAPE_NATIVE says what a machine without a C++ compiler means:
    auto      (unless set) leave the native module out, with one line saying so
    require   an error
    off       leave it out: a pure-Python wheel

AAPE_CUDA says likewise what a machine without nvcc means for the module's CUDA kernels: auto, require or off.
AAPE_CUDA_ARCHS names the GPU architectures to build for, "90" or "80-real;90", as CMAKE_CUDA_ARCHITECTURES does.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import SetupError

ROOT = Path(__file__).resolve().parent


def mode(variable):
    """auto, require or off."""
    value = os.environ.get(variable, "auto")
    if value not in ("auto", "require", "off"):
        raise SetupError(f"{variable}: expected auto, require or off, got {value!r}")
    return value


def architectures():
    """AAPE_CUDA_ARCHS as an option of CMake's.

    Numbers only: the module has to know which GPUs it was built for, which CMake's native or all do not say.
    """
    named = re.split(r"[;, ]+", os.environ.get("AAPE_CUDA_ARCHS", "").strip(";, "))
    for name in filter(None, named):
        if not re.fullmatch(r"\d{2,3}[af]?(-real|-virtual)?", name):
            raise SetupError(f"AAPE_CUDA_ARCHS: expected architectures such as 90 or 80-real;90, got {name!r}")
    return [f"-DAAPE_CUDA_ARCHS={';'.join(named)}"] if any(named) else []


MODE, CUDA, ARCHITECTURES = mode("AAPE_NATIVE"), mode("AAPE_CUDA"), architectures()


def skip(why):
    """Leave the native module out with one line, or stop where it is required."""
    if MODE == "require":
        raise SetupError(f"aape_kernels: the native module cannot be built: {why} (AAPE_NATIVE=require)")
    print(f"aape_kernels: the native module is left out: {why}; the PyTorch backends work without it", file=sys.stderr)


def skip_cuda(why):
    """The same for its CUDA kernels."""
    if CUDA == "require":
        raise SetupError(f"aape_kernels: the CUDA kernels cannot be built: {why} (AAPE_CUDA=require)")
    print(f"aape_kernels: the CUDA kernels are left out: {why}; Triton serves GPUs without them", file=sys.stderr)


def find_nvcc():
    """The CUDA compiler: what CUDACXX names, else on the path or of the usual toolkit; None if there is none."""
    named = os.environ.get("CUDACXX")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    usual = ["nvcc", *(os.path.join(home, "bin", "nvcc") for home in homes if home)]
    return next((found for found in map(shutil.which, [named] if named else usual) if found), None)


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
        """With the CUDA kernels where nvcc is found and works, without them elsewhere."""
        if CUDA != "off":
            nvcc = find_nvcc()
            if nvcc is None:
                skip_cuda('no nvcc was found (set CUDACXX, or `pip install "cuda-toolkit[nvcc,cudart,cccl]"`)')
            else:
                try:
                    return self.run_cmake(ext, "-DAAPE_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}", *ARCHITECTURES)
                except subprocess.CalledProcessError as error:
                    skip_cuda(f"{error.cmd[0]} failed with {nvcc}, see its output above")
        try:
            self.run_cmake(ext)
        except subprocess.CalledProcessError as error:
            skip(f"{error.cmd[0]} failed, see its output above")

    def run_cmake(self, ext, *options):
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
            *options,
        ]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)


extensions = []
if MODE != "off":
    lacking = missing_tool()
    if lacking:
        skip(lacking)
    else:
        extensions = [Extension("aape_kernels._native", sources=[], optional="require" not in (MODE, CUDA))]

setup(ext_modules=extensions, cmdclass={"build_ext": CMakeBuild})
