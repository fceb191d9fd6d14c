"""What `make wheels` builds, installed; and the modes of the build. From a copy of the tree, without a network."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path

import pytest

import aape_kernels

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
KEPT = ("aape_kernels", "python", "csrc", "pyproject.toml", "setup.py", "CMakeLists.txt", "MANIFEST.in")
KEPT += ("README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "constraints.txt")


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """The files that belong to a distribution, without what earlier builds left."""
    target = tmp_path_factory.mktemp("source")
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for name in KEPT:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=ignore)
        else:
            shutil.copy(ROOT / name, target / name)
    return target


def build(kind: str, source: Path, out: Path, **environment: str) -> subprocess.CompletedProcess:
    """Without the CUDA kernels, which take longest, unless AAPE_CUDA is given."""
    environment = {"AAPE_CUDA": "off"} | environment
    command = [sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", str(out), str(source)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> dict[str, str]:
    """An environment with compilers that do not optimise, for builds of which no kernel runs."""
    folder = tmp_path_factory.mktemp("quick")

    def compiler(tool: str, flags: str) -> str:
        path = folder / tool
        path.write_text(f'#!/bin/sh\nexec {shutil.which(tool)} "$@" {flags}\n')
        path.chmod(0o755)
        return str(path)

    return {"CXX": compiler("c++", "-O0"), "CUDACXX": compiler("nvcc", "-Xcicc -O0 -Xptxas -O0")}


def in_troubleshooting(line: str) -> bool:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    return " ".join(line.split()) in " ".join(page.split())


def without_compiler(folder: Path) -> dict[str, str]:
    """An environment in which no C++ compiler is on the path, and everything else of the build is."""
    folder.mkdir()
    for tool in ("cmake", "ninja", "git"):
        found = shutil.which(tool)
        if found:
            (folder / tool).symlink_to(found)
    return {"PATH": str(folder), "CXX": ""}


@pytest.fixture(scope="module")
def dist(tree, tmp_path_factory) -> Path:
    """What `make wheels` leaves in dist/."""
    if sys.platform != "linux" or not find_spec("auditwheel"):
        pytest.skip("auditwheel is not installed")
    out = tmp_path_factory.mktemp("dist")
    (tree / ".ci").mkdir()
    script = shutil.copy(ROOT / ".ci" / "wheels", tree / ".ci")
    done = subprocess.run([script, sys.executable, str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def installed(dist, tmp_path_factory):
    """A folder with what pip takes from `dist`; all else comes from this environment."""

    def install(*options: str) -> Path:
        site = tmp_path_factory.mktemp("site")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", *options]
        command += ["--find-links", str(dist), "--target", str(site), "aape-kernels"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return site

    return {"manylinux": install(), "any": install("--platform", "any", "--only-binary", ":all:")}


def run(site: Path, code: str) -> str:
    """What Python prints with `site` first on its path, away from the source tree.

    Without `site.py`, by which an editable installation would lend its native module.
    """
    path = [str(site), *(folder for folder in sys.path if folder.endswith("-packages"))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
    command = [sys.executable, "-S", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=site)
    assert done.returncode == 0, done.stderr
    return done.stdout


# The OpenMP runtimes are those mapped with torch alone, and after the stem has run.
A_STEM = """
import json, torch

def openmp():
    paths = {line.split()[-1] for line in open("/proc/self/maps")}
    return sorted(path for path in paths if "omp" in path.rpartition("/")[2])

before = openmp()
import aape_kernels
from aape_kernels.backends import Call, reasons

