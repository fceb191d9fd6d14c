"""A basic block of PTX -> a Python function of the threads that execute it, in numpy. What is unknown raises by name.

Registers are arrays with an element a thread, or one number where all threads have the same. The function takes its
inputs out of the register file, which never changes an array in place, and puts back what is live behind it.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import ptx_values
from ptx_text import Block, Instruction, Kernel, UnknownInstructionError
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
        if SPECIAL.fullmatch(operand):
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
        raise UnknownInstructionError(f"operand {operand}")

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
        raise UnknownInstructionError(f"a register of {have} read as {want}")

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
            raise UnknownInstructionError(f"guarded: {each}")
        for pattern, function in RULES:
            if matched := pattern.fullmatch(each.opcode):
                function(self, each, *matched.groups())
                return
        raise UnknownInstructionError(str(each))

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
