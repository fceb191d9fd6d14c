"""What single PTX instructions compute, and that threads that part meet again."""

import math
from fractions import Fraction

import numpy as np
import ptx_values as values
import pytest
import torch
from ptx_machine import Program, run
from ptx_memory import Global
from ptx_text import kernel_of

THREADS = 64
KERNEL = """.visible .entry kernel(
	.param .align 8 .b8 kernel_param_0[16]
)
{
	.reg .pred %p<4>;
	.reg .b16 %rs<4>;
	.reg .f32 %f<8>;
	.reg .b32 %r<8>;
	.reg .b64 %rd<8>;

	ld.param.u64 %rd1, [kernel_param_0];
	ld.param.u32 %r1, [kernel_param_0+8];
	mov.u32 %r2, %tid.x;
	mul.wide.s32 %rd2, %r2, 4;
	add.s64 %rd3, %rd1, %rd2;
BODY
	st.global.u32 [%rd3], %r3;
	ret;

}"""


def computed(body: str, argument: int = 0) -> np.ndarray:
    """%r3 of every thread; %r1 is the argument, %r2 the thread's number."""
    out = np.full(THREADS, -1, np.int32)
    memory = Global()
    memory.add(out.ctypes.data, out.ctypes.data + out.nbytes)
    parameters = out.ctypes.data.to_bytes(8, "little") + argument.to_bytes(8, "little", signed=True)
    run(Program(kernel_of(KERNEL.replace("BODY", body))), parameters, (1, 1, 1), THREADS, 0, memory)
    return out