stem, x = aape_kernels.AaPE(embed_dim=8), torch.randn(2, 1, 64, 96)
tokens = stem(x)
tokens.sum().backward()
stem.backend = "reference"
error = ((tokens - stem(x)).norm() / tokens.norm()).item()
why = reasons(Call("embed", x.device, x.dtype))["cpu"]
print(json.dumps([aape_kernels.__file__, aape_kernels.__version__, why, error, before, openmp()]))
"""


def test_the_manylinux_wheel_runs_the_cpu_module(installed):
    site = installed["manylinux"]
    file, version, why, error, before, after = json.loads(run(site, A_STEM))
    assert (file, version) == (str(site / "aape_kernels" / "__init__.py"), aape_kernels.__version__)
    assert why is None
    assert 0 < error < 1e-5
    # torch's own, which the module finds by its name; a copy in the wheel would be a second one
    assert len(after) == 1
    assert after == before
    code = "import aape_kernels._native as n; info = n.build_info(); print(info['version'], info['kernels'])"
    assert run(site, code) == f"{aape_kernels.__version__} ('cpu',)\n"


def test_the_pure_wheel_runs_the_reference(installed):
    site = installed["any"]
    file, version, why, error, _, _ = json.loads(run(site, A_STEM))
    assert (file, version) == (str(site / "aape_kernels" / "__init__.py"), aape_kernels.__version__)
    assert why.startswith("the native module was not built")
    assert error == 0


def test_the_native_module_needs_no_library_but_the_systems_and_openmp(installed):
    (module,) = (installed["manylinux"] / "aape_kernels").glob("_native*")
    table = subprocess.run(["readelf", "-d", module], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", table))
    system = {"libstdc++.so.6", "libgcc_s.so.1", "libm.so.6", "libc.so.6", "libpthread.so.0"}
    assert {name for name in needed - system if not name.startswith("ld-linux")} == {"libgomp.so.1"}
    assert "RPATH" not in table
    assert "RUNPATH" not in table


def test_what_is_in_the_wheels(dist, installed):
    pure, native = sorted(dist.glob("*.whl"), key=lambda wheel: "none-any" not in wheel.name)
    assert pure.name == f"aape_kernels-{aape_kernels.__version__}-py3-none-any.whl"
    assert re.search(r"-cp(\d+)-cp\1-manylinux_\d+_\d+_\w+\.whl$", native.name)
    names = {wheel: set(zipfile.ZipFile(wheel).namelist()) for wheel in (pure, native)}
    for name in ("aape_kernels/py.typed", "aape_kernels/backends/__init__.py", "aape_ssl/cli.py"):
        assert name in names[pure]
    assert any(name.startswith("aape_ssl/demo/clips/") and not name.endswith(".md") for name in names[pure])
    info = f"aape_kernels-{aape_kernels.__version__}.dist-info/"
    roots = {name.partition("/")[0] for name in names[native]}
    assert roots == {"aape_kernels", "aape_ssl", info.rstrip("/")}  # with libraries grafted there were a fourth
    (module,) = {name for name in names[native] - names[pure] if not name.endswith("/")}
    assert module.startswith("aape_kernels/_native.")

    described = {wheel: zipfile.ZipFile(wheel).read(info + "METADATA") for wheel in (pure, native)}
    assert described[pure] == described[native]
    (package,) = distributions(path=[str(installed["any"])])
    assert (package.name, package.version) == ("aape-kernels", aape_kernels.__version__)
    assert [needed for needed in package.requires if "extra" not in needed] == ["torch>=2.11", "numpy"]
    assert package.metadata["License-Expression"] == "Apache-2.0"
    assert [entry.value for entry in package.entry_points] == ["aape_ssl.cli:main"]


def test_without_a_compiler_the_native_module_is_left_out_with_one_line(tree, tmp_path):
    done = build("wheel", tree, tmp_path / "out", **without_compiler(tmp_path / "bin"))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "native module" in line]
    assert set(lines) == {
        "aape_kernels: the native module is left out: no C++ compiler was found (set CXX, or install g++ or clang++); "
        "the PyTorch backends work without it"
    }
    assert in_troubleshooting(lines[0])
    (wheel,) = (tmp_path / "out").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if "_native" in name]


def test_a_required_native_module_is_an_error_without_a_compiler(tree, tmp_path):
    done = build("wheel", tree, tmp_path / "out", AAPE_NATIVE="require", **without_compiler(tmp_path / "bin"))
    assert done.returncode != 0
    assert "the native module cannot be built: no C++ compiler was found" in done.stdout + done.stderr


def test_a_broken_compiler_leaves_it_out_or_is_an_error(tree, tmp_path):
    broken = tmp_path / "broken-c++"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    done = build("wheel", tree, tmp_path / "out", CXX=str(broken))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the native module is left out: cmake failed, see its output above" in done.stderr + done.stdout
    done = build("wheel", tree, tmp_path / "out", CXX=str(broken), AAPE_NATIVE="require")
    assert done.returncode != 0
    assert "the native module cannot be built: cmake failed" in done.stdout + done.stderr


def test_architectures_are_numbers(tree, tmp_path):
    """CMake's native and all would build a module that cannot say what it runs on."""
    done = build("wheel", tree, tmp_path, AAPE_CUDA="auto", AAPE_CUDA_ARCHS="90;native")
    assert done.returncode != 0
    said = "AAPE_CUDA_ARCHS: expected architectures such as 90 or 80-real;90, got 'native'"
    assert said in done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc was found")
