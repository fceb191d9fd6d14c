"""What every PTX instruction that nvcc makes of csrc/cuda is in numpy. Another one raises by its name."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from ptx_text import Block, Instruction, Kernel, UnknownInstructionError
from ptx_translate import OWN, Translation, rule
from ptx_values import VALUE_TYPES

COMPARE = {
    "eq": "{0} == {1}", "ne": "{0} != {1}", "lt": "{0} < {1}", "le": "{0} <= {1}", "gt": "{0} > {1}",
    "ge": "{0} >= {1}",
}  # fmt: skip
# of floats: true also where they cannot be compared
UNORDERED = {
    "ltu": "~({0} >= {1})", "leu": "~({0} > {1})", "gtu": "~({0} <= {1})", "geu": "~({0} < {1})", "neu": "{0} != {1}",
}  # fmt: skip
INTEGER, FLOAT = r"([su](?:16|32|64))", r"(f32|f64)"


@rule(r"(?:bra(?:\.uni)?|bar\.sync|ret|prefetch\.global\.L2)")
def goes_on(t: Translation, i: Instruction) -> None:
    """The machine's, or nothing to see."""


@rule(r"bar\.warp\.sync")
def warp_barrier(t: Translation, i: Instruction) -> None:
    t.lines.append(f"m.warp_barrier(t, {t.what(i)})")


@rule(r"(add|sub|mul)(?:\.lo|\.rn)?\." + r"([suf](?:16|32|64))")
def sums(t: Translation, i: Instruction, name: str, kind: str) -> None:
    sign = {"add": "+", "sub": "-", "mul": "*"}[name]
    t.assign(i.operands[0], f"{t.source(i.operands[1], kind)} {sign} {t.source(i.operands[2], kind)}", kind)


@rule(r"(and|or|xor)\.(pred|b16|b32|b64)")
def bitwise(t: Translation, i: Instruction, name: str, kind: str) -> None:
    kind = OWN[kind]
    sign = {"and": "&", "or": "|", "xor": "^"}[name]
    t.assign(i.operands[0], f"{t.source(i.operands[1], kind)} {sign} {t.source(i.operands[2], kind)}", kind)


@rule(r"not\.(pred|b16|b32|b64)")
def invert(t: Translation, i: Instruction, kind: str) -> None:
    t.assign(i.operands[0], f"~{t.source(i.operands[1], OWN[kind])}", OWN[kind])


@rule(r"(neg|abs)\.(s32|s64|f32|f64)")
def sign(t: Translation, i: Instruction, name: str, kind: str) -> None:
    value = t.source(i.operands[1], kind)
    t.assign(i.operands[0], f"-{value}" if name == "neg" else f"np.abs({value})", kind)


@rule(r"(min|max)\." + INTEGER)
def least(t: Translation, i: Instruction, name: str, kind: str) -> None:
    a, b = (t.source(each, kind) for each in i.operands[1:])
    t.assign(i.operands[0], f"np.{name}imum({a}, {b})", kind)


@rule(r"(shl|shr)\.([bsu])(16|32|64)")
def shift(t: Translation, i: Instruction, name: str, sign: str, size: str) -> None:
    kind = ("u" if sign == "b" and name == "shr" else "s" if sign == "b" else sign) + size
    value, by = t.source(i.operands[1], kind), i.operands[2]
    if by.isdigit() and int(by) < int(size):
        number = t.constant(VALUE_TYPES[kind](int(by)))
        t.assign(i.operands[0], f"{value} {'<<' if name == 'shl' else '>>'} {number}", kind)
    else:
        way = "left" if name == "shl" else "right"
        t.assign(i.operands[0], f"values.shift_{way}({value}, {t.source(by, 'u32')})", kind)


@rule(r"(mul|mad)\.wide\.([su])(16|32)")
def wide(t: Translation, i: Instruction, name: str, sign: str, size: str) -> None:
    kind, to = sign + size, sign + str(2 * int(size))
    a, b = (f"{t.source(each, kind)}.astype({t.constant_type(to)})" for each in i.operands[1:3])
    more = f" + {t.source(i.operands[3], to)}" if name == "mad" else ""
    t.assign(i.operands[0], f"{a} * {b}{more}", to)


