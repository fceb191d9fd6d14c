"""Division by multiplication, csrc/cuda/divisor.cuh."""

import subprocess

import pytest
from emulated import ROOT, compile_sources, compiler, more_flags, run_compiler

pytestmark = pytest.mark.skipif(compiler() is None, reason="no host compiler was found")


def test_a_divisor_divides(tmp_path):
    (program,) = compile_sources(ROOT, tmp_path, ["divisor.cpp"], *more_flags())
    run_compiler(*more_flags(), str(program), "-o", str(tmp_path / "divisor"))
    done = subprocess.run([tmp_path / "divisor"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert int(done.stdout.split()[0]) > 1_000_000
