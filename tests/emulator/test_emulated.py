"""The CUDA kernels run on the CPU, in every order of a block's threads, through the backend that a user names.

What they share with Triton's interpreted kernels is tested in tests/test_gpu_kernels_on_cpu.py.
"""

import re
import shutil
from functools import cache

import on_tensor_cores
import pytest
import sanitized_on_gpu
import torch
from cases import AWKWARD, GOLDEN, GOLDEN_STEMS, Case, cases
from checks import poisoned_memory, same_bits
from emulated import (
    BOUNDS,
    ORDERS,
    RACES,
    ROOT,
    SOURCES,
    build_program,
    compile_sources,
    compiler,
    link,
    more_flags,
    run_program,
    use,
)
from hypothesis import given, settings
from oracle import relative_error
from test_sblu import check as check_sblu
from test_sblu import check_golden, check_range
from test_stem import OPTIONS, check_16_bit_forward_and_gradients, small
from test_stem import check as check_stem
from test_stem import check_golden as check_golden_stem

from aape_kernels import AaPE, sblu
from aape_kernels.backends import Call, choose, cuda
from aape_kernels.reference import PLANES

SOME_STEMS = on_tensor_cores.SOME
pytestmark = pytest.mark.skipif(compiler() is None, reason="no host compiler was found")


@pytest.fixture(autouse=True)
def emulated(emulated_module, monkeypatch):
    use(monkeypatch, emulated_module)
    yield emulated_module
    emulated_module.set_order(0, 0)
    emulated_module.set_multiprocessors(2)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden(emulated, path, order):
    emulated.set_order(ORDERS.index(order), 1)
    check_golden(path, torch.float64)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("path", GOLDEN_STEMS, ids=lambda path: path.stem)
def test_golden_stem(emulated, path, order):
    emulated.set_order(ORDERS.index(order), 1)
    check_golden_stem(path, torch.float64)


def test_any_geometry(emulated):
    seen = []

    @settings(max_examples=100)
    @given(case=cases())
    def every(case):
        seen.append(case)
        emulated.set_order(len(seen) % 3, len(seen))
        check_sblu(case, torch.float64)

    every()
    assert len(seen) >= 100


@pytest.mark.parametrize("kernel", ["bilateral", "quadrature"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("patch", "states"), [((16, 16), 32), ((5, 15), 33), ((80, 4), 70), ((3, 200), 5)], ids=str)
def test_dtype_and_blocks(dtype, patch, states, kernel):
    """One block of states and three, half of one, more rows than fit at once, windows longer than a tile."""
    check_sblu(Case(1, 1, states, patch, patch, patch[1], (1, 9), (0, 1), kernel), dtype)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("options", [*OPTIONS, "time-major", "time-major-overlap"])
def test_stem(emulated, options, order):
    emulated.set_order(ORDERS.index(order), 2)
    more = {"time-major": {"layout": "TF"}, "time-major-overlap": {"layout": "TF", "stride": (3, 4)}}
    stem = small(torch.float64, **(OPTIONS | more)[options])
    check_stem(stem, torch.randn(2, 2, 14, 19).double(), torch.float64)


@pytest.mark.parametrize(
    ("frames", "sizes"),
    [
        (67 * 4, {}),
        (3 * 4, {"encoder_dim": 70, "num_states": 40}),
        (4, {"encoder_dim": 5, "num_states": 1, "features": "complex"}),
    ],
    ids=["more tokens than a block's", "more units and logits than a product's", "one token a subband"],
)
def test_stem_blocks(frames, sizes):
    """Blocks of one subband's tokens and of several subbands', whole and not."""
    stem = AaPE(patch_size=(4, 4), embed_dim=6, decay=(0.1, 2.0), **sizes).double()
    torch.nn.init.normal_(stem.fusion.weight)
    check_stem(stem, torch.randn(2, 1, 4 * 9, frames).double(), torch.float64)


@pytest.mark.parametrize("features", PLANES)
@pytest.mark.parametrize("states", [2, 7, 32, 33, 70])
def test_features_of_any_number_of_states(emulated, states, features):
    emulated.set_order(states % 3, states)
    stem = small(torch.float64, num_states=states, features=features)
    check_stem(stem, torch.randn(2, 2, 14, 19).double(), torch.float64)


@pytest.mark.parametrize("states", [8, 40])
@pytest.mark.parametrize("features", PLANES)
def test_bfloat16_projection_and_tokens(features, states):
    stem = AaPE(embed_dim=64, num_states=states, features=features)
    stem.proj.bfloat16()
    check_16_bit_forward_and_gradients(stem, torch.bfloat16)


def calls_of(monkeypatch, module, *names):
    """A list of which of the module's functions are called from now on."""
    ran = []
    for name in names:
        kernel = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given, k=kernel, n=name: (ran.append(n), k(*given))[1])
    return ran


