"""On a GPU: every backend that runs there against the reference in float64, at sizes that fill the chip, and how it
behaves in a training program. `make gpu` runs these; without a CUDA device they are skipped.
"""

import contextlib
import copy
import gc
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import AWKWARD, SQUARE, Case
from oracle import bound, relative_error
from test_sblu import GOLDEN, NAMES
from test_stem import OPTIONS, small
from torch._dynamo.utils import counters

from aape_kernels import AaPE, sblu
from aape_kernels.backends import BACKENDS, Call, reasons

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

DEVICE = torch.device("cuda")
FLOAT_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# What the project's figures are stated for: 32 768 tokens, several times what an H100 works on at once.
FULL = {"batch": 64, "mel_bins": 128, "frames": 1024, "dim": 768, "states": 32}
# Where every program has little to do and compiling is all that takes time.
MODEST = {"batch": 4, "mel_bins": 64, "frames": 256, "dim": 96, "states": 32}
BEYOND = 2**31


def running() -> list[str]:
    """The GPU backends that can run here; without a GPU, those that could."""
    named = [name for name, backend in BACKENDS.items() if backend.device == "cuda" and backend.run is not None]
    if not torch.cuda.is_available():
        return named
    return [name for name, why in reasons(Call("sblu", DEVICE, torch.float32)).items() if why is None and name in named]


@pytest.fixture(params=running())
def gpu(request) -> str:
    """The name of a backend that runs here."""
    return request.param


@pytest.fixture(autouse=True)
def _memory_goes_back():
    """To the device, for tests that run side by side."""
    yield
    if torch.cuda.is_available() and torch.cuda.memory_reserved() > 2**30:
        gc.collect()
        torch.cuda.empty_cache()


