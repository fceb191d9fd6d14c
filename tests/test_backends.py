from types import SimpleNamespace

import pytest
import torch
from cases import SQUARE

from aape_kernels import AaPE, reference, sblu
from aape_kernels.backends import BACKENDS, ORDER, Call, choose, cpu, cuda, reasons, triton
from aape_kernels.checks import DTYPES

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


@pytest.fixture
def driver(monkeypatch):
    """What the native module says of its CUDA kernels, and of the driver."""
    said = {"error": "", "driver": 13000, "runtime": 13000, "capabilities": [90]}
    info = {"kernels": ("cpu", "cuda"), "cuda_architectures": "80-real,90-real,100-real,120"}
    module = SimpleNamespace(build_info=lambda: info, cuda=SimpleNamespace(devices=lambda: said))
    monkeypatch.setattr(cuda, "load", lambda: module)
    monkeypatch.setattr(cuda, "NATIVE_BUILT", True)
    return said, info


def why_not_cuda(monkeypatch, major=9, minor=0, dtype=torch.float32):
    properties = SimpleNamespace(major=major, minor=minor)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    cuda.unusable.cache_clear()
    try:
        return reasons(Call("embed", torch.device("cuda", 1), dtype))["cuda"]
    finally:
        cuda.unusable.cache_clear()


def test_cuda_on_a_gpu(driver, monkeypatch):
    said, info = driver
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        assert why_not_cuda(monkeypatch, dtype=dtype) is None
    assert why_not_cuda(monkeypatch, 7, 5) == (
        "it was built for 80-real,90-real,100-real,120, the GPU has compute capability 7.5; "
        "`AAPE_CUDA_ARCHS=75 pip install …` builds it for that"
    )
    said |= {"driver": 12040, "error": "CUDA driver version is insufficient for CUDA runtime version"}
    assert why_not_cuda(monkeypatch) == (
        "it was built with CUDA 13.0, and the driver, for CUDA 12.4, says: CUDA driver version is insufficient for "
        "CUDA runtime version"
    )
    said["driver"] = 0
    assert why_not_cuda(monkeypatch) == "no NVIDIA driver was found"
    info["kernels"] = ("cpu",)
    assert "built without nvcc; `AAPE_CUDA=require" in why_not_cuda(monkeypatch)

    def unloadable():
        raise ImportError("undefined symbol")

    monkeypatch.setattr(cuda, "load", unloadable)
    assert why_not_cuda(monkeypatch) == "the native module cannot be loaded: undefined symbol"
    monkeypatch.setattr(cuda, "NATIVE_BUILT", False)
    assert "was not built" in why_not_cuda(monkeypatch)
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert "built for AMD's" in why_not_cuda(monkeypatch)


@pytest.mark.parametrize(
    ("architectures", "runs", "not_on"),
    [
        ("80-real,90-real,100-real,120", [80, 86, 89, 90, 100, 103, 120, 121], [75, 70, 110]),
        ("90", [90, 100, 120], [80, 89]),
        ("90-virtual", [90, 100], [89]),
        ("86-real", [86, 89], [80, 90]),
        ("90a", [90], [80, 100, 120]),
        ("100a-real,90", [90, 100, 110], [80]),
        ("103a-real", [103], [100, 120]),
        ("100f", [100, 103], [90, 110, 120]),
    ],
)
def test_which_gpus_an_architecture_runs_on(architectures, runs, not_on):
    assert all(cuda.runs_on(architectures, *divmod(capability, 10)) for capability in runs)
    assert not any(cuda.runs_on(architectures, *divmod(capability, 10)) for capability in not_on)


def test_tracing_takes_the_cuda_backends_answer(driver, monkeypatch):
    """`reason` imports the native module and asks the driver: tracing must do that, not trace it."""
    assert why_not_cuda(monkeypatch) is None

    def chosen(x):
        return x + (1 if cuda._refusal(9, 0) is None else 2) + (1 if cuda._refusal(7, 0) is None else 2)

    compiled = torch.compile(chosen, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(())) == 3
    cuda.unusable.cache_clear()


def test_the_order_of_auto_holds_every_backend_and_dtype():
    assert all(sorted(order) == sorted(BACKENDS) for order in ORDER.values())
    assert set(ORDER) == set(DTYPES)


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


@pytest.mark.skipif(not cpu.NATIVE_BUILT, reason="the native module was not built")
def test_nodes_of_the_graph_say_whose_they_are():
    """In `grad_fn`, in messages and in profiles: of the stem, of the filters, and of their backwards."""
    inputs = [value.requires_grad_() for value in SQUARE.inputs(torch.float32)[0]]
    y, stem = sblu(*inputs, **SQUARE.options, backend="cpu"), AaPE(embed_dim=8, backend="cpu")
    tokens = stem(torch.randn(1, 1, 16, 32))
    (again,) = torch.autograd.grad(tokens.sum(), stem.proj.weight, create_graph=True)
    names = {"SBLUBackward": y, "EmbedBackward": tokens, "EmbedBackwardBackward": again}
    for name, value in names.items():
        assert value.grad_fn.name() == name
        assert f"{name} object" in repr(value.grad_fn)