@rule(r"mul\.hi\.([su])32")
def high_half(t: Translation, i: Instruction, sign: str) -> None:
    wide, narrow = t.constant_type(f"{sign}64"), t.constant_type(f"{sign}32")
    a, b = (f"{t.source(each, narrow)}.astype({wide})" for each in i.operands[1:])
    t.assign(i.operands[0], f"({a} * {b} >> {t.constant(VALUE_TYPES[wide](32))}).astype({narrow})", narrow)


@rule(r"mad\.lo\." + INTEGER)
def multiply_add(t: Translation, i: Instruction, kind: str) -> None:
    a, b, c = (t.source(each, kind) for each in i.operands[1:])
    t.assign(i.operands[0], f"{a} * {b} + {c}", kind)


@rule(r"fma\.rn\." + FLOAT)
def fma(t: Translation, i: Instruction, kind: str) -> None:
    a, b, c = (t.source(each, kind) for each in i.operands[1:])
    t.assign(i.operands[0], f"values.fma{kind[1:]}({a}, {b}, {c})", kind)


@rule(r"(div|rem)\." + INTEGER)
def division(t: Translation, i: Instruction, name: str, kind: str) -> None:
    a, b = (t.source(each, kind) for each in i.operands[1:])
    t.assign(i.operands[0], f"values.{'divide' if name == 'div' else 'remainder'}({a}, {b})", kind)


@rule(r"div\.rn\." + FLOAT)
def quotient(t: Translation, i: Instruction, kind: str) -> None:
    t.assign(i.operands[0], f"{t.source(i.operands[1], kind)} / {t.source(i.operands[2], kind)}", kind)


@rule(r"(rcp|sqrt)\.rn\." + FLOAT)
def rounded(t: Translation, i: Instruction, name: str, kind: str) -> None:
    value = t.source(i.operands[1], kind)
    t.assign(i.operands[0], f"np.sqrt({value})" if name == "sqrt" else f"{kind}(1) / {value}", kind)
    t.constant_type(kind)


@rule(r"(rcp|ex2)\.approx\.ftz\.f32")
def approximate(t: Translation, i: Instruction, name: str) -> None:
    function = {"rcp": "reciprocal", "ex2": "exp2"}[name]
    t.assign(i.operands[0], f"values.{function}({t.source(i.operands[1], 'f32')})", "f32")


@rule(r"setp\.(\w+)\.([bsuf](?:16|32|64))")
def compare(t: Translation, i: Instruction, how: str, kind: str) -> None:
    floating = kind.startswith("f")
    template = (COMPARE | (UNORDERED if floating else {})).get(how)
    if template is None:
        raise UnknownInstructionError(str(i))
    if floating and how == "ne":
        template = "({0} < {1}) | ({0} > {1})"
    a, b = (t.source(each, kind) for each in i.operands[1:])
    t.assign(i.operands[0], template.format(a, b), "pred")


@rule(r"selp\.([bsuf](?:16|32|64))")
def select(t: Translation, i: Instruction, kind: str) -> None:
    a, b = (t.source(each, kind) for each in i.operands[1:3])
    t.assign(i.operands[0], f"np.where({t.source(i.operands[3], 'pred')}, {a}, {b})", kind)


@rule(r"bfi\.b32")
def insert(t: Translation, i: Instruction) -> None:
    a, b = (t.source(each, "s32") for each in i.operands[1:3])
    t.assign(i.operands[0], f"values.insert_bits({a}, {b}, {int(i.operands[3])}, {int(i.operands[4])})", "s32")


@rule(r"prmt\.b32")
def permute(t: Translation, i: Instruction) -> None:
    a, b = (t.source(each, "s32") for each in i.operands[1:3])
    t.assign(i.operands[0], f"values.permute_bytes({a}, {b}, {int(i.operands[3])})", "s32")