WORD = 0xFFFFFFFF
INTEGERS = {
    "shr.s32 %r3, %r1, %r2;": (-9, lambda n: -9 >> n),
    "shr.u32 %r3, %r1, %r2;": (-9, lambda n: (-9 & WORD) >> n),
    "shl.b32 %r3, %r1, %r2;": (5, lambda n: 5 << n),
    "add.s32 %r4, %r2, 1; div.s32 %r3, %r1, %r4;": (-100, lambda n: -(100 // (n + 1))),
    "add.s32 %r4, %r2, 1; rem.s32 %r3, %r1, %r4;": (-100, lambda n: -(100 % (n + 1))),
    "add.s32 %r4, %r2, 1; div.u32 %r3, %r1, %r4;": (-2, lambda n: (-2 & WORD) // (n + 1)),
    "mad.lo.s32 %r3, %r1, %r1, %r2;": (70000, lambda n: 70000**2 + n),
    "mul.wide.s32 %rd4, %r1, %r1; shr.u64 %rd4, %rd4, 32; cvt.u32.u64 %r3, %rd4;": (-70000, lambda n: 70000**2 >> 32),
    "mul.hi.s32 %r3, %r1, %r1;": (-70000, lambda n: 70000**2 >> 32),
    "add.s32 %r4, %r2, -64; mul.hi.u32 %r3, %r1, %r4;": (-2, lambda n: ((-2 & WORD) * (n - 64 & WORD)) >> 32),
    "bfi.b32 %r3, %r2, %r1, 5, 27;": (7, lambda n: n << 5 | 7),
    "prmt.b32 %r3, %r1, %r2, 4180;": (0x11223344, lambda n: 0x3344 << 16 | n),
    "setp.lt.u32 %p1, %r1, %r2; selp.b32 %r3, 1, 0, %p1;": (-1, lambda n: 0),
    "setp.lt.s32 %p1, %r1, %r2; selp.b32 %r3, 1, 0, %p1;": (-1, lambda n: 1),
    "shfl.sync.bfly.b32 %r3|%p1, %r2, 3, 31, -1;": (0, lambda n: n ^ 3),
    "shfl.sync.idx.b32 %r3|%p1, %r2, 33, 31, -1;": (0, lambda n: n // 32 * 32 + 1),
    "mov.b32 {%rs1, %rs2}, %r1; mov.b32 %r3, {%rs2, %rs1};": (0x11223344, lambda n: 0x33441122),
}


@pytest.mark.parametrize(("body", "argument", "want"), [(k, *v) for k, v in INTEGERS.items()])
def test_integers(body, argument, want):
    assert [n & WORD for n in computed(body, argument).tolist()] == [want(n) & WORD for n in range(THREADS)]


def test_threads_that_part_meet_again():
    """A loop of n rounds for thread n, with a branch in it, and a shuffle of the whole warp behind it."""
    body = """
	mov.u32 %r4, 0; mov.u32 %r3, 0;
$TOP:
	setp.ge.s32 %p1, %r4, %r2;
	@%p1 bra $END;
	and.b32 %r5, %r4, 1; setp.eq.s32 %p2, %r5, 0;
	@!%p2 bra $ODD;
	add.s32 %r3, %r3, %r4;
$ODD:
	add.s32 %r4, %r4, 1;
	bra.uni $TOP;
$END:
	shfl.sync.bfly.b32 %r3|%p1, %r3, 1, 31, -1;"""
    assert computed(body).tolist() == [sum(range(0, n ^ 1, 2)) for n in range(THREADS)]


SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, 3.4e38, 1e-40, 65504.0, 65520.0, 1e-8]


def numbers() -> torch.Tensor:
    bits = torch.randint(-(2**31), 2**31, (4096,)).to(torch.int32)
    ties = (bits & ~0xFFFF) | 0x8000  # halfway between two of bfloat16
    return torch.cat([bits.view(torch.float32), ties.view(torch.float32), torch.tensor(SPECIAL)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_to_16_bits_and_back(dtype):
    value = numbers()
    to, back = {
        torch.bfloat16: (values.to_bfloat16, values.from_bfloat16),
        torch.float16: (values.to_float16, values.from_float16),
    }[dtype]
    with np.errstate(all="ignore"):
        got = to(value.numpy())
        wide = back(got)
    want = value.to(dtype)
    known = ~value.isnan().numpy()
    assert np.array_equal(got[known], want.view(torch.int16).numpy().view(np.uint16)[known])
    assert np.array_equal(wide, want.float().numpy(), equal_nan=True)


def test_multiply_add_is_rounded_once():
    a, b, c = (torch.randn(3, 4096) * 10 ** torch.randint(-3, 4, (3, 4096))).numpy()
    a64, b64, c64 = (each.astype(np.float64) * (1 + 2.0**-40) for each in (a, b, c))
    want = (a.astype(np.longdouble) * b + c).astype(np.float32)
    assert np.mean(values.fma32(a, b, c) != want) <= 1e-3
    assert np.all(np.abs(values.fma32(a, b, c) - want) <= np.spacing(np.abs(want)))
    near = -(a64 * b64)  # what is left is the product's rounding error
    exact = [float(Fraction(x) * Fraction(y) + Fraction(z)) for x, y, z in zip(a64, b64, near, strict=True)]
    assert np.array_equal(values.fma64(a64, b64, near), np.array(exact))
    exact = [float(Fraction(x) * Fraction(y) + Fraction(z)) for x, y, z in zip(a64, b64, c64, strict=True)]
    assert np.all(np.abs(values.fma64(a64, b64, c64) - exact) <= np.spacing(np.abs(exact)))


def test_conversion_to_integers_stays_in_range():
    value = np.array([math.nan, math.inf, -math.inf, 1.9, -1.9, 2.0**31, -(2.0**31)], np.float32)
    with np.errstate(all="ignore"):
        got = values.to_integer(value, np.int32)
    assert got.tolist() == [0, 2**31 - 1, -(2**31), 1, -1, 2**31 - 1, -(2**31)]


def test_products_of_a_warp():
    """Factors as csrc/cuda/products.cuh has them in the lanes' registers."""
    left, right = torch.randn(16, 16).bfloat16(), torch.randn(16, 8).bfloat16()
    sums = torch.randn(16, 8)
    lanes = np.arange(32)
    g, c = lanes // 4, lanes % 4

    def words(matrix: torch.Tensor, row: np.ndarray, column: np.ndarray) -> np.ndarray:
        pair = torch.stack([matrix[row, column], matrix[row, column + 1]], 1)
        return pair.view(torch.int32).flatten().numpy()

    a = [words(left, g + 8 * (k % 2), 2 * c + 8 * (k // 2)) for k in range(4)]
    b = [words(right.T.contiguous(), g, 2 * c + 8 * k) for k in range(2)]
    at = [(g + 8 * (k // 2), 2 * c + k % 2) for k in range(4)]
    got = values.multiply(
        lanes, values.left_bf16(lanes, *a), values.right_bf16(lanes, *b), *(sums[place].numpy() for place in at)
    )
    want = left.double() @ right.double() + sums
    for value, place in zip(got, at, strict=True):
        assert np.allclose(value, want[place].numpy(), rtol=0, atol=1e-5)
    turned = values.transpose(words(left[:8, :8].contiguous(), g, 2 * c), lanes)
    assert np.array_equal(turned, words(left[:8, :8].T.contiguous(), g, 2 * c))


def test_products_of_a_warp_in_tf32():
    """Eight columns by eight rows, a number a register; what TF32 does not have of them is not seen."""
    left, right, sums = torch.randn(16, 8), torch.randn(8, 8), torch.randn(16, 8)
    lanes = np.arange(32)
    g, c = lanes // 4, lanes % 4
    a = [left[g + 8 * (k % 2), c + 4 * (k // 2)].numpy().view(np.int32) for k in range(4)]
    b = [right[c + 4 * k, g].numpy().view(np.int32) for k in range(2)]
    at = [(g + 8 * (k // 2), 2 * c + k % 2) for k in range(4)]
    got = values.multiply(
        lanes, values.left_tf32(lanes, *a), values.right_tf32(lanes, *b), *(sums[place].numpy() for place in at)
    )

    def cut(matrix: torch.Tensor) -> torch.Tensor:
        return (matrix.view(torch.int32) & -0x2000).view(torch.float32).double()

    want = cut(left) @ cut(right) + sums
    for value, place in zip(got, at, strict=True):
        exact = want[place].numpy()
        assert np.allclose(value, exact, rtol=2.0**-23, atol=0)
        assert np.all(np.abs(value) <= np.abs(exact))  # towards zero
