import pytest
import torch
from cases import SQUARE

from aape_kernels import AaPE, reference, sblu
from aape_kernels.backends import BACKENDS, Call, choose, cpu, reasons

CALL = Call("sblu", torch.device("cpu"), torch.float32)


def test_every_backend_says_why_it_cannot_run():
    why = reasons(CALL)
    assert list(why) == ["cuda", "triton", "cpu", "reference"]
    assert why["reference"] is None
    assert all(why[name] for name in ("cuda", "triton", "cpu"))
    assert reasons(Call("sblu", torch.device("meta"), torch.float32))["cpu"] == "it runs on cpu tensors, not on meta"


@pytest.mark.parametrize(("built", "words"), [(True, "native module has no kernels"), (False, "was not built")])
def test_cpu_reason_knows_the_native_module(monkeypatch, built, words):
    monkeypatch.setattr(cpu, "NATIVE_BUILT", built)
    assert words in reasons(CALL)["cpu"]


def test_auto_takes_the_fastest_that_can_run(monkeypatch):
    assert choose("auto", CALL) is reference
    fast = type(BACKENDS["cpu"])("cpu", "", lambda call: None, run=cpu)
    monkeypatch.setitem(BACKENDS, "cpu", fast)
    assert choose("auto", CALL) is cpu
    assert choose("reference", CALL) is reference


@pytest.mark.parametrize("name", [name for name, why in reasons(CALL).items() if why])
def test_naming_one_that_cannot_run_raises_with_the_reason(name, monkeypatch):
    inputs, _ = SQUARE.inputs(torch.float32)
    words = rf"'{name}' cannot run sblu of torch\.float32 on cpu: {BACKENDS[name].reason(CALL)}"
    with pytest.raises(RuntimeError, match="backend: " + words):
        sblu(*inputs, **SQUARE.options, backend=name)
    monkeypatch.setenv("AAPE_BACKEND", name)
    with pytest.raises(RuntimeError, match="AAPE_BACKEND: " + words):
        sblu(*inputs, **SQUARE.options)
    with pytest.raises(RuntimeError, match=f"AAPE_BACKEND: '{name}' cannot run embed"):
        AaPE(embed_dim=8)(torch.randn(1, 1, 16, 16))
    sblu(*inputs, **SQUARE.options, backend="reference")  # the variable speaks for "auto" only


def test_the_environment_is_read_at_every_call(monkeypatch):
    monkeypatch.setenv("AAPE_BACKEND", "reference")
    assert choose("auto", CALL) is reference
    monkeypatch.setenv("AAPE_BACKEND", "fastest")
    with pytest.raises(ValueError, match=r"AAPE_BACKEND: expected one of auto, cuda, .* got 'fastest'"):
        choose("auto", CALL)
    for value in ("", "auto"):
        monkeypatch.setenv("AAPE_BACKEND", value)
        assert choose("auto", CALL) is reference