@pytest.fixture
def much_memory():
    """One test at a time takes many gigabytes, also where tests run side by side."""
    import fcntl

    with open(Path(tempfile.gettempdir()) / "aape-gpu-memory.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        gc.collect()
        torch.cuda.empty_cache()


def needs(gigabytes: float) -> None:
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    if total < gigabytes * 1e9:
        pytest.skip(f"takes {gigabytes:.0f} GB of GPU memory, there are {total / 1e9:.0f}")


def on_device(values) -> list[torch.Tensor]:
    return [value.to(DEVICE) for value in values]


def run(inputs, cotangent, options, backend: str) -> list[torch.Tensor]:
    """y and the gradients of the four inputs."""
    leaves = [value.detach().requires_grad_() for value in inputs]
    y = sblu(*leaves, **options, backend=backend)
    return [y, *torch.autograd.grad(y, leaves, cotangent)]


def compare(got, want, inputs, dtype: torch.dtype) -> None:
    y, *gradients = got
    assert y.dtype == dtype
    assert y.is_contiguous()
    assert relative_error(y, want[0]) <= bound(dtype)
    for name, value, gradient, expected in zip(NAMES, inputs, gradients, want[1:], strict=True):
        assert gradient.dtype == value.dtype, name
        assert relative_error(gradient, expected) <= bound(dtype, gradient=True), name


def check(inputs, cotangent, options, backend: str) -> None:
    """Against the reference in float64 at the same, already rounded numbers."""
    got = run(inputs, cotangent, options, backend)
    want = run([value.double() for value in inputs], cotangent.double(), options, "reference")
    compare(got, want, inputs, inputs[0].dtype)


def filling(sizes, dtype: torch.dtype, kernel="quadrature", **options):
    """Inputs, cotangent and options of `sblu` with 16 × 16 patches; 16-bit for x, weight and y only."""
    options = {"patch_size": (16, 16), "kernel": kernel} | options
    stride = options.get("stride", (16, 16))
    grid = tuple((sizes[axis] - 16) // step + 1 for axis, step in zip(("mel_bins", "frames"), stride, strict=True))
    rest = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    tokens = (sizes["batch"], *grid, sizes["states"])
    inputs = [
        torch.randn(sizes["batch"], 1, sizes["mel_bins"], sizes["frames"], device=DEVICE).to(dtype),
        torch.rand(tokens, device=DEVICE, dtype=rest) * 2 + 0.06,
        torch.rand(tokens, device=DEVICE, dtype=rest) * 2.9 + 0.2,
        (torch.randn(sizes["states"], 1, 16, device=DEVICE) / 4).to(dtype),
    ]
    cotangent = torch.randn(*tokens[:3], 2, sizes["states"], device=DEVICE).to(dtype)
    return inputs, cotangent, options


def stem_and_input(sizes, backend: str, dtype: torch.dtype = torch.float32, **options):
    """A stem whose parameters are off their special initial values, and its input, in the order of its layout."""
    stem = AaPE(embed_dim=sizes["dim"], num_states=sizes["states"], backend=backend, **options)
    with torch.no_grad():
        for parameter in stem.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    shape = (sizes["mel_bins"], sizes["frames"])
    shape = shape if stem.layout == "FT" else shape[::-1]
    return stem.to(DEVICE, dtype), torch.randn(sizes["batch"], 1, *shape, device=DEVICE).to(dtype)


def run_stem(stem: AaPE, x, cotangent) -> list[torch.Tensor]:
    """Tokens and the gradients of x and every parameter."""
    leaf = x.detach().requires_grad_()
    tokens = stem(leaf)
    return [tokens, *torch.autograd.grad(tokens, [leaf, *stem.parameters()], cotangent)]


def check_stem(stem: AaPE, x, dtype: torch.dtype, autocast: bool = False) -> None:
    """Against the reference in float64, at the parameters and the input as they are."""
    wide = copy.deepcopy(stem).double()
    wide.backend = "reference"
    with torch.no_grad():
        shape = wide(x[:1].double()).shape
    cotangent = torch.randn(x.shape[0], *shape[1:], device=DEVICE).to(dtype)
    with torch.autocast(DEVICE.type, dtype=dtype) if autocast else contextlib.nullcontext():
        got = run_stem(stem, x, cotangent)
    want = run_stem(wide, x.double(), cotangent.double())
    assert got[0].dtype == dtype
    assert got[0].is_contiguous()
    assert relative_error(got[0], want[0]) <= bound(dtype, whole_stem=True)
    names = ["x", *dict(stem.named_parameters())]
    for name, value, gradient, expected in zip(names, (x, *stem.parameters()), got[1:], want[1:], strict=True):
        assert gradient.dtype == value.dtype, name
        assert relative_error(gradient, expected) <= bound(dtype, whole_stem=True, gradient=True), name


def same_bits(got, want) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_backend_runs_here():
    assert running(), reasons(Call("sblu", DEVICE, torch.float32))
    assert running() == [name for name in running() if reasons(Call("embed", DEVICE, torch.bfloat16))[name] is None]


# What is right


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden(path, dtype, gpu):
    data = np.load(path)
    options = {key: tuple(data[key].tolist()) for key in ("patch_size", "stride")}
    options |= {"window": int(data["window"]), "kernel": str(data["kernel"])}
    exact = {name: torch.tensor(data[name], device=DEVICE) for name in (*NAMES, "cotangent", "y")}
    if dtype == torch.float32:
        inputs = [exact[name].to(dtype) for name in NAMES]
        got = run(inputs, exact["cotangent"].to(dtype), options, gpu)
        want = [exact["y"], *(torch.tensor(data[f"grad_{name}"], device=DEVICE) for name in NAMES)]
        compare(got, want, inputs, dtype)
    else:
        inputs = [exact[name].to(torch.float32 if name in ("decay", "frequency") else dtype) for name in NAMES]
        check(inputs, exact["cotangent"].to(dtype), options, gpu)


@pytest.mark.parametrize("kernel", ["bilateral", "quadrature"])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_sblu_at_a_size_that_fills_the_chip(dtype, kernel, gpu):
    check(*filling(FULL, dtype, kernel), gpu)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_overlapping_windows_at_a_size_that_fills_the_chip(dtype, gpu):
    check(*filling(FULL | {"batch": 16}, dtype, stride=(10, 10), window=20), gpu)


@pytest.mark.parametrize(
    ("patch", "states"), [((16, 15), 3), ((80, 4), 32), ((16, 4), 70), ((3, 8), 70), ((24, 8), 33)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocks_that_are_half_empty(dtype, patch, states, gpu):
    case = Case(2, 2, states, patch, patch, patch[1], (2, 19), (0, 0), "quadrature")
    inputs, cotangent = case.inputs(dtype)
    check(on_device(inputs), cotangent.to(DEVICE), case.options, gpu)


@pytest.mark.parametrize("layout", ["FT", "TF"])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_stem_at_a_size_that_fills_the_chip(dtype, layout, gpu):
    stem, x = stem_and_input(FULL, gpu, dtype, layout=layout)
    check_stem(stem, x, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stem_under_autocast_at_a_size_that_fills_the_chip(dtype, gpu):
    stem, x = stem_and_input(FULL, gpu)
    check_stem(stem, x, dtype, autocast=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_projection_with_the_rest_in_float32(dtype, gpu):
    stem, x = stem_and_input(MODEST, gpu)
    stem.proj.to(dtype)
    check_stem(stem, x.to(dtype), dtype)


@pytest.mark.parametrize("layout", ["FT", "TF"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_stem_of_any_geometry(options, layout, gpu):
    if layout == "TF" and "stride" in options:
        options = options | {"stride": options["stride"][::-1]}
    stem = small(torch.float32, layout=layout, backend=gpu, **options).to(DEVICE)
    x = torch.randn(2, 2, *((21, 19) if layout == "FT" else (19, 21)), device=DEVICE)
    check_stem(stem, x, torch.float32)


@pytest.mark.parametrize("case", [SQUARE, AWKWARD], ids=["square", "awkward"])
def test_strided_and_expanded(case, gpu):
    """Inputs and cotangents through their strides; gradients are as of contiguous ones."""
    inputs, cotangent = case.inputs(torch.float32)
    *inputs, cotangent = on_device([*inputs, cotangent])

    def spread(value):  # every second element of a bigger tensor, axes back to front
        big = torch.randn(*(2 * n for n in reversed(value.shape)), device=DEVICE)
        view = big[tuple(slice(None, None, 2) for _ in value.shape)].permute(*reversed(range(value.dim())))
        view.copy_(value)
        assert not view.is_contiguous()
        return view

    want = run(inputs, cotangent, case.options, gpu)
    for got, expected in zip(
        run([spread(value) for value in inputs], spread(cotangent), case.options, gpu), want, strict=True
    ):
        assert relative_error(got, expected) <= 1e-6

    x, decay, frequency, weight = inputs
    same = [x[:1].expand_as(x), decay[:, :1, :1].expand_as(decay), frequency[:1].expand_as(frequency), weight]
    ones = torch.ones((), device=DEVICE).expand_as(cotangent)
    got = run(same, ones, case.options, gpu)
    want = run([value.clone() for value in same], ones.clone(), case.options, gpu)
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) <= 1e-6


def test_a_non_finite_pixel_reaches_its_own_token_only(gpu):
    inputs, cotangent, options = filling(MODEST, torch.float32)
    inputs[0][1, 0, 20, 37] = torch.nan
    y = run(inputs, cotangent, options, gpu)[0]
    hit = torch.zeros(y.shape[:3], dtype=torch.bool, device=DEVICE)
    hit[1, 1, 2] = True
    assert torch.equal(y.isnan().flatten(3).any(-1), hit)


def test_tf32_only_where_it_is_allowed(gpu):
    inputs, cotangent, options = filling(MODEST, torch.float32)
    want = run([value.double() for value in inputs], cotangent.double(), options, "reference")
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        allowed = run(inputs, cotangent, options, gpu)
    finally:
        torch.set_float32_matmul_precision(before)
    for got, expected in zip(allowed, want, strict=True):
        assert relative_error(got, expected) <= 3e-3
    compare(run(inputs, cotangent, options, gpu), want, inputs, torch.float32)


# Beyond 2³¹ elements


def test_strides_beyond_2_to_the_31(gpu, much_memory):
    """Views whose second clip lies 2³¹ elements behind the first: the 64-bit index path on few tokens."""
    needs(12)
    inputs, cotangent, options = filling(MODEST | {"batch": 2}, torch.float32)
    want = run(inputs, cotangent, options, gpu)
    given = [*inputs[:3], cotangent]
    far = BEYOND + 256
    giant = torch.empty(far + sum(value.numel() for value in given), device=DEVICE)
    views, start = [], 0
    for value in given:
        view = giant[start:].as_strided(value.shape, (far, *value.stride()[1:]))
        view.copy_(value)
        views.append(view)
        start += value[0].numel()
    got = run([*views[:3], inputs[3]], views[3], options, gpu)
    assert same_bits(got, want)

    stem, x = stem_and_input(MODEST | {"batch": 2}, gpu)
    tokens = stem(x)
    cotangent = torch.randn_like(tokens)
    view = giant.as_strided(x.shape, (far, *x.stride()[1:]))
    view.copy_(x)
    assert same_bits(run_stem(stem, view, cotangent), run_stem(stem, x, cotangent))


def giant_clips() -> torch.Tensor:
    """Random clips (B, 1, 128, 1024) of bfloat16, just more than 2³¹ elements together."""
    clip = FULL["mel_bins"] * FULL["frames"]
    x = torch.empty(BEYOND // clip + 1, 1, FULL["mel_bins"], FULL["frames"], dtype=torch.bfloat16, device=DEVICE)
    assert x.numel() > BEYOND
    return x.normal_()


def first_and_last(value: torch.Tensor) -> torch.Tensor:
    return torch.stack([value[0], value[-1]])


def test_sblu_of_more_than_2_to_the_31_elements(gpu, much_memory):
    """Only the first and the last clip have a cotangent, so the gradients are those of these two."""
    needs(40)
    x, states = giant_clips(), 4
    tokens = (len(x), FULL["mel_bins"] // 16, FULL["frames"] // 16, states)
    decay = torch.rand(tokens, device=DEVICE) * 2 + 0.06
    frequency = torch.rand(tokens, device=DEVICE) * 2.9 + 0.2
    weight = (torch.randn(states, 1, 16, device=DEVICE) / 4).bfloat16()
    cotangent = torch.zeros(*tokens[:3], 2, states, dtype=torch.bfloat16, device=DEVICE)
    for index in (0, -1):
        cotangent[index].normal_()
    options = {"patch_size": (16, 16)}
    y, grad_x, grad_decay, grad_frequency, grad_weight = run([x, decay, frequency, weight], cotangent, options, gpu)
    assert not grad_x[1:-1].any()
    got = [*map(first_and_last, (y, grad_x, grad_decay, grad_frequency)), grad_weight]
    inputs = [*map(first_and_last, (x, decay, frequency)), weight]
    wide = [value.double() for value in inputs]
    want = run(wide, first_and_last(cotangent).double(), options, "reference")
    compare(got, want, inputs, torch.bfloat16)


def test_stem_of_more_than_2_to_the_31_elements(gpu, much_memory):
    needs(60)
    stem, _ = stem_and_input(MODEST | {"dim": 16, "states": 4, "batch": 1}, gpu, torch.bfloat16, encoder_dim=16)
    x = giant_clips()
    wide = copy.deepcopy(stem).double()
    wide.backend = "reference"
    leaf = x.requires_grad_()
    tokens = stem(leaf)
    cotangent = torch.zeros_like(tokens)
    for index in (0, -1):
        cotangent[index].normal_()
    grad_x, *gradients = torch.autograd.grad(tokens, [leaf, *stem.parameters()], cotangent)
    want = run_stem(wide, first_and_last(x.detach()).double(), first_and_last(cotangent).double())
    assert relative_error(first_and_last(tokens.detach()), want[0]) <= bound(torch.bfloat16, whole_stem=True)
    assert not grad_x[1:-1].any()
    names = ["x", *dict(stem.named_parameters())]
    for name, got, expected in zip(names, (first_and_last(grad_x), *gradients), want[1:], strict=True):
        assert relative_error(got, expected) <= bound(torch.bfloat16, whole_stem=True, gradient=True), name


# How it behaves


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
    # a search compiles every candidate of every kernel: three of them show as much as all
    monkeypatch.setattr(configurations, "CANDIDATES", configurations.CANDIDATES[::9])
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
