from types import SimpleNamespace

import pytest
import torch
from cases import SQUARE

from aape_kernels import AaPE, reference, sblu
from aape_kernels.backends import BACKENDS, Call, choose, cpu, reasons, triton

CALL = Call("sblu", torch.device("cpu"), torch.float32)
META = Call("sblu", torch.device("meta"), torch.float32)


def test_every_backend_says_why_it_cannot_run():
    why = reasons(META)
    assert list(why) == ["cuda", "triton", "cpu", "reference"]
    assert why["reference"] is None
    assert why["cpu"] == "it runs on cpu tensors, not on meta"
    assert why["triton"] == "it runs on cuda tensors, not on meta"
    assert why["cuda"] == "it runs on cuda tensors, not on meta"
    assert reasons(CALL)["cuda"] == "it runs on cuda tensors, not on cpu"


def test_triton_on_a_gpu(monkeypatch):
    def why(major=9, dtype=torch.float32):
        properties = SimpleNamespace(major=major, minor=0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        found = reasons(Call("embed", torch.device("cuda", 1), dtype))
        assert found["cpu"] == "it runs on cpu tensors, not on cuda:1"
        return found["triton"]

    monkeypatch.setattr(triton, "TRITON_INSTALLED", True)
    assert why() is why(8) is None
    assert why(7) == "it needs compute capability 8.0, cuda:1 has 7.0"
    assert why(dtype=torch.float64) == "it computes in float32, and x is float64"
    monkeypatch.setattr(triton, "TRITON_INSTALLED", False)
    assert why() == 'Triton is not installed; `pip install "triton>=3.6"`'


def test_cpu_needs_the_native_module(monkeypatch):
    monkeypatch.setattr(cpu, "NATIVE_BUILT", False)
    assert "was not built" in reasons(CALL)["cpu"]
    monkeypatch.setattr(cpu, "NATIVE_BUILT", True)
    assert reasons(CALL)["cpu"] is None


def test_auto_takes_the_fastest_that_can_run(monkeypatch):
    monkeypatch.setattr(cpu, "NATIVE_BUILT", True)
    assert choose("auto", CALL) is BACKENDS["cpu"].run
    assert choose("auto", META) is reference
    assert choose("reference", CALL) is reference


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_naming_one_that_cannot_run_raises_with_the_reason(name, monkeypatch):
    inputs, _ = SQUARE.inputs(torch.float32)
    words = rf"'{name}' cannot run sblu of torch\.float32 on cpu: it runs on cuda tensors, not on cpu"
    with pytest.raises(RuntimeError, match="backend: " + words):
        sblu(*inputs, **SQUARE.options, backend=name)
    monkeypatch.setenv("AAPE_BACKEND", name)
    with pytest.raises(RuntimeError, match="AAPE_BACKEND: " + words):
        sblu(*inputs, **SQUARE.options)
    with pytest.raises(RuntimeError, match=f"AAPE_BACKEND: '{name}' cannot run embed"):
        AaPE(embed_dim=8)(torch.randn(1, 1, 16, 16))
    sblu(*inputs, **SQUARE.options, backend="reference")  # the variable speaks for "auto" only


def test_the_environment_is_read_at_every_call(monkeypatch):
    monkeypatch.setattr(cpu, "NATIVE_BUILT", True)
    monkeypatch.setenv("AAPE_BACKEND", "reference")
    assert choose("auto", CALL) is reference
    monkeypatch.setenv("AAPE_BACKEND", "fastest")
    with pytest.raises(ValueError, match=r"AAPE_BACKEND: expected one of auto, cuda, .* got 'fastest'"):
        choose("auto", CALL)
    for value in ("", "auto"):
        monkeypatch.setenv("AAPE_BACKEND", value)
        assert choose("auto", CALL) is BACKENDS["cpu"].run