@rule(r"cvta\.to\.global\.u64")
def generic(t: Translation, i: Instruction) -> None:
    t.assign(i.operands[0], t.source(i.operands[1], "s64"), "s64")


@rule(r"mov\.(pred|[bsuf](?:16|32|64))")
def move(t: Translation, i: Instruction, kind: str) -> None:
    to, value = i.operands
    if to.startswith("{"):
        for upper, register in enumerate(t.vector(to)):
            if register != "_":
                own = t.own(register)
                word = t.source(value, kind)
                t.assign(register, f"values.unpack({word}, {bool(upper)}, {t.constant_type(own)})", own)
    elif value.startswith("{"):
        own = t.own(to)
        low, high = (t.source(each, t.own(each)) for each in t.vector(value))
        t.assign(to, f"values.pack({low}, {high}, {t.constant_type(own)})", own)
    else:
        t.assign(to, t.source(value, t.own(to)), t.own(to))


@rule(r"cvt\.(?:rn\.)?(f32|bf16|f16|bf16x2)\.(f32|bf16|f16)")
def convert_short(t: Translation, i: Instruction, to: str, kind: str) -> None:
    if to == "bf16x2":
        a, b = (t.source(each, "f32") for each in i.operands[1:])
        t.assign(i.operands[0], f"values.pack_bfloat16({a}, {b})", "s32")
        return
    short = {"bf16": "bfloat16", "f16": "float16"}
    if (to in short) == (kind in short):
        raise UnknownInstructionError(str(i))
    if to == "f32":
        t.assign(i.operands[0], f"values.from_{short[kind]}({t.source(i.operands[1], 'u16')})", "f32")
    else:
        t.assign(i.operands[0], f"values.to_{short[to]}({t.source(i.operands[1], 'f32')})", "u16")


@rule(r"cvt\.(?:(rn|rni|rmi|rzi)\.)?([suf](?:16|32|64))\.([suf](?:16|32|64))")
def convert(t: Translation, i: Instruction, how: str | None, to: str, kind: str) -> None:
    value, name = t.source(i.operands[1], kind), t.constant_type(to)
    if (how, to) in (("rni", kind), ("rmi", kind)):
        t.assign(i.operands[0], f"np.{'rint' if how == 'rni' else 'floor'}({value})", kind)
    elif how == "rzi" and kind.startswith("f") and not to.startswith("f"):
        t.assign(i.operands[0], f"values.to_integer({value}, {name})", to)
    elif (
        (how == "rn" and to.startswith("f"))
        or (how is None and not (to + kind).count("f"))
        or (how, to, kind) == (None, "f64", "f32")
    ):
        t.assign(i.operands[0], f"{value}.astype({name})", to)
    else:
        raise UnknownInstructionError(str(i))


@rule(r"ld\.(param|global|shared)(?:\.nc)?(?:\.v([24]))?\.([bsuf](?:8|16|32|64))")
def load(t: Translation, i: Instruction, space: str, count: str | None, kind: str) -> None:
    to = t.vector(i.operands[0])
    base, offset = t.address(i.operands[1])
    args = f"{t.constant_type(kind)}, {int(count or 1)}"
    if space == "param" and base == t.kernel.parameter:
        call = f"m.parameter({offset}, {args})"
    elif space == "param":
        call = f"m.load_parameter({t.place(i.operands[1], 's64')}, {args})"
    elif space == "global":
        call = f"m.load_global({t.place(i.operands[1], 's64')}, {args}, t, {t.what(i)})"
    else:
        place = t.place(i.operands[1], t.own(base) if base.startswith("%") else "s32")
        call = f"m.load_shared({place}, {args}, t, {t.what(i)})"
    loaded = f"w{len(t.lines)}"
    t.lines.append(f"{loaded} = {call}")
    for k, register in enumerate(to):
        if register != "_":
            t.assign(register, f"{loaded}[{k}]", kind)


