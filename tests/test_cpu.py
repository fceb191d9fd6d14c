"""What is the CPU backend's own: threads, addressing, instruction sets, the ops it is registered under."""

import copy
import logging
import os
import subprocess
import sys

import pytest
import torch
from cases import AWKWARD, SQUARE, Case
from checks import check_gain_and_z, compare, far_apart, poisoned_memory, same_bits, spread
from oracle import bound, relative_error
from test_stem import check_16_bit_forward_and_gradients
from torch.nn import functional

from aape_kernels import AaPE, ops, sblu
from aape_kernels.backends import BACKENDS, Call, _log_fallback, choose, cpu, cpu_stem, native
from aape_kernels.geometry import PatchGrid
from aape_kernels.reference import PLANES

pytestmark = pytest.mark.skipif(not cpu.NATIVE_BUILT, reason="the native module was not built")

CASES = {"square": SQUARE, "awkward": AWKWARD}


@pytest.fixture(params=native.load().build_info()["instruction_sets"] if cpu.NATIVE_BUILT else [])
def isa(request, monkeypatch):
    monkeypatch.setenv("AAPE_BACKEND", "cpu")
    monkeypatch.setenv("AAPE_CPU_ISA", request.param)
    return request.param


@pytest.fixture
def threads():
    """Sets the number of threads, and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def gradients(function, inputs, cotangent):
    leaves = [value.detach().requires_grad_() for value in inputs]
    out = function(*leaves)
    return [out, *torch.autograd.grad(out, leaves, cotangent)]


@pytest.mark.parametrize("stride", [(16, 16), (10, 10)], ids=["grid", "overlap"])
def test_sblu_gives_the_same_bits_on_any_number_of_threads(isa, threads, stride):
    case = Case(3, 1, 20, (16, 16), stride, 16, (4, 30), (3, 5), "quadrature")
    inputs, cotangent = case.inputs(torch.float32)
    results = []
    for count in (1, 2, 3, 7):
        threads(count)
        results.append(gradients(lambda *v: sblu(*v, **case.options), inputs, cotangent))
    assert all(same_bits(other, results[0]) for other in results[1:])


@pytest.mark.parametrize(("layout", "dim"), [("FT", 96), ("TF", 96), ("FT", 192)])
def test_embed_gives_the_same_bits_on_any_number_of_threads(isa, threads, layout, dim):
    """Also where there are too few tokens for two parts of them, each with sums of its own."""
    stem = AaPE(embed_dim=dim, layout=layout)
    x = torch.randn(2, 1, 128, 256)
    cotangent = torch.randn(2, 128, dim)
    results = []
    for count in (1, 2, 2, 3):
        threads(count)
        tokens = stem(x)
        results.append([tokens, *torch.autograd.grad(tokens, list(stem.parameters()), cotangent)])
    assert all(same_bits(other, results[0]) for other in results[1:])


@pytest.mark.parametrize("need_x", [False, True])
def test_a_stem_of_many_tokens_gives_the_same_bits_on_any_number_of_threads(isa, threads, need_x):
    """The more threads, the more tokens they work on before their sums are added."""
    stem = AaPE(patch_size=4, embed_dim=16, num_states=5, encoder_dim=6)
    x = torch.randn(2, 1, 64, 600, requires_grad=need_x)
    cotangent = torch.randn(2, 16 * 150, 16)
    inputs = [*([x] if need_x else []), *stem.parameters()]
    results = []
    for count in (1, 2, 3, 8, 16):
        threads(count)
        results.append(torch.autograd.grad(stem(x), inputs, cotangent))
    assert all(same_bits(other, results[0]) for other in results[1:])


FEW_TOKENS = """
import copy, torch
from aape_kernels import AaPE
for tokens in (1, 2, 7, 16, 17, 33, 47, 95, 96, 97, 200):
    for dim in (1, 5):
        stem = AaPE(embed_dim=dim, patch_size=4, num_states=4, encoder_dim=3, features="complex", dtype=torch.float64)
        x, gradients = torch.randn(1, 1, 4, 4 * tokens, dtype=torch.float64), []
        for stem.backend in ("cpu", "reference"):
            y = stem(x)
            gradients.append(torch.autograd.grad(y.square().sum(), list(stem.parameters())))
        for got, want in zip(*gradients):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
        stem32 = copy.deepcopy(stem).float()
        stem32.backend = "cpu"
        y = stem32(x.float())
        for got, want in zip(torch.autograd.grad(y.square().sum(), list(stem32.parameters())), gradients[1]):
            torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-3)
