import pytest
import torch
from cases import SQUARE

from aape_kernels import AaPE, reference, sblu
from aape_kernels.backends import BACKENDS, Call, choose, cpu, reasons

CALL = Call("sblu", torch.device("cpu"), torch.float32)
META = Call("sblu", torch.device("meta"), torch.float32)


def test_every_backend_says_why_it_cannot_run():
    why = reasons(META)
    assert list(why) == ["cuda", "triton", "cpu", "reference"]
    assert why["reference"] is None
    assert why["cpu"] == "it runs on cpu tensors, not on meta"
    on_gpu = reasons(Call("embed", torch.device("cuda", 1), torch.float32))
    assert on_gpu["cpu"] == "it runs on cpu tensors, not on cuda:1"
    # not the device: on another one it would not run either
    assert why["cuda"] == on_gpu["cuda"] == "this version has no CUDA kernels"
    assert why["triton"] == on_gpu["triton"] == "this version has no Triton kernels"


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


@pytest.mark.parametrize(("name", "kernels"), [("cuda", "CUDA"), ("triton", "Triton")])
def test_naming_one_that_cannot_run_raises_with_the_reason(name, kernels, monkeypatch):
    inputs, _ = SQUARE.inputs(torch.float32)
    words = rf"'{name}' cannot run sblu of torch\.float32 on cpu: this version has no {kernels} kernels"
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
