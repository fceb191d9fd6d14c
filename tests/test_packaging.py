"""sdist, wheels and the native scaffold, built from a copy of the tree without build isolation (no network)."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

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


def without_compiler(folder: Path) -> dict[str, str]:
    """An environment in which no C++ compiler is on the path, and everything else of the build is."""
    folder.mkdir()
    for tool in ("cmake", "ninja", "git"):
        found = shutil.which(tool)
        if found:
            (folder / tool).symlink_to(found)
    return {"PATH": str(folder), "CXX": ""}


@pytest.fixture(scope="module")
def sdist(tree, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    done = build("sdist", tree, out)
    assert done.returncode == 0, done.stdout + done.stderr
    (archive,) = out.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(out, filter="data")
    return out / archive.name.removesuffix(".tar.gz")


def test_sdist_to_wheel(sdist, tmp_path):
    done = build("wheel", sdist, tmp_path, AAPE_NATIVE="require")
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert "none-any" not in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    for name in ("aape_kernels/py.typed", "aape_kernels/backends/__init__.py", "aape_ssl/cli.py"):
        assert name in names
    assert any(name.startswith("aape_kernels/_native") for name in names)
    assert any(name.startswith("aape_ssl/clips/") and not name.endswith(".md") for name in names)
    assert not any(name.startswith(("tests", "benchmarks", "python")) for name in names)

    # what was installed from the wheel runs, away from the source tree
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = (
        "import aape_kernels._native as n, aape_kernels, json; from aape_kernels.backends import cpu;"
        "print(json.dumps([n.build_info(), aape_kernels.__file__, cpu.NATIVE_BUILT]))"
    )
    environment = os.environ | {"PYTHONPATH": str(site)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert '"version": "0.1.0"' in run.stdout
    assert '"kernels": ["cpu"]' in run.stdout
    assert str(site) in run.stdout
    assert run.stdout.rstrip().endswith("true]")


def test_without_a_compiler_the_native_module_is_left_out_with_one_line(tree, tmp_path):
    done = build("wheel", tree, tmp_path / "out", **without_compiler(tmp_path / "bin"))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "native module" in line]
    assert set(lines) == {
        "aape_kernels: the native module is left out: no C++ compiler was found (set CXX, or install g++ or clang++); "
        "the PyTorch backends work without it"
    }
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


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc was found")
def test_cuda_kernels_for_the_architectures_named(tree, tmp_path):
    done = build("wheel", tree, tmp_path, AAPE_CUDA="require", AAPE_CUDA_ARCHS="86,90-real")
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    (module,) = (tmp_path / "site" / "aape_kernels").glob("_native*")
    assert module.stat().st_size < 10e6
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


def test_without_nvcc_the_cuda_kernels_are_left_out_with_one_line(tree, tmp_path):
    nowhere = {"CUDACXX": str(tmp_path / "nvcc")}
    done = build("wheel", tree, tmp_path / "out", AAPE_CUDA="auto", **nowhere)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "the CUDA kernels" in line]
    assert lines == [
        "aape_kernels: the CUDA kernels are left out: no nvcc was found (set CUDACXX, or "
        '`pip install "cuda-toolkit[nvcc,cudart,cccl]"`); Triton serves GPUs without them'
    ]
    done = build("wheel", tree, tmp_path / "out", AAPE_CUDA="require", **nowhere)
    assert done.returncode != 0
    assert "the CUDA kernels cannot be built: no nvcc was found" in done.stdout + done.stderr


def test_a_broken_nvcc_leaves_the_cuda_kernels_out(tree, tmp_path):
    broken = tmp_path / "nvcc"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    done = build("wheel", tree, tmp_path / "out", AAPE_CUDA="auto", CUDACXX=str(broken))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"the CUDA kernels are left out: cmake failed with {broken}, see its" in done.stdout + done.stderr
    (wheel,) = (tmp_path / "out").glob("*.whl")
    assert any("_native" in name for name in zipfile.ZipFile(wheel).namelist())


@pytest.mark.parametrize("mode", ["off", "maybe"])
def test_native_modes(tree, tmp_path, mode):
    done = build("wheel", tree, tmp_path, AAPE_NATIVE=mode)
    if mode == "maybe":
        assert done.returncode != 0
        assert "AAPE_NATIVE: expected auto, require or off, got 'maybe'" in done.stdout + done.stderr
    else:
        assert done.returncode == 0, done.stdout + done.stderr
        assert [path.name for path in tmp_path.glob("*.whl")] == ["aape_kernels-0.1.0-py3-none-any.whl"]
