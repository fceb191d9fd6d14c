"""Runs kernels: all threads of one block or of many at once, those with the lowest program counter first.

Threads that a branch has parted meet again where their counters do, at the beginning of a basic block. Blocks know
nothing of each other, so that many of them are as good as one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from ptx_memory import Global, Shared
from ptx_rules import translate
from ptx_text import Block, Kernel
from ptx_values import VALUE_TYPES, WARP, Array, KernelError

PARAMETERS = 1 << 60  # their address
AT_ONCE = 4096  # threads


class Observer(Protocol):
    """Who is told what is executed."""

    def block(self, kernel: Kernel, number: int, threads: Array) -> None: ...
    def shared(self, address: Array, size: int, threads: Array, what: str) -> None: ...
    def globally(self, address: Array, size: int, threads: Array, what: str) -> None: ...


class Program:
    """A kernel, and its blocks as functions, made when they are first executed."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        registers = {name for each in kernel.instructions for name in (*each.reads, *each.writes)}
        self.numbers = {name: k for k, name in enumerate(sorted(registers))}
        self.functions: dict[tuple[int, bool], Callable[..., object]] = {}

    def function(self, number: int, everyone: bool) -> Callable[..., object]:
        if (number, everyone) not in self.functions:
            block = self.kernel.blocks[number]
            self.functions[number, everyone] = translate(self.kernel, block, self.numbers, everyone)
        return self.functions[number, everyone]

    def registers(self) -> list[Array]:
        """Nobody has written them: a number that is none, and an address that is nobody's."""
        kinds = [VALUE_TYPES[self.kernel.type_of(name)] for name in self.numbers]
        return [np.bool_(False) if k is np.bool_ else k(np.nan if np.dtype(k).kind == "f" else 0x5A5A) for k in kinds]


