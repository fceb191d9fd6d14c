"""What csrc has of arithmetic, by small programs: division by multiplication, and the log-magnitude."""

import subprocess

import pytest
from emulated import ROOT, compile_sources, compiler, more_flags, run_compiler

pytestmark = pytest.mark.skipif(compiler() is None, reason="no host compiler was found")


def said_by(name, into):
    """What the program prints."""
    (program,) = compile_sources(ROOT, into, [f"{name}.cpp"], *more_flags())
    run_compiler(*more_flags(), str(program), "-o", str(into / name))
    done = subprocess.run([into / name], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout.split()


def test_a_divisor_divides(tmp_path):
    checked, *_ = said_by("divisor", tmp_path)
    assert int(checked) > 1_000_000


def test_log_magnitude_is_off_by_three_in_the_last_place_at_most(tmp_path):
    single, double = map(float, said_by("log_magnitude", tmp_path))
    assert 0.5 < single <= 3
    assert 0.5 < double <= 3
