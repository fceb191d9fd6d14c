"""A basic block of PTX -> a Python function of the threads that execute it, in numpy. What is unknown raises by name.

Registers are arrays with an element a thread, or one number where all threads have the same. The function takes its
inputs out of the register file, which never changes an array in place, and puts back what is live behind it.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import ptx_values
from ptx_text import Block, Instruction, Kernel, UnknownInstruction
from ptx_values import VALUE_TYPES

OWN = {
    "pred": "pred",
    "b16": "u16",
    "b32": "s32",
    "b64": "s64",
    "f32": "f32",
    "f64": "f64",
}  # what registers are kept as
SPECIAL = re.compile(r"%(tid|ctaid|ntid|nctaid)\.([xyz])")
COMPARE = {
    "eq": "{0} == {1}", "ne": "{0} != {1}", "lt": "{0} < {1}", "le": "{0} <= {1}", "gt": "{0} > {1}", "ge": "{0} >= {1}",
}  # fmt: skip
# of floats: true also where they cannot be compared
UNORDERED = {
    "ltu": "~({0} >= {1})", "leu": "~({0} > {1})", "gtu": "~({0} <= {1})", "geu": "~({0} < {1})", "neu": "{0} != {1}",
}  # fmt: skip
RULES: list[tuple[re.Pattern[str], Callable[..., None]]] = []


def rule(pattern: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Of the opcodes that match it as a whole; its groups are given to the function."""

    def add(function: Callable[..., None]) -> Callable[..., None]:
        RULES.append((re.compile(pattern), function))
        return function

    return add


def bits_of(kind: str) -> int:
    return 8 * np.dtype(VALUE_TYPES[kind]).itemsize


class Translation:
    """One block's source text while it is written: a variable for every value, and constants by name."""

    def __init__(self, kernel: Kernel, block: Block, numbers: dict[str, int]) -> None:
        self.kernel, self.block, self.numbers = kernel, block, numbers
        self.lines: list[str] = []
        self.names: dict[str, str] = {}  # of registers now
        self.known: dict[str, str] = {}  # expressions that have a variable
        self.constants: dict[str, object] = {"np": np, "values": ptx_values}
        self.inputs: list[str] = []

    def variable(self, expression: str) -> str:
        """One for a pure expression: the same where it has been asked for before."""
        if expression not in self.known:
            self.known[expression] = self.fresh()
            self.lines.append(f"{self.known[expression]} = {expression}")
        return self.known[expression]

    def fresh(self) -> str:
        return f"v{len(self.lines)}_{len(self.names)}"

    def constant(self, value: object) -> str:
        name = f"k{len(self.constants)}"
        self.constants[name] = value
        return name

    def own(self, register: str) -> str:
        return OWN[self.kernel.type_of(register)]

    def source(self, operand: str, kind: str) -> str:
        """An operand as a number of that type."""
        if operand.startswith("%") and not SPECIAL.fullmatch(operand):
            return self.register(operand, kind)
        if special := SPECIAL.fullmatch(operand):
            return self.cast(self.variable(f"m.of({operand[1:]!r}, t)"), "s32", kind)
        dtype = VALUE_TYPES[kind]
        if operand.startswith(("0f", "0d")):
            of = np.uint32 if operand[1] == "f" else np.uint64
            return self.constant(of(int(operand[2:], 16)).view(np.float32 if operand[1] == "f" else np.float64))
        if re.fullmatch(r"-?\d+|-?0x[0-9a-fA-F]+", operand):
            number = int(operand, 0)
            if kind == "pred":
                return self.constant(np.bool_(number))
            size = bits_of(kind)
            return self.constant(np.array(number % 2**size, f"u{size // 8}").view(dtype)[()])
        if operand == self.kernel.parameter:
            return self.cast("m.parameter_address", "s64", kind)
        if operand.endswith("6memoryE"):  # the shared memory that api.h's kernels declare, from address 0 on
            return self.constant(dtype(0))
        raise UnknownInstruction(f"operand {operand}")

    def register(self, register: str, kind: str) -> str:
        own = self.own(register)
        if register not in self.names:
            self.names[register] = f"r{len(self.inputs)}"
            self.inputs.append(register)
        return self.cast(self.names[register], own, kind)

    def cast(self, value: str, have: str, want: str) -> str:
        if have == want or VALUE_TYPES[have] is VALUE_TYPES[want]:
            return value
        name = self.constant_type(want)
        if bits_of(have) == bits_of(want):
            return self.variable(f"{value}.view({name})")
        if bits_of(have) > bits_of(want):  # the lower part of a wider register
            return self.variable(f"{value}.astype({name})")
        raise UnknownInstruction(f"a register of {have} read as {want}")

    def constant_type(self, kind: str) -> str:
        self.constants[kind] = VALUE_TYPES[kind]
        return kind

    def assign(self, register: str, expression: str, kind: str) -> None:
        """Set a register to an expression of that type."""
        own = self.own(register)
        if VALUE_TYPES[own] is not VALUE_TYPES[kind]:
            how = "view" if bits_of(own) == bits_of(kind) else "astype"
            expression = f"({expression}).{how}({self.constant_type(own)})"
        name = f"v{len(self.lines)}"
        self.lines.append(f"{name} = {expression}")
        self.names[register] = name

    def vector(self, operand: str) -> list[str]:
        return [each.strip() for each in operand.strip("{}").split(",")]

    def address(self, operand: str) -> tuple[str, int]:
        base, _, offset = operand.strip("[]").partition("+")
        return base, int(offset or 0)

    def place(self, operand: str, kind: str) -> str:
        base, offset = self.address(operand)
        name = self.source(base, kind)
        return self.variable(f"{name} + {self.constant(VALUE_TYPES[kind](offset))}") if offset else name

    def what(self, instruction: Instruction) -> str:
        return self.constant(str(instruction))

    def instruction(self, each: Instruction) -> None:
        if each.guard and not each.opcode.startswith("bra"):
            raise UnknownInstruction(f"guarded: {each}")
        for pattern, function in RULES:
            if matched := pattern.fullmatch(each.opcode):
                function(self, each, *matched.groups())
                return
        raise UnknownInstruction(str(each))

    def function(self, everyone: bool) -> Callable[..., object]:
        """run(registers, machine, threads) -> who jumps. `everyone`: all threads there are."""
        for each in self.block.instructions:
            self.instruction(each)
        end = self.block.end
        jump = "None"
        if end is not None and end.guard:
            guard = self.register(end.guard, "pred")
            jump = f"~{guard}" if end.negated else guard
        taken = []
        for k, register in enumerate(self.inputs):
            taken.append(f"r{k} = R[{self.numbers[register]}]")
            if not everyone:
                taken.append(f"if r{k}.ndim: r{k} = r{k}[t]")
        kept = []
        written = {register for each in self.block.instructions for register in each.writes}
        for register in sorted(written & self.block.live_out):
            number, name = self.numbers[register], self.names[register]
            kept.append(f"R[{number}] = {name}" if everyone else f"R[{number}] = m.put(R[{number}], t, {name})")
        text = "\n    ".join(["def run(R, m, t):", *taken, *self.lines, *kept, f"return {jump}"])
        space = dict(self.constants)
        exec(compile(text, f"<{self.kernel.name}>", "exec"), space)
        return space["run"]  # type: ignore[return-value]


