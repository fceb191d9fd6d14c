"""PTX as text -> kernels: instructions in basic blocks, which registers are live between these, and what is a loop."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property

ENTRY = re.compile(
    r"\.visible \.entry (?P<name>\w+)\(\s*(?P<parameters>.*?)\)(?P<limits>[^{]*)\{(?P<body>.*?)^\}", re.S | re.M
)
PARAMETER = re.compile(r"\.param \.align \d+ \.b8 (?P<name>\w+)\[(?P<size>\d+)\]")
REGISTERS = re.compile(r"\.reg \.(?P<type>\w+)\s+(?P<prefix>%\w+)<\d+>")
STATEMENT = re.compile(r"(?:@(?P<negated>!?)(?P<guard>%\w+)\s+)?(?P<opcode>[a-z][\w.:]*)\s*(?P<operands>.*)", re.S)
LABEL = re.compile(r"\s*(\$\w+):")
REGISTER = re.compile(r"(?<![\w.])%[a-z]+\d+\b")
# these end a basic block
ENDS = ("bra", "bar.sync", "ret")


class UnknownInstructionError(Exception):
    """PTX that the interpreter does not know, by name."""


@dataclass(frozen=True)
class Instruction:
    opcode: str
    operands: tuple[str, ...]  # braces of vectors kept
    guard: str | None = None
    negated: bool = False

    def __str__(self) -> str:
        return f"{self.opcode} {', '.join(self.operands)}"

    @property
    def writes(self) -> list[str]:
        """Its destinations: the first operand, of what has one."""
        name = self.opcode.partition(".")[0]
        if name in ("st", "cp", "bra", "bar", "ret", "prefetch"):
            return []
        return REGISTER.findall(self.operands[0])

    @property
    def reads(self) -> list[str]:
        sources = self.operands if not self.writes else self.operands[1:]
        found = [register for operand in sources for register in REGISTER.findall(operand)]
        return found + ([self.guard] if self.guard else [])


@dataclass
class Block:
    """Straight-line code. Where it goes: `target`, if the guard of its last instruction holds, and `following`."""

    instructions: list[Instruction]
    target: int | None = None
    following: int | None = None
    live_in: frozenset[str] = frozenset()
    live_out: frozenset[str] = frozenset()
    in_loop: bool = False

    @property
    def end(self) -> Instruction | None:
        last = self.instructions[-1]
        return last if last.opcode.removesuffix(".uni") in ENDS else None

    @property
    def successors(self) -> list[int]:
        return [k for k in (self.target, self.following) if k is not None]


@dataclass
class Kernel:
    name: str  # mangled
    parameter: str
    parameter_bytes: int
    types: dict[str, str]  # of a register's prefix, as .reg has them
    blocks: list[Block] = field(default_factory=list)

    @cached_property
    def instructions(self) -> list[Instruction]:
        return [each for block in self.blocks for each in block.instructions]

    @cached_property
    def granule(self) -> int:
        """Bytes of the smallest access to shared memory, at the most 4."""
        shared = [each.opcode for each in self.instructions if each.opcode.startswith(("ld.shared", "st.shared"))]
        return min([4, *(int(opcode[-2:].lstrip("bsuf")) // 8 for opcode in shared)])

    def type_of(self, register: str) -> str:
        return self.types[register.rstrip("0123456789")]


def operands_of(text: str) -> tuple[str, ...]:
    """Split at the commas outside braces."""
    return tuple(part.strip() for part in re.split(r",(?![^{]*\})", text)) if text.strip() else ()


def statements(body: str) -> list[Instruction | str]:
    """Instructions and, as strings, labels."""
    found: list[Instruction | str] = []
    for text in re.sub(r"//[^\n]*", "", body).split(";"):
        text = text.strip().lstrip("{} \t\n")  # inline assembly has a scope of its own
        while label := LABEL.match(text):
            found.append(label[1])
            text = text[label.end() :].strip().lstrip("{} \t\n")
        if not text or text.startswith((".reg", ".pragma")):
            continue
        matched = STATEMENT.fullmatch(text)
        if matched is None:
            raise UnknownInstructionError(text)
        found.append(
            Instruction(matched["opcode"], operands_of(matched["operands"]), matched["guard"], bool(matched["negated"]))
        )
    return found


def blocks_of(code: list[Instruction | str]) -> list[Block]:
    blocks: list[Block] = []
    labels: dict[str, int] = {}
    current: list[Instruction] = []

    def close() -> None:
        nonlocal current
        if current:
            blocks.append(Block(current))
            current = []

    for each in code:
        if isinstance(each, str):
            close()
            labels[each] = len(blocks)
            continue
        current.append(each)
        if each.opcode.removesuffix(".uni") in ENDS:
            close()
    close()
    for number, block in enumerate(blocks):
        end = block.end
        if end is not None and end.opcode.startswith("bra"):
            block.target = labels[end.operands[0]]
        goes_on = end is None or end.opcode == "bar.sync" or end.guard is not None
        block.following = number + 1 if goes_on else None
    return blocks


def find_live(blocks: list[Block]) -> None:
    needed, given = [], []
    for block in blocks:
        reads: set[str] = set()
        writes: set[str] = set()
        for each in block.instructions:
            reads.update(set(each.reads) - writes)
            # one that a guard may skip leaves what was there
            (reads if each.guard else writes).update(each.writes)
        needed.append(reads)
        given.append(writes)
    changed = True
    while changed:
        changed = False
        for k in reversed(range(len(blocks))):
            out = frozenset().union(*(blocks[n].live_in for n in blocks[k].successors))
            into = frozenset(needed[k] | (out - given[k]))
            if (into, out) != (blocks[k].live_in, blocks[k].live_out):
                blocks[k].live_in, blocks[k].live_out = into, out
                changed = True


def find_loops(blocks: list[Block]) -> None:
    """A block is in a loop where it can be reached from itself: strongly connected components, by Tarjan."""
    order: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    for root in range(len(blocks)):
        if root in order:
            continue
        work = [(root, iter(blocks[root].successors))]
        order[root] = low[root] = len(order)
        stack.append(root)
        while work:
            node, successors = work[-1]
            for after in successors:
                if after not in order:
                    order[after] = low[after] = len(order)
                    stack.append(after)
                    work.append((after, iter(blocks[after].successors)))
                    break
                if after in stack:
                    low[node] = min(low[node], order[after])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == order[node]:
                    component = stack[stack.index(node) :]
                    del stack[stack.index(node) :]
                    around = len(component) > 1 or node in blocks[node].successors
                    for each in component:
                        blocks[each].in_loop = around


def kernel_of(text: str) -> Kernel:
    """One entry of a file of PTX."""
    entry = ENTRY.fullmatch(text)
    parameter = PARAMETER.fullmatch(entry["parameters"].strip()) if entry else None
    if entry is None or parameter is None:
        raise UnknownInstructionError("expected one entry, with one struct as its parameters")
    types = {each["prefix"]: each["type"] for each in REGISTERS.finditer(entry["body"])}
    blocks = blocks_of(statements(entry["body"]))
    find_live(blocks)
    find_loops(blocks)
    return Kernel(entry["name"], parameter["name"], int(parameter["size"]), types, blocks)