@rule(r"st\.(global|shared)(?:\.v([24]))?\.([bsuf](?:8|16|32|64))")
def store(t: Translation, i: Instruction, space: str, count: str | None, kind: str) -> None:
    values = ", ".join(t.source(each, kind) for each in t.vector(i.operands[1]))
    base, _ = t.address(i.operands[0])
    address = t.place(i.operands[0], "s64" if space == "global" or not base.startswith("%") else t.own(base))
    t.lines.append(f"m.store_{space}({address}, [{values}], t, {t.what(i)})")


@rule(r"cp\.async\.cg\.shared\.global")
def copy(t: Translation, i: Instruction) -> None:
    if i.operands[2] != "16":
        raise UnknownInstructionError(str(i))
    to, source = t.place(i.operands[0], "s32"), t.place(i.operands[1], "s64")
    t.lines.append(f"m.copy({to}, {source}, t, {t.what(i)})")


@rule(r"cp\.async\.wait_all")
def wait_for_copies(t: Translation, i: Instruction) -> None:
    t.lines.append("m.wait_for_copies(t)")


@rule(r"shfl\.sync\.(bfly|idx)\.b32")
def shuffle(t: Translation, i: Instruction, how: str) -> None:
    to, predicate = i.operands[0].split("|")
    if predicate in t.block.live_out or any(predicate in each.reads for each in t.block.instructions):
        raise UnknownInstructionError(f"a predicate that is read: {i}")
    value, source, clamp, mask = (t.source(each, "s32") for each in i.operands[1:])
    t.lines.append(f"m.whole_warps(t, {clamp}, {mask}, {t.what(i)})")
    if how == "bfly":
        t.assign(to, f"values.shuffle_xor({value}, t, m.uniform({source}))", "s32")
    else:
        t.assign(to, f"values.shuffle({value}, t, {source})", "s32")
    t.names[predicate] = t.constant(np.bool_(True))


@rule(r"ldmatrix\.sync\.aligned\.m8n8\.x4(\.trans)?\.shared\.b16")
def load_matrices(t: Translation, i: Instruction, transposed: str | None) -> None:
    t.lines.append(f"m.whole_warps(t, 31, -1, {t.what(i)})")
    loaded = f"w{len(t.lines)}"
    t.lines.append(f"{loaded} = m.load_matrices({t.place(i.operands[1], 's32')}, {bool(transposed)}, t, {t.what(i)})")
    for k, register in enumerate(t.vector(i.operands[0])):
        t.assign(register, f"{loaded}[{k}]", "s32")


@rule(r"movmatrix\.sync\.aligned\.m8n8\.trans\.b16")
def transpose(t: Translation, i: Instruction) -> None:
    t.lines.append(f"m.whole_warps(t, 31, -1, {t.what(i)})")
    t.assign(i.operands[0], f"values.transpose({t.source(i.operands[1], 's32')}, t)", "s32")


@rule(r"mma\.sync\.aligned\.m16n8k(?:16|8)\.row\.col\.f32\.(bf16|tf32)\.(?:bf16|tf32)\.f32")
def product(t: Translation, i: Instruction, kind: str) -> None:
    t.lines.append(f"m.whole_warps(t, 31, -1, {t.what(i)})")
    kinds = zip(i.operands[1:], ("s32", "s32", "f32"), strict=True)
    a, b, c = (", ".join(t.source(each, kind) for each in t.vector(vector)) for vector, kind in kinds)
    left, right = t.variable(f"values.left_{kind}(t, {a})"), t.variable(f"values.right_{kind}(t, {b})")
    out = f"w{len(t.lines)}"
    t.lines.append(f"{out} = values.multiply(t, {left}, {right}, {c})")
    for k, register in enumerate(t.vector(i.operands[0])):
        t.assign(register, f"{out}[{k}]", "f32")


def translate(kernel: Kernel, block: Block, numbers: dict[str, int], everyone: bool) -> Callable[..., object]:
    return Translation(kernel, block, numbers).function(everyone)