def translate(kernel: Kernel, block: Block, numbers: dict[str, int], everyone: bool) -> Callable[..., object]:
    return Translation(kernel, block, numbers).function(everyone)


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
        raise UnknownInstruction(str(i))
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
        raise UnknownInstruction(str(i))
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
    elif (how == "rn" and to.startswith("f")) or (how is None and not (to + kind).count("f")) or (how, to, kind) == (None, "f64", "f32"):
        t.assign(i.operands[0], f"{value}.astype({name})", to)
    else:
        raise UnknownInstruction(str(i))


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
        call = f"m.load_shared({t.place(i.operands[1], t.own(base) if base.startswith('%') else 's32')}, {args}, t, {t.what(i)})"
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


@rule(r"shfl\.sync\.(bfly|idx)\.b32")
def shuffle(t: Translation, i: Instruction, how: str) -> None:
    to, predicate = i.operands[0].split("|")
    if predicate in t.block.live_out or any(predicate in each.reads for each in t.block.instructions):
        raise UnknownInstruction(f"a predicate that is read: {i}")
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


@rule(r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.bf16\.bf16\.f32")
def product(t: Translation, i: Instruction) -> None:
    t.lines.append(f"m.whole_warps(t, 31, -1, {t.what(i)})")
    a, b, c = (
        ", ".join(t.source(each, k) for each in t.vector(v)) for v, k in zip(i.operands[1:], ("s32", "s32", "f32"))
    )
    left, right = t.variable(f"values.left_factor(t, {a})"), t.variable(f"values.right_factor(t, {b})")
    out = f"w{len(t.lines)}"
    t.lines.append(f"{out} = values.multiply(t, {left}, {right}, {c})")
    for k, register in enumerate(t.vector(i.operands[0])):
        t.assign(register, f"{out}[{k}]", "f32")
