"""That the interpreter can say no: PTX with one thing wrong in it is caught, and told by what is wrong."""

import re

import pytest
import torch
from cases import Case
from ptx_backend import NVCC, text_of
from ptx_text import UnknownInstructionError
from ptx_values import KernelError
from test_sblu import run as run_sblu

from aape_kernels import AaPE

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc was found")
ANY = "<float,AnyFloat,int>"
SIZES = "<Sizes<BFloat16,BFloat16,16,32,16,true>>"
OF_FLOATS, UNIT = "<Sizes<float,float,16,32,12,true>>", "<UnitSizes<float,32,true>>"
BARRIERS = {  # and how many
    f"sblu_forward_kernel{ANY}": 3,
    f"sblu_backward_states_kernel{ANY}": 3,
    f"sblu_backward_weight_kernel{ANY}": 5,
    f"sblu_backward_windows_kernel{ANY}": 4,
    f"stem_kernel{ANY}": 10,
    f"warp_stem_kernel{SIZES}": 3,
    f"warp_stem_backward_kernel{SIZES}": 4,
    f"warp_stem_kernel{OF_FLOATS}": 3,
    f"warp_stem_backward_kernel{OF_FLOATS}": 4,
    f"warp_tokens_kernel{SIZES}": 3,
    f"warp_tokens_kernel{OF_FLOATS}": 3,
    f"warp_sblu_kernel{UNIT}": 3,
    f"warp_sblu_backward_kernel{UNIT}": 6,
    "gradients_kernel": 2,
}
# of the logits: the projection's own come before anyone reads them. Before the next pixels, where lanes have read the
# places that they write to; or, if their operand is in registers, waited for the last chunk since
REDUNDANT = {
    (f"stem_kernel{ANY}", 6), (f"warp_sblu_backward_kernel{UNIT}", 4), (f"warp_tokens_kernel{SIZES}", 2),
}  # fmt: skip
BARRIER = re.compile(r"bar\.(?:warp\.)?sync\s+-?\d+;")


def step(kernel: str) -> None:
    """Launch that kernel, with several tiles for a block and several blocks of rows."""
    if kernel.startswith("warp_sblu"):
        case = Case(2, 1, 24, (16, 16), (16, 16), 16, (2, 300), (0, 0), "quadrature")
        run_sblu(case.options, *case.inputs(torch.float32))
        return
    if kernel.startswith("sblu"):
        case = Case(2, 2, 40, (20, 15), (20, 8), 15, (2, 40), (0, 0), "quadrature")
        run_sblu(case.options, *case.inputs(torch.float32))
        return
    if kernel.startswith("stem"):
        stem = AaPE(patch_size=(10, 4), in_chans=2, embed_dim=6, num_states=40, encoder_dim=40, features="complex")
        x = torch.randn(1, 2, 20, 64)
    else:
        dtype = torch.float32 if OF_FLOATS in kernel else torch.bfloat16
        width = 96 if kernel.startswith("warp_tokens") else 8
        stem, x = AaPE(embed_dim=width).to(dtype), torch.randn(1, 1, 32, 16 * 300).to(dtype)
    if kernel == "gradients_kernel":  # a sum of many elements for one block
        for parameter in stem.parameters():
            parameter.requires_grad_(parameter is stem.sblu.weight)
    stem(x).sum().backward()


def replaced(kernel: str, pattern: str | re.Pattern[str], by: str, number: int | None = None) -> str:
    """Its text with one occurrence changed, or all."""
    text = text_of(kernel)
    found = list(re.finditer(pattern, text))
    assert found
    for match in reversed(found if number is None else [found[number]]):
        text = text[: match.start()] + match.expand(by) + text[match.end() :]
    return text


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "number"),
    [(kernel, n) for kernel, count in BARRIERS.items() for n in range(count) if (kernel, n) not in REDUNDANT],
)
def test_a_missing_barrier_is_caught(interpreter, kernel, number):
    assert len(BARRIER.findall(text_of(kernel))) == BARRIERS[kernel]
    interpreter.changed[kernel] = replaced(kernel, BARRIER, "", number)
    with pytest.raises(KernelError, match="a race"):
        step(kernel)


FORWARD, ON_TENSOR_CORES = f"sblu_forward_kernel{ANY}", f"warp_stem_kernel{SIZES}"
TOKENS = f"warp_tokens_kernel{SIZES}"
BROKEN = {
    "an access of 16 bytes at 4": (FORWARD, r"(ld\.shared\.v4\.f32\s.*\[%r\d+)\]", r"\1+4]", "misaligned"),
    "a row behind the tile's": (FORWARD, r"(ld\.shared\.f32\s.*\[%r\d+)\]", r"\1+131072]", "outside of shared memory"),
    "before shared memory": (FORWARD, r"(st\.shared\.f32\s+\[%r\d+)(?:\+\d+)?\]", r"\1+-1048576]", "outside of shared"),
    "a store left out": (FORWARD, r"st\.shared\.v4\.b32[^;]*;", "", "that nobody has written"),
    "a store behind a tensor": (
        FORWARD,
        r"(st\.global\.f32\s+\[%rd\d+)(?:\+\d+)?\]",
        r"\1+1073741824]",
        "every tensor",
    ),
    "a load behind a tensor": (FORWARD, r"(ld\.global\.v4\.[fu]32\s.*\[%rd\d+)\]", r"\1+1073741824]", "every tensor"),
    "all in one place": (FORWARD, r"(mov\.u32\s+%r\d+, )%ctaid\.x", r"\g<1>0", "a race in global memory"),
    "a lane too few": (ON_TENSOR_CORES, r"(?=mma\.sync)", "@LANE bra END;\n", "lanes that do not take part"),
    "a copy that is not waited for": (TOKENS, r"cp\.async\.wait_all;", "", "that nobody has written"),
    "a copy at 4": (TOKENS, r"(cp\.async[^,]*\[%r\d+)\]", r"\1+4]", "misaligned"),
    "half a warp's shuffle": (ON_TENSOR_CORES, r"(shfl\.sync.*, )(%r\d+);", r"\g<1>65535;", "a part of a warp"),
}


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize(("kernel", "pattern", "by", "words"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_kernel_is_caught(interpreter, kernel, pattern, by, words):
    text = replaced(kernel, pattern, by)
    if "@LANE" in text:  # lane 0 of every warp leaves
        lane = "and.b32 %r1, %r1, 31;\nsetp.eq.s32 %p1, %r1, 0;\n@%p1 bra"
        tid = "mov.u32 %r1, %tid.x;\n"
        text = text.replace("@LANE bra END", f"{tid}{lane} $END").rstrip()[:-1] + "$END:\n\tret;\n}"
    interpreter.changed[kernel] = text
    with pytest.raises(KernelError, match=words):
        step(kernel)


@needs_nvcc
def test_an_unknown_instruction_is_named(interpreter):
    interpreter.changed[FORWARD] = replaced(FORWARD, r"fma\.rn\.f32", "fma.rz.f32", 0)
    with pytest.raises(UnknownInstructionError, match=r"fma\.rz\.f32 %f"):
        step(FORWARD)
