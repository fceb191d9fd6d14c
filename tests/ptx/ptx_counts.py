"""What a launch executes, counted; and what an H100 would make of it, by the constants of one chip.

Wavefronts of shared memory by NVIDIA's rule: 32 banks of 4 bytes, a wavefront has one word of each; accesses of 8 bytes
are made by half warps and those of 16 by quarters, two of which go together where the lanes of every pair have the same
address. Sectors of global memory have 32 bytes, and every request of a warp is counted by itself, caches or not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from ptx_text import Instruction, Kernel
from ptx_values import WARP, Array


@dataclass(frozen=True)
class Chip:
    """What a prediction is made of."""

    multiprocessors: int = 132
    schedulers: int = 4  # of a multiprocessor, each of which issues an instruction a cycle
    clock: float = 1.755e9  # Hz
    bandwidth: float = 3.35e12  # bytes/s

    def issue_time(self, instructions: float) -> float:
        return instructions / (self.multiprocessors * self.schedulers * self.clock)

    def shared_time(self, wavefronts: float) -> float:
        """One a cycle and multiprocessor."""
        return wavefronts / (self.multiprocessors * self.clock)

    def product_time(self, products: float) -> float:
        """At the peak, of which `mma.sync` reaches about 0.62: 16 × 8 × 16 of bfloat16, or × 8 of TF32, a cycle and
        multiprocessor."""
        return products / (self.multiprocessors * self.clock)

    def memory_time(self, size: float) -> float:
        return size / self.bandwidth


H100 = Chip()
SECTOR, BANKS = 32, 32
# What ptxas makes of one PTX instruction, where that is not one: nothing of what it folds into operands, addresses and
# constants; more of divisions, of roots, and of 64-bit integers.
FREE = ("mov.", "cvta.", "ld.param.", "neg.f", "abs.f", "cvt.u32.u64", "cvt.u64.u32", "cvt.s64.s32", "mov.pred")
EXPANDED = {
    "div.s32": 22, "div.u32": 16, "rem.s32": 22, "rem.u32": 16, "div.s64": 90, "rcp.rn.f32": 7, "sqrt.rn.f32": 9,
    "div.rn.f32": 10, "add.s64": 2, "sub.s64": 2, "mul.lo.s64": 4, "shl.b64": 2, "shr.s64": 2, "shr.u64": 2,
}  # fmt: skip


def machine_instructions(instruction: Instruction) -> int:
    """About how many of the GPU's own."""
    return 0 if instruction.opcode.startswith(FREE) else EXPANDED.get(instruction.opcode, 1)


def is_division(instruction: Instruction) -> bool:
    """Of integers, by what is not a constant: nvcc multiplies otherwise."""
    name, _, kind = instruction.opcode.partition(".")
    return name in ("div", "rem") and kind[0] in "su"


@dataclass
class Counts:
    """Of warps: an instruction counts once for all lanes that execute it together."""

    instructions: int = 0  # of PTX
    issued: int = 0  # of the machine's, about
    divisions: int = 0
    products: int = 0  # of tensor cores
    wavefronts: int = 0
    ideal_wavefronts: int = 0
    load_sectors: int = 0
    loaded_bytes: int = 0
    store_sectors: int = 0
    stored_bytes: int = 0

    @property
    def conflicts(self) -> float:
        """Wavefronts over the fewest that could move as many words."""
        return self.wavefronts / self.ideal_wavefronts if self.ideal_wavefronts else 1.0

    @property
    def loads_used(self) -> float:
        """What is loaded, of the sectors that are touched for it."""
        return self.loaded_bytes / (SECTOR * self.load_sectors) if self.load_sectors else 1.0

    @property
    def stores_used(self) -> float:
        return self.stored_bytes / (SECTOR * self.store_sectors) if self.store_sectors else 1.0


