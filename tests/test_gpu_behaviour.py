"""On a GPU: how every backend that runs there behaves in a program: the same bits, torch.compile, graphs, streams,
devices, the search for configurations. `make gpu` runs these; without a CUDA device they are skipped.
"""

import json

import pytest
import torch
from checks import compare, same_bits
from on_gpu import (
    DEVICE,
    FULL,
    MODEST,
    a_lost_device_ends_the_process,  # noqa: F401  # a fixture
    check,
    check_stem,
    filling,
    run,
    run_stem,
    running,
    stem_and_input,
)
from oracle import bound, relative_error
from torch._dynamo.utils import counters

from aape_kernels import sblu

pytestmark = pytest.mark.gpu


def test_same_bits_on_every_run(gpu):
    inputs, cotangent, options = filling(FULL, torch.float32)
    first = run(inputs, cotangent, options, gpu)
    assert all(same_bits(run(inputs, cotangent, options, gpu), first) for _ in range(9))

    inputs, cotangent, options = filling(FULL | {"batch": 16}, torch.float32, stride=(10, 10), window=20)
    first = run(inputs, cotangent, options, gpu)
    assert all(same_bits(run(inputs, cotangent, options, gpu), first) for _ in range(9))

    stem, x = stem_and_input(FULL, gpu, torch.bfloat16)
    cotangent = torch.randn_like(stem(x))
    first = run_stem(stem, x, cotangent)
    assert all(same_bits(run_stem(stem, x, cotangent), first) for _ in range(9))


# inductor itself uses what PyTorch deprecates
@pytest.mark.filterwarnings("default")
def test_compiles_in_one_graph_for_every_batch(gpu):
    torch._dynamo.reset()
    counters.clear()
    stem, _ = stem_and_input(MODEST, gpu)
    compiled = torch.compile(stem, fullgraph=True, dynamic=True)
    for batch in (2, 3, 8):
        x = torch.randn(batch, 1, MODEST["mel_bins"], MODEST["frames"], device=DEVICE)
        cotangent = torch.randn_like(stem(x))
        leaf = x.detach().requires_grad_()
        tokens = compiled(leaf)
        got = [tokens, *torch.autograd.grad(tokens, [leaf, *stem.parameters()], cotangent)]
        for a, b in zip(got, run_stem(stem, x, cotangent), strict=True):
            assert relative_error(a, b) <= 1e-6
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.filterwarnings("default")
def test_compiles_under_autocast(gpu):
    torch._dynamo.reset()
    stem, x = stem_and_input(MODEST, gpu)
    compiled = torch.compile(stem, fullgraph=True)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        got, want = compiled(x), stem(x)
    assert got.dtype == torch.bfloat16
    assert relative_error(got, want) <= bound(torch.bfloat16, whole_stem=True)