"""


def test_few_tokens_leave_no_sum_unwritten(isa):
    """In a process whose allocator fills what it gives out with rubbish."""
    environment = os.environ | {"MALLOC_PERTURB_": "165"}
    done = subprocess.run([sys.executable, "-c", FEW_TOKENS], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("states", [8, 16, 32, 48])
@pytest.mark.parametrize(
    ("channels", "patch", "stride", "window"),
    [(1, (16, 16), (16, 16), 16), (3, (5, 7), (4, 5), 11), (2, (4, 12), (4, 20), 8)],
    ids=["grid", "overlap", "gaps"],
)
def test_rows_in_place_and_copied_give_the_same_bits(isa, dtype, states, channels, patch, stride, window):
    """Pixels, states and cotangents are read where they lie if they are whole vectors there, and else from a copy."""
    case = Case(2, channels, states, patch, stride, window, (2, 40), (3, 4), "quadrature")
    inputs, cotangent = case.inputs(dtype)
    with poisoned_memory():
        got = gradients(lambda *v: sblu(*v, **case.options), inputs, cotangent)
        want = gradients(lambda *v: sblu(*v, **case.options), [spread(value) for value in inputs], spread(cotangent))
    assert same_bits(got, want)
    wide = [value.double() for value in inputs]
    exact = gradients(lambda *v: sblu(*v, **case.options, backend="reference"), wide, cotangent.double())
    compare(got, exact, inputs, dtype)


def test_elements_beyond_2_to_the_31(isa):
    case = Case(2, 1, 3, (4, 8), (4, 8), 8, (2, 3), (0, 0), "quadrature")
    (x, *rest), cotangent = case.inputs(torch.float32)
    want = gradients(lambda *v: sblu(*v, **case.options), (x, *rest), cotangent)
    got = gradients(lambda *v: sblu(*v, **case.options), (*far_apart(x), *rest), cotangent)
    assert same_bits(got, want)


@pytest.mark.parametrize("odd", [False, True], ids=["even", "odd"])
def test_gain_and_z_hold_everywhere_in_the_range(isa, odd):
    window = 5 if odd else 4
    check_gain_and_z(window, points=60, frames=window)


@pytest.mark.parametrize("rows", [1, 64])
def test_autocast_does_not_reach_into_the_op(isa, rows):
    """The encoder keeps float32 whatever the product's dtype, with small products and with large ones."""
    stem, x = AaPE(embed_dim=64), torch.randn(rows, 1, 32, 64)
    p = [value.detach() for value in stem.parameters()]
    options = ((16, 16), (16, 16), 16, True, stem.decay, stem.band, False, "cpu")
    _, *plain = ops.embed(x, *p, *options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens, *under = ops.embed(x, *p, *options)
        narrow = ops.embed(x, p[0].bfloat16(), p[1].bfloat16(), *p[2:-1], p[-1].bfloat16(), *options)
    assert tokens.dtype == torch.float32
    assert narrow[0].dtype == torch.bfloat16
    for got in (under, narrow[1:]):
        for value, want in zip(got, plain, strict=True):
            assert value.dtype == torch.float32
            assert relative_error(value, want) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dim", [1, 31, 64, 70])
def test_many_tokens_and_few_have_the_same_bits(isa, dim, bias, dtype):
    """The output's weights are packed where tokens are many: here twice the 14 columns of its operand, and more."""
    stem = AaPE(patch_size=2, embed_dim=dim, num_states=3, encoder_dim=5, bias=bias).to(dtype)
    torch.nn.init.normal_(stem.fusion.weight)
    x = torch.randn(1, 1, 2, 2 * 200, dtype=dtype)
    with torch.no_grad(), poisoned_memory():
        for count in (28, 29, 60, 200):
            many = stem(x[..., : 2 * count])
            few = [stem(part) for part in x[..., : 2 * count].split(2 * 11, 3)]
            assert torch.equal(many, torch.cat(few, 1))
        wide = AaPE(patch_size=2, embed_dim=dim, num_states=3, encoder_dim=5, bias=bias, backend="reference").double()
        wide.load_state_dict(stem.state_dict())
        assert relative_error(many, wide(x.double())) <= bound(dtype, whole_stem=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("features", PLANES)
@pytest.mark.parametrize(("has", "least"), [(True, 0), (True, 384), (False, 384)], ids=["both", "forward", "neither"])
def test_tokens_of_16_bits_by_either_product(monkeypatch, dtype, features, has, least):
    monkeypatch.setattr(native, "has_products", lambda dtype: has)
    monkeypatch.setattr(cpu_stem, "LEAST_DIM", least)
    for whole in (True, False):
        stem = AaPE(embed_dim=64, num_states=8, features=features)
        (stem if whole else stem.proj).to(dtype)
        check_16_bit_forward_and_gradients(stem, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_of_many_blocks_are_as_good_as_of_one(monkeypatch, dtype):
    """Of numbers that do not cancel: in 16 bits each addition would lose a half of their last one."""
    monkeypatch.setattr(native, "has_products", lambda dtype: True)
    monkeypatch.setattr(cpu_stem, "LEAST_DIM", 0)
    monkeypatch.setattr(cpu_stem, "BLOCK", 8)
    stem, x = AaPE(patch_size=4, embed_dim=8, num_states=3).to(dtype), torch.rand(200, 1, 8, 16, dtype=dtype)
    wide = copy.deepcopy(stem).double()
    wide.backend = "reference"
    got, want = (
        torch.autograd.grad(each(x.to(each.proj.weight.dtype)).sum(), [*each.proj.parameters(), each.fusion.weight])
        for each in (stem, wide)
    )
    assert all(relative_error(a, b) <= bound(dtype) for a, b in zip(got, want, strict=True))


def test_products_of_16_bits_are_torchs_where_the_processor_has_them(monkeypatch):
    seen, linear = [], functional.linear
    monkeypatch.setattr(native, "has_products", lambda dtype: dtype == torch.bfloat16)
    monkeypatch.setattr(functional, "linear", lambda *given: seen.append(given[0].dtype) or linear(*given))
    for dtype in (torch.bfloat16, torch.float16):
        with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
            assert AaPE(embed_dim=64)(torch.randn(2, 1, 64, 64)).dtype == dtype
    assert seen == [torch.bfloat16]


@pytest.mark.parametrize(("has", "dims"), [(True, {384}), (False, set())])
def test_gradients_of_16_bits_are_by_torchs_products_where_they_pay(monkeypatch, has, dims):
    narrow, seen = cpu_stem._narrow_gradients, set()
    monkeypatch.setattr(native, "has_products", lambda dtype: has)
    monkeypatch.setattr(cpu_stem, "_narrow_gradients", lambda *given: seen.add(given[2].dim) or narrow(*given))
    for dim in (64, 384):
        stem = AaPE(embed_dim=dim, num_states=3)
        with torch.autocast("cpu"):
            stem(torch.randn(1, 1, 32, 32)).float().sum().backward()
    assert seen == dims


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("need_x", [True, False])
def test_a_cotangent_of_16_bits_is_read_as_its_numbers(isa, monkeypatch, dtype, need_x):
    """Of more tokens than are worked on at once: the same bits as of the numbers in float32."""
    monkeypatch.setattr(native, "has_products", lambda dtype: False)
    stem = AaPE(patch_size=4, embed_dim=29, num_states=5, encoder_dim=6)
    weights = (stem.proj.weight, stem.proj.bias, *stem.encoder.parameters(), stem.sblu.weight, stem.fusion.weight)
    x, options = torch.randn(1, 1, 16, 2000), ((4, 4), (4, 4), 4, True, stem.decay, stem.band, False)
    with torch.no_grad():
        tokens, r, hidden = torch.ops.aape.embed(x, *weights, *options, "cpu")
        narrow = torch.randn_like(tokens).to(dtype)
        got, want = (
            torch.ops.aape.embed_backward(grad, x, *weights, r, hidden, *options, (need_x, *[True] * 8), "cpu")
            for grad in (narrow, narrow.float())
        )
    assert same_bits(got, want)


def test_every_output_is_written(isa):
    case = AWKWARD
    inputs, cotangent = case.inputs()
    stem = AaPE(patch_size=4, in_chans=2, embed_dim=6, num_states=3, encoder_dim=5).double()
    x = torch.randn(2, 2, 9, 13, dtype=torch.float64)

    def everything():
        tokens = stem(x)
        values = gradients(lambda *v: sblu(*v, **case.options), inputs, cotangent)
        return [*values, tokens, *torch.autograd.grad(tokens.square().sum(), list(stem.parameters()))]

    want = everything()
    with poisoned_memory():
        got = everything()
    assert same_bits(got, want)


def test_an_illegal_instruction_set_is_refused(monkeypatch):
    monkeypatch.setenv("AAPE_CPU_ISA", "sse9")
    inputs, _ = SQUARE.inputs()
    with pytest.raises(ValueError, match=r"AAPE_CPU_ISA: expected one of .*baseline on this machine, got 'sse9'"):
        sblu(*inputs, **SQUARE.options, backend="cpu")
    with pytest.raises(ValueError, match="AAPE_CPU_ISA: expected one of"):
        native.load().sblu(None, (), False, *[None] * 4, 1)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(3, 1, 8, dtype=torch.int32), "expected a tensor of 16, 32 or 64 bits floating point"),
        (torch.ones(3, 1, 8, dtype=torch.complex64), "expected a tensor of 16, 32 or 64 bits floating point"),
        (torch.ones(1, 1, 1, 3, 1, 8), "a view has at most five axes"),
        ([1.0], "Unable to cast"),  # in torch's words
    ],
)
def test_the_native_module_refuses_what_is_no_view(weight, message):
    x, states, y = torch.ones(1, 1, 8, 8), torch.ones(1, 1, 1, 3), torch.ones(1, 1, 1, 2, 3)
    with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
        native.load().sblu(x, (8, 8, 8, 8, 8, 3), False, states, states, weight, y, 1)
    with pytest.raises(ValueError, match="an x of four axes, got 3"):
        native.load().sblu(x[0], (8, 8, 8, 8, 8, 3), False, states, states, torch.ones(3, 1, 8), y, 1)
    with pytest.raises(ValueError, match="a grid has six sizes"):
        native.load().sblu(x, (8, 8), False, states, states, torch.ones(3, 1, 8), y, 1)
    assert (y == 1).all()