@pytest.mark.parametrize(
    ("types", "options", "features"), on_tensor_cores.SOME.values(), ids=on_tensor_cores.SOME.keys()
)
def test_stem_on_tensor_cores(emulated, monkeypatch, types, options, features):
    """More tiles of tokens than warps and one that is not whole."""
    ran = calls_of(monkeypatch, emulated, "warp_tokens", "warp_stem", "warp_stem_backward")
    emulated.set_order(2, len(str(options)))
    on_tensor_cores.check(types, (3, 32, 72), features=features, **options)
    assert ran == ["warp_stem", "warp_stem_backward"]


@pytest.mark.parametrize(
    ("types", "options", "features"), on_tensor_cores.SOME_TOKENS.values(), ids=on_tensor_cores.SOME_TOKENS.keys()
)
def test_tokens_by_one_kernel(emulated, monkeypatch, types, options, features):
    ran = calls_of(monkeypatch, emulated, "warp_tokens", "warp_stem", "warp_stem_backward")
    emulated.set_order(2, len(str(options)))
    on_tensor_cores.check(types, (3, 32, 72), features=features, embed_dim=96, **options)
    assert ran == ["warp_tokens", "warp_stem_backward"]


def test_a_window_that_cannot_be_counted_is_refused():
    x, rest = torch.randn(1, 1, 16, 16), torch.ones(1, 1, 1, 2)
    with pytest.raises(RuntimeError, match=r"window: expected fewer than 2\^31 frames, got 4294967312"):
        sblu(x, rest, rest, torch.randn(2, 1, 16), window=2**32 + 16)


