"""When Triton's interpreter runs a call. What the kernels compute in it is in tests/test_gpu_kernels_on_cpu.py."""

import importlib

import pytest
import torch
from cases import SQUARE

from aape_kernels import ops, sblu
from aape_kernels.backends import Call, choose
from aape_kernels.geometry import PatchGrid

pytest.importorskip("triton", reason="Triton is not installed")


def test_no_submodule_hides_an_operation():
    importlib.import_module("aape_kernels.backends.triton.launch")  # and with it all of them
    package = importlib.import_module("aape_kernels.backends.triton")
    assert all(callable(getattr(package, name)) for name in ops.OPS)


def test_when_it_can_run(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("AAPE_BACKEND", "triton")
    call = Call("sblu", torch.device("cpu"), torch.float32)
    assert choose("triton", call) is not choose("reference", call)
    with pytest.raises(RuntimeError, match=r"AAPE_BACKEND: 'triton' cannot run .*float32, and x is float64"):
        sblu(*SQUARE.inputs()[0], **SQUARE.options)
    monkeypatch.delenv("AAPE_BACKEND")
    assert choose("auto", call) is not choose("triton", call)  # auto never takes the interpreter
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match=r"'triton' cannot run .*: it runs on cuda tensors, not on cpu"):
        choose("triton", call)


def test_tf32_is_what_the_caller_allows_either_way():
    launch, matmul = importlib.import_module("aape_kernels.backends.triton.launch"), torch.backends.cuda.matmul

    def precision() -> str:
        return launch._precision(torch.device("cuda"))

    assert precision() == "ieee"
    try:
        torch.set_float32_matmul_precision("high")
        assert precision() == "tf32"
        matmul.fp32_precision = "ieee"  # torch.get_float32_matmul_precision() still says "high"
        assert precision() == "ieee"
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = "tf32"  # and now raises
        assert precision() == "tf32"
    finally:
        matmul.fp32_precision = "ieee"
        torch.set_float32_matmul_precision("highest")


def test_programs_of_a_day_of_frames_are_on_one_axis(monkeypatch):
    """CUDA's other axes have 65,535 at the most."""
    launch, grids = importlib.import_module("aape_kernels.backends.triton.launch"), []

    class Kernel:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *given, **sizes: None

    monkeypatch.setattr(launch, "overlap_add_kernel", Kernel())
    grid, x = PatchGrid((16, 16), (16, 16), 16), torch.zeros(1, 1, 1, 1).expand(2, 1, 128, 9_000_000)
    launch.TritonKernels(x, 16, grid, True, False).sum_windows(x, x, 16, add=False)
    assert grids == [(2 * 128 // 8 * -(-9_000_000 // 128),)]


def test_what_can_be_loaded_at_once():
    """What kernels are told of x's rows must hold: on a GPU an access that is not aligned ends the process."""
    launch = importlib.import_module("aape_kernels.backends.triton.launch")
    usual, overlap = PatchGrid((16, 16), (16, 16), 16), PatchGrid((16, 16), (16, 4), 16)
    x = torch.zeros(2, 1, 32, 64)
    narrow = x.bfloat16()
    assert (launch._alignment(x, usual), launch._alignment(narrow, usual)) == (4, 8)
    assert (launch._alignment(x, overlap), launch._alignment(narrow, overlap)) == (4, 1)
    assert launch._alignment(x, PatchGrid((16, 6), (16, 8), 6)) == 1
    for other in (x[..., :-1].contiguous(), x[..., ::2], x.transpose(2, 3), torch.zeros(2, 1, 32, 65)[..., :64]):
        assert launch._alignment(other, usual) == 1
    assert launch._alignment(x[..., 8:].expand(2, 3, 32, 56), usual) == 4