def test_auto_takes_it_and_logs_one_line_when_it_cannot(monkeypatch, caplog):
    call = Call("embed", torch.device("cpu"), torch.float32)
    assert choose("auto", call) is BACKENDS["cpu"].run
    monkeypatch.setattr(cpu, "NATIVE_BUILT", False)
    _log_fallback.cache_clear()
    with caplog.at_level(logging.WARNING, logger="aape_kernels"):
        for _ in range(3):
            assert choose("auto", call) is BACKENDS["reference"].run
    (record,) = caplog.records
    assert record.getMessage().startswith("backend 'auto' on cpu passes over 'cpu': the native module was not built")


def test_one_openmp_runtime_in_the_process():
    code = (
        "import torch; from aape_kernels import AaPE\n"
        "stem = AaPE(embed_dim=8, backend='cpu'); stem(torch.randn(1, 1, 32, 64))\n"
        "paths = {line.split()[-1] for line in open('/proc/self/maps')}\n"
        "print(*(path for path in paths if 'omp' in path.rpartition('/')[2]), sep='\\n')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(run.stdout.split()) == 1, run.stdout


def test_memory_held_for_the_backward():
    """At most (2S + encoder_dim) floats a token beyond x and the weights."""
    stem, x = AaPE(embed_dim=48), torch.randn(2, 1, 128, 256)
    known = {value.untyped_storage().data_ptr() for value in (x, *stem.parameters())}
    held = {}

    def pack(value):
        storage = value.untyped_storage()
        if storage.data_ptr() not in known:
            held[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        tokens = stem(x)
    assert 0 < sum(held.values()) <= (2 * 32 + 64) * 4 * tokens.shape[0] * tokens.shape[1]


def sblu_arguments(case, permuted):
    inputs, cotangent = case.inputs(torch.float32)
    if permuted:  # mel bins and frames the other way round in memory, as layout "TF" gives them
        inputs[0] = inputs[0].transpose(2, 3).contiguous().transpose(2, 3)
        cotangent = cotangent.transpose(1, 2).contiguous().transpose(1, 2)
    return inputs, cotangent, (case.patch, case.stride, case.window, case.kernel == "quadrature")


@pytest.mark.parametrize("permuted", [False, True], ids=["contiguous", "permuted"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_opcheck_sblu(case, permuted):
    inputs, cotangent, grid = sblu_arguments(case, permuted)
    torch.library.opcheck(torch.ops.aape.sblu.default, (*inputs, *grid, "cpu"))
    for need in ((True,) * 4, (False, True, False, True)):
        torch.library.opcheck(torch.ops.aape.sblu_backward.default, (cotangent, *inputs, *grid, need, "cpu"))


@pytest.mark.parametrize("time_major", [False, True], ids=["frequency-major", "time-major"])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
def test_opcheck_embed(time_major, bias):
    stem = AaPE(patch_size=(4, 8), in_chans=2, embed_dim=6, num_states=3, encoder_dim=5, bias=bias).requires_grad_(
        False
    )
    p = dict(stem.named_parameters())
    names = ("proj.weight", "proj.bias", "encoder.w1", "encoder.b1", "encoder.w2", "encoder.b2")
    parameters = [p.get(name) for name in (*names, "sblu.weight", "fusion.weight")]
    x = torch.randn(2, 2, 24, 13).transpose(2, 3) if time_major else torch.randn(2, 2, 13, 24)
    x = x.expand(2, 2, *x.shape[2:])
    options = ((4, 8), (4, 8), 8, True, stem.decay, stem.band, time_major)
    torch.library.opcheck(torch.ops.aape.embed.default, (x, *parameters, *options, "cpu"))
    tokens, r, hidden = torch.ops.aape.embed(x, *parameters, *options, "cpu")
    for need in ((True,) * 9, (False, True) * 4 + (False,)):
        arguments = (torch.randn_like(tokens), x, *parameters, r, hidden, *options, need, "cpu")
        torch.library.opcheck(torch.ops.aape.embed_backward.default, arguments)


def test_only_what_is_asked_for_is_computed():
    inputs, cotangent, grid = sblu_arguments(AWKWARD, False)
    every = torch.ops.aape.sblu_backward(cotangent, *inputs, *grid, (True,) * 4, "cpu")
    for k in range(4):
        need = tuple(index == k for index in range(4))
        one = torch.ops.aape.sblu_backward(cotangent, *inputs, *grid, need, "cpu")
        assert [value.numel() > 0 for value in one] == list(need)
        assert torch.equal(one[k], every[k])


def small_stem(features="both"):
    sizes = {"patch_size": (3, 4), "embed_dim": 3, "stride": (2, 3), "num_states": 3, "encoder_dim": 3}
    return AaPE(**sizes, features=features, backend="cpu").double()


@pytest.mark.parametrize("features", PLANES)
def test_derivatives_of_the_whole_stem(isa, features):
    stem, x = small_stem(features), torch.randn(1, 1, 5, 8, dtype=torch.float64, requires_grad=True)
    names, values = zip(*stem.named_parameters(), strict=True)

    def f(x, *values):
        return torch.func.functional_call(stem, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(f, (x, *values))
    if isa == native.load().build_info()["instruction_sets"][0]:  # the second derivative is the reference's on all
        assert torch.autograd.gradgradcheck(f, (x, *values))


@pytest.mark.parametrize("asked", ["one", "frozen"])
def test_double_backward_of_a_part(asked):
    """Only one gradient differentiated on, or parameters frozen: what remains agrees with the reference."""
    stem = small_stem()
    if asked == "frozen":
        for parameter in (stem.encoder.w1, stem.sblu.weight, stem.proj.bias):
            parameter.requires_grad_(False)
    x = torch.randn(2, 1, 5, 8, dtype=torch.float64, requires_grad=True)
    results = []
    for name in ("cpu", "reference"):
        stem.backend = name
        (grad_x,) = torch.autograd.grad(stem(x).square().sum(), x, create_graph=True)
        wanted = [value for value in stem.parameters() if value.requires_grad]
        results.append(torch.autograd.grad(grad_x.square().sum(), [x, *wanted], allow_unused=True))
    for got, want in zip(*results, strict=True):
        assert relative_error(got, want) <= 1e-10


# functorch itself calls the deprecated torch.jit.script
@pytest.mark.filterwarnings("ignore:`torch.jit.*is deprecated:DeprecationWarning")
def test_forward_mode_is_refused():
    stem, x = small_stem(), torch.randn(1, 1, 5, 8, dtype=torch.float64)
    for f in (stem, torch.vmap(stem)):
        given = x if f is stem else x.unsqueeze(1)
        with pytest.raises(NotImplementedError, match=r"forward-mode AD: expected backend 'reference'.*got 'cpu'"):
            torch.func.jvp(f, (given,), (given,))
    factor = torch.ones(())
    mapped, tangent = torch.func.jvp(lambda h: torch.vmap(stem)(x.unsqueeze(1)) * h, (factor,), (factor,))
    assert torch.equal(mapped, tangent)  # of what has no tangent there is none to refuse
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        with pytest.raises(NotImplementedError, match="forward-mode AD"):
            stem(dual)
        assert torch.equal(stem(x), stem(x.clone()))  # nothing to refuse without a tangent
        leaf = x.clone().requires_grad_()
        tokens = stem(leaf)
        with pytest.raises(NotImplementedError, match="forward-mode AD"):
            torch.autograd.grad(tokens, leaf, torch.autograd.forward_ad.make_dual(tokens.detach(), tokens.detach()))


@pytest.mark.filterwarnings("ignore:`torch.jit.*is deprecated:DeprecationWarning")
@pytest.mark.parametrize("parts", [False, True], ids=["fused", "by parts"])
def test_forward_over_reverse_is_refused(parts):
    """It was zero without a word, as Functions turn tangents off. Reverse over reverse gives the same."""
    stem, x = small_stem(), torch.randn(1, 1, 5, 8, dtype=torch.float64)
    if parts:
        stem.encoder.register_forward_hook(lambda *_: None)

    def loss(x):
        return stem(x).square().sum()

    gradient, v = torch.func.grad(loss), torch.randn_like(x)
    for product in (lambda: torch.func.jvp(gradient, (x,), (v,)), lambda: torch.func.hessian(loss)(x)):
        with pytest.raises(NotImplementedError, match="forward-mode AD"):
            product()
    (got,) = torch.func.vjp(gradient, x)[1](v)
    stem.backend = "reference"
    assert relative_error(got, torch.func.jvp(gradient, (x,), (v,))[1]) <= 1e-10


def test_matrix_products_of_rank_deficient_grids():
    """One token, one state, one mel bin: every size at its smallest."""
    grid = PatchGrid.make((1, 2))
    inputs = [torch.randn(1, 1, 1, 2), torch.rand(1, 1, 1, 1), torch.rand(1, 1, 1, 1), torch.randn(1, 1, 1)]
    y = sblu(*inputs, patch_size=grid.patch, backend="cpu")
    want = sblu(*(v.double() for v in inputs), patch_size=grid.patch, backend="reference")
    assert relative_error(y, want) <= bound(torch.float32)


def test_environment_variable_reaches_a_fresh_process():
    code = "import torch; from aape_kernels.backends import native; print(native.instruction_set())"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"AAPE_CPU_ISA": "baseline"}
    )
    assert run.stdout.split() == ["baseline"]


def test_subnormal_halves_count_though_the_processor_flushes(isa):
    """Subnormal in float16, they are normal numbers of float32; torch.set_flush_denormal is a setting of people's."""
    x = (torch.randint(1, 1000, (1, 1, 16, 32)) * 2.0**-24).half()
    rates, weight = torch.rand(1, 1, 2, 3).half(), torch.full((3, 1, 16), 100.0).half()
    want = sblu(x, rates, rates, weight)
    assert (want != 0).any()
    assert torch.set_flush_denormal(True)
    try:
        assert torch.equal(sblu(x, rates, rates, weight), want)
    finally:
        torch.set_flush_denormal(False)