def test_cuda_kernels_for_the_architectures_named(tree, quick, tmp_path):
    done = build("wheel", tree, tmp_path, AAPE_CUDA="require", AAPE_CUDA_ARCHS="86,90-real", **quick)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    (module,) = (tmp_path / "site" / "aape_kernels").glob("_native*")
    assert module.stat().st_size < 12e6  # not optimised; what is, test_cuda_compiles weighs
    code = (
        "import aape_kernels._native as n; info = n.build_info();"
        "print(info['kernels'], info['cuda_architectures'], n.cuda.devices()['runtime'] > 0)"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "('cpu', 'cuda') 86,90-real True\n"
    # no libtorch, and the CUDA runtime within: only the driver is asked for, when it is needed
    needed = subprocess.run(["readelf", "-d", module], capture_output=True, text=True, check=True).stdout
    assert not [line for line in needed.splitlines() if "NEEDED" in line and ("cuda" in line or "torch" in line)]


def test_without_nvcc_the_cuda_kernels_are_left_out_with_one_line(tree, quick, tmp_path):
    nowhere = quick | {"CUDACXX": str(tmp_path / "nvcc")}
    done = build("wheel", tree, tmp_path / "out", AAPE_CUDA="auto", **nowhere)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "the CUDA kernels" in line]
    assert lines == [
        "aape_kernels: the CUDA kernels are left out: no nvcc was found (set CUDACXX, or "
        '`pip install "cuda-toolkit[nvcc,cudart,cccl]"`); Triton serves GPUs without them'
    ]
    assert in_troubleshooting(lines[0])
    done = build("wheel", tree, tmp_path / "out", AAPE_CUDA="require", **nowhere)
    assert done.returncode != 0
    assert "the CUDA kernels cannot be built: no nvcc was found" in done.stdout + done.stderr


def test_a_broken_nvcc_leaves_the_cuda_kernels_out(tree, quick, tmp_path):
    broken = tmp_path / "nvcc"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    done = build("wheel", tree, tmp_path / "out", AAPE_CUDA="auto", **quick | {"CUDACXX": str(broken)})
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"the CUDA kernels are left out: cmake failed with {broken}, see its" in done.stdout + done.stderr
    (wheel,) = (tmp_path / "out").glob("*.whl")
    assert any("_native" in name for name in zipfile.ZipFile(wheel).namelist())


def test_an_unknown_mode_is_an_error(tree, tmp_path):
    done = build("wheel", tree, tmp_path, AAPE_NATIVE="maybe")
    assert done.returncode != 0
    assert "AAPE_NATIVE: expected auto, require or off, got 'maybe'" in done.stdout + done.stderr