class Count:
    """An observer of the machine that counts."""

    def __init__(self) -> None:
        self.counts = Counts()
        self.of_blocks: dict[tuple[str, int], tuple[int, int, int, int]] = {}
        self.known: dict[tuple[object, ...], tuple[int, int]] = {}

    def block(self, kernel: Kernel, number: int, threads: Array) -> None:
        key = kernel.name, number
        if key not in self.of_blocks:
            block = kernel.blocks[number]
            self.of_blocks[key] = (
                len(block.instructions),
                sum(map(machine_instructions, block.instructions)),
                sum(map(is_division, block.instructions)),
                sum(each.opcode.startswith("mma.sync") for each in block.instructions),
            )
        warps = 1 + int(np.count_nonzero(np.diff(threads // WARP)))
        instructions, issued, divisions, products = self.of_blocks[key]
        self.counts.instructions += warps * instructions
        self.counts.issued += warps * issued
        self.counts.divisions += warps * divisions
        self.counts.products += warps * products

    def shared(self, address: Array, size: int, threads: Array, what: str) -> None:
        key, address = self.pattern(address, size, threads, 4)
        if key not in self.known:
            self.known[key] = wavefronts(address, size, threads, merge=not what.startswith("ldmatrix"))
        made, ideal = self.known[key]
        self.counts.wavefronts += made
        self.counts.ideal_wavefronts += ideal

    def globally(self, address: Array, size: int, threads: Array, what: str) -> None:
        key, address = self.pattern(address, size, threads, SECTOR)
        if key not in self.known:
            self.known[key] = sectors(address, size, threads)
        touched, used = self.known[key]
        if what.startswith(("ld", "cp")):
            self.counts.load_sectors += touched
            self.counts.loaded_bytes += used
        else:
            self.counts.store_sectors += touched
            self.counts.stored_bytes += used

    @staticmethod
    def pattern(address: Array, size: int, threads: Array, step: int) -> tuple[tuple[object, ...], Array]:
        """What the count depends on: it is the same some `step`s further on, for other warps, too."""
        address = np.broadcast_to(address, threads.shape).astype(np.int64)
        relative = address - address[0] // step * step
        return (step, size, relative.tobytes(), (threads - threads[0] // WARP * WARP).tobytes()), relative


def distinct(*columns: Array) -> Array:
    """Rows that differ."""
    return np.unique(np.stack(columns, 1).reshape(-1, len(columns)), axis=0)


def wavefronts(address: Array, size: int, threads: Array, merge: bool = True) -> tuple[int, int]:
    """Those of a rule, and the fewest that could move the words."""
    count = max(1, size // 4)
    words = (address // 4)[:, None] + np.arange(count)
    warps = np.broadcast_to((threads // WARP)[:, None], words.shape)
    ideal = int(np.sum(-(-np.bincount(distinct(warps.ravel(), words.ravel())[:, 0]) // BANKS)))
    groups = threads // (WARP // count)
    if merge and count > 1:
        groups = merged(address, threads, groups, count)
    pairs = distinct(np.repeat(groups, count), words.ravel())
    banks = np.zeros((int(groups.max()) + 1, BANKS), np.int64)
    np.add.at(banks, (pairs[:, 0], pairs[:, 1] % BANKS), 1)
    return int(banks.max(1).sum()), ideal


def merged(address: Array, threads: Array, groups: Array, count: int) -> Array:
    """Pairs of groups as one, in warps where lanes i and i ^ 1 throughout, or i and i ^ 2, have the same address."""
    groups = groups.copy()
    for warp in np.unique(threads // WARP):
        mine = threads // WARP == warp
        of = dict(zip((threads[mine] % WARP).tolist(), address[mine].tolist(), strict=True))
        if any(all(of.get(lane ^ bit, place) == place for lane, place in of.items()) for bit in (1, 2)):
            groups[mine] = groups[mine] // 2 * 2
    return groups


def sectors(address: Array, size: int, threads: Array) -> tuple[int, int]:
    """Sectors that warps touch, and bytes that they use."""
    warps = threads // WARP
    return len(distinct(warps, address // SECTOR)), size * len(distinct(warps, address))