def captured(call):
    """`call` as a CUDA graph, after what only first calls do; and its outputs, rewritten by every replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()
    return graph, outputs


@pytest.mark.parametrize("direction", ["forward", "forward-backward"])
def test_graph_capture(direction, gpu):
    inputs, cotangent, options = filling(MODEST, torch.float32)
    static = [*inputs, cotangent]
    stem, x = stem_and_input(MODEST, gpu, torch.bfloat16)
    tokens_cotangent = torch.randn_like(stem(x))

    def everything():
        if direction == "forward":
            with torch.no_grad():
                return [sblu(*static[:4], **options, backend=gpu), stem(x)]
        return [*run(static[:4], static[4], options, gpu), *run_stem(stem, x, tokens_cotangent)]

    graph, outputs = captured(everything)
    for seed in (1, 2):
        torch.manual_seed(seed)
        fresh, fresh_cotangent, _ = filling(MODEST, torch.float32)
        for buffer, value in zip(static, [*fresh, fresh_cotangent], strict=True):
            buffer.copy_(value)
        x.normal_()
        tokens_cotangent.normal_()
        for value in outputs:
            value.detach().fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        for got, want in zip(outputs, everything(), strict=True):
            assert relative_error(got, want) <= (1e-6 if got.dtype == torch.float32 else 2e-3)


def compiled_kernels() -> int:
    """How many kernels Triton has compiled, or read from its cache, for this process and device."""
    from triton.runtime.jit import JITFunction

    from aape_kernels.backends.triton import launch

    functions = [value for value in vars(launch).values() if isinstance(value, JITFunction)]
    assert len(functions) >= 7, "expected the backend's kernels among what `launch` imports"
    if not all(hasattr(function, "device_caches") for function in functions):
        pytest.skip("this Triton's JITFunction has no device_caches: nothing tells what it has compiled")
    return sum(len(entry[0]) for function in functions for entry in function.device_caches.values())


@pytest.mark.skipif("triton" not in running(), reason="the Triton backend does not run here")
def test_no_kernel_is_compiled_again_when_batch_or_frames_change():
    stem, _ = stem_and_input(MODEST | {"dim": 32}, "triton")

    def everything(batch: int, frames: int) -> None:
        inputs, cotangent, options = filling(MODEST | {"batch": batch, "frames": frames}, torch.float32)
        run(inputs, cotangent, options, "triton")
        tokens = stem(inputs[0])
        run_stem(stem, inputs[0], torch.ones_like(tokens))

    everything(2, 256)
    before = compiled_kernels()
    assert before >= 7
    for batch, frames in ((3, 256), (2, 100), (8, 353), (1, 16), (5, 512)):
        everything(batch, frames)
        assert compiled_kernels() == before, (batch, frames)


# PyTorch says of the mode itself that it is a prototype
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_nothing_waits_for_the_device(gpu):
    inputs, cotangent, options = filling(MODEST, torch.float32)
    stem, x = stem_and_input(MODEST, gpu, torch.bfloat16)
    tokens_cotangent = torch.randn_like(stem(x))

    def everything():
        with torch.no_grad():
            sblu(*inputs, **options, backend=gpu)
            stem(x)
        run(inputs, cotangent, options, gpu)
        run_stem(stem, x, tokens_cotangent)

    everything()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing"):
            x.sum().item()  # the mode is on
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_runs_on_the_current_stream(gpu):
    """On a stream where the input arrives late: a launch on any other stream reads it too early."""
    inputs, cotangent, options = filling(MODEST, torch.float32)
    want = run(inputs, cotangent, options, gpu)
    late = torch.full_like(inputs[0], torch.nan)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)  # clock cycles, about 0.1 s
        late.copy_(inputs[0])
        got = run([late, *inputs[1:]], cotangent, options, gpu)
    side.synchronize()
    assert same_bits(got, want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are not two CUDA devices")
def test_second_device(gpu):
    """Tensors of a device that is not the current one."""
    second = torch.device("cuda", 1)
    assert torch.cuda.current_device() == 0
    inputs, cotangent, options = filling(MODEST, torch.float32)
    want = run([value.double() for value in inputs], cotangent.double(), options, "reference")
    there = [value.to(second) for value in inputs]
    got = run(there, cotangent.to(second), options, gpu)
    assert all(value.device == second for value in got)
    compare([value.to(DEVICE) for value in got], want, inputs, torch.float32)
    stem, x = stem_and_input(MODEST, gpu)
    want = stem(x)
    assert relative_error(stem.to(second)(x.to(second)).to(DEVICE), want) <= bound(torch.float32, whole_stem=True)
    assert torch.cuda.current_device() == 0


@pytest.mark.skipif("triton" not in running(), reason="the Triton backend does not run here")
def test_autotuning_searches_once_and_keeps_what_it_finds(tmp_path, monkeypatch):
    import triton

    from aape_kernels.backends.triton import configurations

    file = tmp_path / "folder" / "autotune.json"
    monkeypatch.setenv("AAPE_AUTOTUNE", "1")
    monkeypatch.setenv("AAPE_AUTOTUNE_CACHE", str(file))
    # a search compiles every candidate of every kernel: two beside the usual one show as much as all
    monkeypatch.setattr(configurations, "CANDIDATES", configurations.CANDIDATES[::5])
    monkeypatch.setattr(configurations, "STAGES", (1,))
    configurations._kept.cache_clear()
    try:
        check(*filling(MODEST, torch.float32), "triton")
        stem, x = stem_and_input(MODEST, "triton")
        check_stem(stem, x, torch.float32)
        kept = json.loads(file.read_text(encoding="utf-8"))
        for kernel in {kernel for kernel, _ in configurations.DEFAULTS}:
            assert any(f" {kernel} small " in key for key in kept), kernel
        assert all(torch.cuda.get_device_name() in key for key in kept)

        def refuse(*args, **kwargs):
            raise AssertionError("searched again, what the file holds")

        monkeypatch.setattr(triton.testing, "do_bench", refuse)
        configurations._kept.cache_clear()  # as a new process finds it
        check(*filling(MODEST, torch.float32), "triton")
        check_stem(stem, x, torch.float32)
    finally:
        configurations._kept.cache_clear()