@pytest.mark.parametrize("types", ["bfloat16", "float32", "float32-to-bfloat16"])
def test_tokens_of_several_rounds(emulated, monkeypatch, types):
    """More tiles than all warps have at once; the last round is not whole."""
    ran = calls_of(monkeypatch, emulated, "warp_tokens", "warp_stem")
    emulated.set_order(2, 0)
    emulated.set_multiprocessors(1)
    on_tensor_cores.check(on_tensor_cores.TYPES[types], (1, 32, 16 * 145), embed_dim=32)
    assert ran == ["warp_tokens"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_both_ways_to_tokens(monkeypatch, dtype):
    """What the backward is given has the same bits, and tokens differ by how they were rounded."""
    stem, x = on_tensor_cores.stem_of(dtype, embed_dim=64), torch.randn(3, 1, 32, 80).to(dtype)
    weights, options = on_tensor_cores.arguments_of(stem)
    with torch.no_grad():
        tokens, *kept = cuda.embed(x, weights, *options)
        monkeypatch.setattr(cuda.CudaKernels, "tokens", lambda *given: None)
        other, *wanted = cuda.embed(x, weights, *options)
    assert same_bits(kept, wanted)
    assert relative_error(tokens, other) <= (3e-3 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", on_tensor_cores.UNITS.values(), ids=on_tensor_cores.UNITS.keys())
def test_sblu_on_tensor_cores(emulated, monkeypatch, case, dtype):
    ran = []
    kernel = emulated.warp_sblu_backward
    monkeypatch.setattr(emulated, "warp_sblu_backward", lambda *given: (ran.append(given[-2]), kernel(*given))[1])
    emulated.set_order(2, case.states)
    with poisoned_memory():
        check_sblu(case, dtype)
    assert len(ran) == 1
    at_once = case.states <= 32 and case.window <= 2 * case.stride[1]
    assert (ran[0] is not None) == at_once  # x's gradient, too


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("wanted", ["proj.weight", "proj.bias", "encoder.w2", "sblu.weight", "fusion.weight"])
def test_one_gradient_alone_on_tensor_cores(wanted, dtype):
    stem = on_tensor_cores.stem_of(dtype, embed_dim=8)
    parameters = dict(stem.named_parameters())
    x = torch.randn(1, 1, 32, 32).to(dtype)
    everything = torch.autograd.grad(stem(x).float().square().sum(), list(parameters.values()))
    for parameter in parameters.values():
        parameter.requires_grad_(parameter is parameters[wanted])
    (alone,) = torch.autograd.grad(stem(x).float().square().sum(), [parameters[wanted]])
    limit = 5e-3 if dtype == torch.bfloat16 else 1e-6
    assert relative_error(alone, everything[list(parameters).index(wanted)]) <= limit


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_non_finite_pixel_stays_in_its_token_on_tensor_cores(dtype, value):
    stem, x = on_tensor_cores.stem_of(dtype), torch.randn(1, 1, 32, 48).to(dtype)
    x[0, 0, 20, 20] = value
    with torch.no_grad():
        assert stem(x).isfinite().all(-1).tolist() == [[True, True, True, True, False, True]]


@pytest.mark.parametrize("window", [8, 7])
@pytest.mark.parametrize(("low", "high"), [(5.0, 10.0), (0.0, 0.3), (0.0, 1e-3)], ids=["fast", "slow", "still"])
def test_gradients_at_the_ends_of_the_range(window, low, high):
    check_range(Case(1, 1, 16, (4, window), (4, window), window, (2, 4), (0, 0), "quadrature"), low, high)


@pytest.mark.parametrize("most", [1, 2, 500])
def test_partial_sums_of_any_number_of_programs(monkeypatch, most):
    case = Case(3, 1, 5, (3, 4), (3, 4), 4, (2, 30), (0, 0), "quadrature")
    monkeypatch.setattr(cuda, "PARTIAL_SUMS", most)
    check_sblu(case, torch.float64)


def test_errors_name_the_operation_and_the_sizes(monkeypatch):
    def refuse(*arguments):
        raise RuntimeError("sblu: out of memory")

    inputs, _ = AWKWARD.inputs(torch.float32)
    monkeypatch.setattr(cuda.kernels(), "sblu", refuse)
    words = (
        r"aape::sblu, backend 'cuda': sblu: out of memory \(x \(2, 2, 8, 19\) torch\.float32 on cpu, 3 states, .*patch"
    )
    with pytest.raises(RuntimeError, match=words):
        sblu(*inputs, **AWKWARD.options)


def test_what_runs_under_compute_sanitizer(capsys):
    sanitized_on_gpu.run(torch.device("cpu"))
    assert capsys.readouterr().out == f"{sanitized_on_gpu.DONE}\n"


def test_when_it_can_run(monkeypatch):
    call = Call("sblu", torch.device("cpu"), torch.float32)
    monkeypatch.delenv("AAPE_BACKEND")
    assert choose("auto", call) is not choose("cuda", call)  # the emulator is for tests that name it


# A copy of the sources with one thing wrong must be caught: else the emulator would be blind.
LOAD = "load_weights(p, t, r, m.ws);"
BROKEN = {
    "no barrier before reading u": ("sblu.cuh", "  __syncthreads();\n}\n\n}  // namespace", "}\n\n}  // namespace"),
    "no barrier after loading rows": ("sblu.cuh", f"{LOAD}\n    __syncthreads();", LOAD),
    "no barrier before rows are overwritten": ("sblu.cuh", "if (r) __syncthreads();", ""),
    "no barrier before gu is written again": (
        "sblu_backward.cu",
        "    __syncthreads();  // before gu and xs are written again\n",
        "",
    ),
    "no barrier before the warps' sums are added up": (
        "sblu_backward.cu",
        "sum[r]);\n  }\n  __syncthreads();",
        "sum[r]);\n  }",
    ),
    "no barrier before the encoder's tiles are read": (
        "stem.cu",
        "    __syncthreads();\n#pragma unroll\n    for (int q",
        "#pragma unroll\n    for (int q",
    ),
    "no barrier before hidden is read": (
        "stem.cu",
        "  __syncthreads();  // hidden, which this block reads again\n",
        "",
    ),
    "an index off by one": ("respond.cuh", "left + (int(p.grid.window) - 1) * k", "left + int(p.grid.window) * k"),
    "lanes without a state in the sums": ("warp.cuh", "each([&](int s) { sum += value(s); });", "sum += value(lane);"),
    "lanes without a state that miss the sums": ("respond.cuh", "if (!there && !standardised)", "if (!there)"),
    "a half of a row that is not swapped": (
        "lines.cuh",
        "load_left(lines + lane % 16 * p.pitch() + Layout<BFloat16>::in_line(lane % 16, group, lane / 16 * 8))",
        "load_left(lines + lane % 16 * p.pitch() + group * kRows + lane / 16 * 8)",
    ),
    "groups of some tokens that have not changed places": (
        "lines.cuh",
        "lines + m * p.pitch() + Layout<float>::in_line(m, group, lane % 4 * 2)",
        "lines + m * p.pitch() + Layout<float>::in_line(m & 4, group, lane % 4 * 2)",
    ),
    "the low part of float32 left out": ("products.cuh", "multiply(sum, a.low, b.high);", ""),
    "the gradients of the second sixteen states in place of the sum": (
        "warp_sblu_backward.cu",
        "if (pair) {",
        "if (false) {",
    ),
    "a window's gradient turned about its centre": (
        "warp_sblu_backward.cu",
        "    put(right, centre + f);\n    put(left, centre - 1 - f);",
        "    put(left, centre + f);\n    put(right, centre - 1 - f);",
    ),
    "no barrier before another chunk is copied": (
        "warp_tokens.cu",
        "    __syncthreads();  // for everyone's part; and nobody reads the chunk before any more\n",
        "",
    ),
    "a chunk that is not waited for": (
        "warp_tokens.cu",
        "    wait_for_copies();\n    __syncthreads();  // for everyone",
        "    __syncthreads();  // for everyone",
    ),
    "a chunk's channels in another order": (
        "warp_tokens.cu",
        "column / 2 * kOfLane + 2 * tile + column % 2",
        "8 * tile + column",
    ),
    "the next token's line": ("stem.cu", "as + own.token * kLine", "as + (own.token + 1) * kLine"),
}


def copy_with(fault, root):
    """The sources under `root`, with one thing wrong."""
    name, right, wrong = fault
    shutil.copytree(ROOT / "csrc", root / "csrc")
    shutil.copytree(ROOT / "tests" / "emulator", root / "tests" / "emulator")
    source = root / "csrc" / "cuda" / name
    text = source.read_text()
    assert text.count(right) == 1
    source.write_text(text.replace(right, wrong))


def affected(fault):
    """The sources to compile anew."""
    name, *_ = fault
    if name.endswith(".cu"):
        return [name]
    if name in ("lines.cuh", "pixels.cuh", "products.cuh", "warp_states.cuh"):
        return [each for each in SOURCES if each.startswith("warp_")]
    every = ["sblu_forward.cu", "sblu_backward.cu", "stem.cu"]
    return [*every, "standardise.cu"] if name == "warp.cuh" else every


def with_changed(objects, changed):
    names = {path.name for path in changed}
    return [*changed, *(path for path in objects if path.name not in names)]


@pytest.fixture
def broken(request, tmp_path, emulated_objects):
    """The kernels with one thing wrong."""
    fault = request.param
    copy_with(fault, tmp_path)
    changed = compile_sources(tmp_path, tmp_path, affected(fault), *more_flags())
    name = f"broken_{list(BROKEN.values()).index(fault)}"
    return link(with_changed(emulated_objects, changed), tmp_path, name)


OTHERS = Case(1, 2, 8, (20, 15), (20, 8), 15, (2, 30), (0, 0), "quadrature")
ON_TENSOR_CORES = Case(2, 1, 24, (16, 16), (16, 16), 16, (2, 11), (0, 0), "quadrature")

# One of each kind: every one compiles sources anew.
OF_A_KIND = {"no barrier before hidden is read", "an index off by one", "the low part of float32 left out"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "broken",
    [
        pytest.param(fault, marks=[] if name in OF_A_KIND else pytest.mark.exhaustive, id=name)
        for name, fault in BROKEN.items()
    ],
    indirect=True,
)
def test_a_broken_kernel_is_caught(broken, monkeypatch):
    use(monkeypatch, broken)
    stems = [
        AaPE(patch_size=(18, 5), embed_dim=6, num_states=4, encoder_dim=24, decay=(0.1, 2.0)),
        AaPE(embed_dim=6),
        AaPE(embed_dim=6).bfloat16(),
        AaPE(embed_dim=96).bfloat16(),
    ]
    caught = []
    for order in range(len(ORDERS)):
        broken.set_order(order, 3)
        try:
            for case in (OTHERS, ON_TENSOR_CORES):
                check_sblu(case, torch.float32)
            for stem in stems:
                torch.nn.init.normal_(stem.fusion.weight)
                dtype = stem.proj.weight.dtype
                check_stem(stem, torch.randn(1, 1, 36, 64).to(dtype), dtype)
        except (AssertionError, RuntimeError):
            caught.append(order)
    assert caught


# One kind of fault each, that fibers alone would not show.
SANITIZED = {
    "a race between the turns of overlapping tokens": (
        RACES,
        "data race",
        (
            "sblu_backward.cu",
            "        q = q * g.z;\n      }\n    }\n    __syncthreads();",
            "        q = q * g.z;\n      }\n    }",
        ),
    ),
    "a race for u": (RACES, "data race", BROKEN["no barrier before reading u"]),
    "a race for the products' weights": (
        RACES,
        "data race",
        ("warp_stem.cu", "  fill(p, m);\n  __syncthreads();\n", "  fill(p, m);\n"),
    ),
    "a row too many": (
        BOUNDS,
        "heap-buffer-overflow",
        (
            "warp_states.cuh",
            "if (at.there(h) && column < count) visit",
            "if (at.row(h) <= at.count && column < count) visit",
        ),
    ),
    "a token too many": (
        BOUNDS,
        "heap-buffer-overflow",
        ("standardise.cu", "  if (token >= p.tokens) return;\n", ""),
    ),
    "a band of too many subbands": (
        BOUNDS,
        "heap-buffer-overflow",
        ("stem.cu", "all - band.first < p.bands ? all - band.first", "all < 0 ? all"),
    ),
}


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """A function of the sanitizer's flags, once for each."""
    return cache(lambda flags: build_program(ROOT, tmp_path_factory.mktemp("program"), flags))


# CI has the emulator itself under AddressSanitizer: .ci/native.
@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", [pytest.param(RACES, id="races"), pytest.param(BOUNDS, id="bounds", marks=pytest.mark.exhaustive)]
)
def test_sanitizers_find_nothing(flags, programs, tmp_path):
    done = run_program(programs(flags), tmp_path, flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "clean\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "words", "fault"),
    [
        pytest.param(*each, id=name, marks=pytest.mark.exhaustive if each[0] is BOUNDS else [])
        for name, each in SANITIZED.items()
    ],
)
def test_sanitizers_name_the_place(flags, words, fault, programs, tmp_path):
    copy_with(fault, tmp_path)
    changed = build_program(tmp_path, tmp_path, flags, affected(fault))
    done = run_program(with_changed(programs(flags), changed), tmp_path, flags)
    assert done.returncode != 0
    assert words in done.stderr
    assert "in void aape::cuda::" in done.stderr or re.search(r"csrc/cuda/\w+\.cuh?:\d+", done.stderr)