class Machine:
    """Some blocks of one launch."""

    def __init__(
        self, program: Program, parameters: bytes, indices: Sequence[tuple[int, int, int]], grid: Sequence[int],
        size: int, shared: int, memory: Global, observer: Observer | None, first: int = 0,
    ) -> None:  # fmt: skip
        if size % WARP:
            raise KernelError(f"{size} threads are not whole warps")
        if len(parameters) != program.kernel.parameter_bytes:
            raise KernelError(f"parameters of {len(parameters)} bytes, expected {program.kernel.parameter_bytes}")
        self.program, self.size, self.parameters, self.memory = program, size, parameters, memory
        self.observer, self.first = observer, first
        self.all = np.arange(size * len(indices))
        number = self.all // size
        self.special = {"tid.x": (self.all % size).astype(np.int32), "tid.y": np.int32(0), "tid.z": np.int32(0)}
        for axis, name in enumerate("xyz"):
            places = np.array([index[axis] for index in indices], np.int32)
            self.special[f"ctaid.{name}"] = places[0] if np.all(places == places[0]) else places[number]
            self.special[f"nctaid.{name}"] = np.int32(grid[axis])
            self.special[f"ntid.{name}"] = np.int32(size if name == "x" else 1)
        self.shared = Shared(len(indices), shared, number * (-(-shared // 16) * 16), program.kernel.granule)
        self.parameter_address = np.int64(PARAMETERS)
        self.copies: list[tuple[Array, list[Array], Array, str]] = []

    # What the translated blocks call

    def of(self, name: str, threads: Array) -> Array:
        value = self.special[name]
        return value if threads is self.all or not value.ndim else value[threads]

    def put(self, old: Array, threads: Array, new: Array) -> Array:
        out = old.copy() if old.ndim else np.full(len(self.all), old)
        out[threads] = new
        return out

    def parameter(self, offset: int, dtype: type, count: int) -> list[Array]:
        return list(np.frombuffer(self.parameters, dtype, count, offset))

    def load_parameter(self, address: Array, dtype: type, count: int) -> list[Array]:
        offset, size = address - PARAMETERS, np.dtype(dtype).itemsize
        if np.any(offset < 0) or np.any(offset + size * count > len(self.parameters)) or np.any(offset % size):
            raise KernelError("outside of the parameters")
        if np.ndim(offset) == 0:
            return self.parameter(int(offset), dtype, count)
        whole = np.frombuffer(self.parameters[: len(self.parameters) // size * size], dtype)
        return [whole[offset // size + k] for k in range(count)]

    def load_global(self, address: Array, dtype: type, count: int, threads: Array, what: str) -> list[Array]:
        if self.observer:
            self.observer.globally(address, np.dtype(dtype).itemsize * count, threads, what)
        return self.memory.load(address, dtype, count, threads, what)

    def store_global(self, address: Array, values: list[Array], threads: Array, what: str) -> None:
        if self.observer:
            self.observer.globally(address, values[0].dtype.itemsize * len(values), threads, what)
        if not np.ndim(address) and len(threads) > 1:
            raise KernelError(f"several threads store in the same place: {what}")
        self.memory.store(address, values, threads, what)

    def load_shared(self, address: Array, dtype: type, count: int, threads: Array, what: str) -> list[Array]:
        if self.observer:
            self.observer.shared(address, np.dtype(dtype).itemsize * count, threads, what)
        return self.shared.load(address, dtype, count, threads, what)

    def store_shared(self, address: Array, values: list[Array], threads: Array, what: str) -> None:
        if self.observer:
            self.observer.shared(address, values[0].dtype.itemsize * len(values), threads, what)
        self.shared.store(address, values, threads, what)

    def load_matrices(self, address: Array, transposed: bool, threads: Array, what: str) -> list[Array]:
        if self.observer:
            self.observer.shared(address, 16, threads, what)
        return self.shared.load_matrices(address, transposed, threads, what)

    def copy(self, to: Array, source: Array, threads: Array, what: str) -> None:
        """16 bytes on their way to shared memory: nothing is there until the threads wait."""
        values = self.load_global(np.broadcast_to(source, threads.shape), np.int32, 4, threads, what)
        to = np.broadcast_to(to, threads.shape)
        if self.observer:
            self.observer.shared(to, 16, threads, what)
        self.shared.expect(to, 16, threads, what)
        self.copies.append((to, values, threads, what))

    def wait_for_copies(self, threads: Array) -> None:
        copies, self.copies = self.copies, []
        for to, values, of, what in copies:
            now = np.isin(of, threads)
            if now.any():
                self.shared.store(to[now], [value[now] for value in values], of[now], what)
            if not now.all():
                self.copies.append((to[~now], [value[~now] for value in values], of[~now], what))

    def whole_warps(self, threads: Array, clamp: int | Array, mask: int | Array, what: str) -> None:
        if np.any(np.not_equal(clamp, WARP - 1)) or np.any(np.not_equal(mask, -1)):  # constants may be in registers
            raise KernelError(f"of a part of a warp: {what}")
        if threads is self.all:
            return
        warps = threads.reshape(-1, WARP) if len(threads) % WARP == 0 else None
        if warps is None or np.any(warps[:, 0] % WARP) or np.any(warps[:, -1] - warps[:, 0] != WARP - 1):
            raise KernelError(f"lanes that do not take part: {what}")

    def warp_barrier(self, threads: Array, what: str) -> None:
        self.whole_warps(threads, WARP - 1, -1, what)
        self.shared.races.warp_barrier(threads)

    @staticmethod
    def uniform(value: Array) -> int:
        first = np.ravel(value)[0]
        if np.any(np.not_equal(value, first)):
            raise KernelError("a shuffle by a distance that threads do not agree on")
        return int(first)

    # Who is where

    def run(self) -> None:
        registers, blocks = self.program.registers(), self.program.kernel.blocks
        ready, waiting = {0: self.all}, {}
        while ready or waiting:
            if not ready:
                self.barrier(waiting)
                ready, waiting = waiting, {}
            number = min(ready)
            threads = ready.pop(number)
            everyone = len(threads) == len(self.all)
            threads = self.all if everyone else threads
            if self.observer:
                self.observer.block(self.program.kernel, number, threads)
            jumps = self.program.function(number, everyone)(registers, self, threads)
            block = blocks[number]
            if block.end is not None and block.end.opcode == "bar.sync":
                self.meet(waiting, block.following, threads)
            elif block.target is None or block.end is None or block.end.guard is None:
                self.meet(ready, self.unconditional(block), threads)
            elif not np.ndim(jumps):
                self.meet(ready, block.target if jumps else block.following, threads)
            else:
                self.meet(ready, block.target, threads[jumps])
                self.meet(ready, block.following, threads[~jumps])
        if self.copies:
            raise KernelError(f"a copy that its thread does not wait for: {self.copies[0][3]}")
        self.ordered()

    def ordered(self) -> None:
        self.shared.races.block_barrier()
        self.memory.races.barrier(self.size, self.first)

    @staticmethod
    def unconditional(block: Block) -> int | None:
        return block.following if block.target is None else block.target

    @staticmethod
    def meet(groups: dict[int, Array], number: int | None, threads: Array) -> None:
        if number is None or not len(threads):
            return
        if number in groups:
            threads = np.sort(np.concatenate([groups[number], threads]))
        groups[number] = threads

    def barrier(self, waiting: dict[int, Array]) -> None:
        """Nobody else can run: every block's threads wait in one place, all of them."""
        for threads in waiting.values():
            count = np.bincount(threads // self.size, minlength=len(self.all) // self.size)
            if np.any((count != 0) & (count != self.size)):
                raise KernelError("a barrier that not every thread reaches")
        self.ordered()


def run(
    program: Program, parameters: bytes, grid: Sequence[int], size: int, shared: int, memory: Global,
    observer: Observer | None = None, chosen: Sequence[int] | None = None,
) -> None:  # fmt: skip
    """A launch, or the `chosen` of its blocks, counted with x fastest."""
    x, y, z = grid
    numbers = range(x * y * z) if chosen is None else chosen
    indices = [(k % x, k // x % y, k // (x * y)) for k in numbers]
    step = max(1, AT_ONCE // size)
    with np.errstate(all="ignore"):
        for first in range(0, len(indices), step):
            some = indices[first : first + step]
            Machine(program, parameters, some, grid, size, shared, memory, observer, first).run()
    memory.races.end()
