"""Memory as a kernel sees it, every access checked: tensors of the host, and shared memory."""

from __future__ import annotations

import bisect
import ctypes

import numpy as np
from ptx_races import GlobalRaces, Races
from ptx_values import Array, KernelError


class Global:
    """The bytes of the tensors that were handed out, at their addresses on the host; all else is out of bounds."""

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.ends: list[int] = []
        self.views: list[dict[type, Array]] = []
        self.races = GlobalRaces()

    def add(self, start: int, end: int) -> None:
        """Tensors may overlap: what they cover together is one range."""
        if end <= start:
            return
        first, last = bisect.bisect_left(self.ends, start), bisect.bisect_right(self.starts, end)
        if first < last:
            start, end = min(start, self.starts[first]), max(end, self.ends[last - 1])
        self.starts[first:last], self.ends[first:last], self.views[first:last] = [start], [end], [{}]

    @property
    def size(self) -> int:
        return sum(self.ends) - sum(self.starts)

    def view(self, number: int, dtype: type) -> tuple[Array, int]:
        """A range as elements, and the address of the first: at or up to 15 bytes before its start."""
        origin = self.starts[number] & ~15
        views = self.views[number]
        if dtype not in views:
            count = (self.ends[number] - origin) // np.dtype(dtype).itemsize
            raw = (ctypes.c_uint8 * (count * np.dtype(dtype).itemsize)).from_address(origin)
            views[dtype] = np.frombuffer(raw, dtype)
        return views[dtype], origin

    def places(self, address: Array, dtype: type, count: int, what: str) -> list[tuple[Array, Array, Array | slice]]:
        """(elements, index of the first of `count`, which of the addresses) for every range that is accessed."""
        size = np.dtype(dtype).itemsize
        if np.any(address & (size * count - 1)):
            raise KernelError(f"misaligned: {what}")
        low, high = int(np.min(address)), int(np.max(address)) + size * count
        number = bisect.bisect_right(self.starts, low) - 1
        if number >= 0 and high <= self.ends[number]:
            elements, origin = self.view(number, dtype)
            return [(elements, (address - origin) >> (size.bit_length() - 1), slice(None))]
        if np.ndim(address) == 0 or not self.starts:
            raise KernelError(f"outside of every tensor: {what}")
        numbers = np.searchsorted(self.starts, address, side="right") - 1
        if numbers.min() < 0 or np.any(address + size * count > np.asarray(self.ends)[numbers]):
            raise KernelError(f"outside of every tensor: {what}")
        found = []
        for number in np.unique(numbers):
            which = numbers == number
            elements, origin = self.view(int(number), dtype)
            found.append((elements, (address[which] - origin) >> (size.bit_length() - 1), which))
        return found

    def load(self, address: Array, dtype: type, count: int, threads: Array, what: str) -> list[Array]:
        places = self.places(address, dtype, count, what)
        self.races.add(address, np.dtype(dtype).itemsize * count, threads, False, what)
        if len(places) == 1:
            ((elements, at, _),) = places
            return [elements.take(at + k) for k in range(count)]
        out = [np.empty(address.shape, dtype) for _ in range(count)]
        for elements, at, which in places:
            for k, each in enumerate(out):
                each[which] = elements.take(at + k)
        return out

    def store(self, address: Array, values: list[Array], threads: Array, what: str) -> None:
        places = self.places(address, values[0].dtype.type, len(values), what)
        self.races.add(address, values[0].dtype.itemsize * len(values), threads, True, what)
        for elements, at, which in places:
            for k, value in enumerate(values):
                elements[at + k] = value[which] if value.ndim else value


WRITTEN = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class Shared:
    """Of several blocks, one behind the other; `offset` has the beginning of every thread's."""

    def __init__(self, blocks: int, size: int, offset: Array, granule: int) -> None:
        self.size, self.offset = size, offset
        self.pitch = -(-size // 16) * 16
        self.granule = granule
        self.bytes = np.full(max(16, blocks * self.pitch), 0xFF, np.uint8)
        self.written = np.zeros(len(self.bytes) // 2, np.uint8)
        self.races = Races(len(self.bytes) // granule, granule.bit_length() - 1)

    def place(self, address: Array, size: int, threads: Array, what: str) -> Array:
        address = np.broadcast_to(address, threads.shape)
        if np.any(address & (size - 1)):
            raise KernelError(f"misaligned: {what}")
        if address.min() < 0 or address.max() + size > self.size:
            raise KernelError(f"outside of shared memory: {what}")
        return address + self.offset[threads]

    def load(self, address: Array, dtype: type, count: int, threads: Array, what: str) -> list[Array]:
        size = np.dtype(dtype).itemsize
        place = self.place(address, size * count, threads, what)
        flags = self.written.view(WRITTEN[size * count // 2])
        if np.any(
            flags.take(place // (size * count)) != flags.dtype.type(0x0101010101010101 & ((1 << 4 * size * count) - 1))
        ):
            raise KernelError(f"shared memory that nobody has written: {what}")
        self.races.add(place, size * count, threads, False, what)
        elements, at = self.bytes.view(dtype), place // size
        return [elements.take(at + k) for k in range(count)]

    def store(self, address: Array, values: list[Array], threads: Array, what: str) -> None:
        size, count = values[0].dtype.itemsize, len(values)
        place = self.place(address, size * count, threads, what)
        flags = self.written.view(WRITTEN[size * count // 2])
        flags[place // (size * count)] = flags.dtype.type(0x0101010101010101 & ((1 << 4 * size * count) - 1))
        self.races.add(place, size * count, threads, True, what)
        elements, at = self.bytes.view(values[0].dtype), place // size
        for k, value in enumerate(values):
            elements[at + k] = value

    def expect(self, address: Array, size: int, threads: Array, what: str) -> None:
        """Something is on its way there: nobody may touch it any more, and it cannot be read yet."""
        place = self.place(address, size, threads, what)
        self.written.view(WRITTEN[size // 2])[place // size] = 0
        self.races.add(place, size, threads, True, what)

    def load_matrices(self, address: Array, transposed: bool, threads: Array, what: str) -> list[Array]:
        """ldmatrix: lane 8m + r names row r, of 16 bytes, of matrix m; a register for each of the four."""
        words = self.load(address, np.int32, 4, threads, what)
        rows = np.stack(words, 1).reshape(-1, 4, 8, 4)  # warp, matrix, row, word
        if transposed:
            halves = np.ascontiguousarray(rows).view(np.uint16)
            rows = np.ascontiguousarray(halves.transpose(0, 1, 3, 2)).view(np.int32)
        return [rows[:, matrix].reshape(-1) for matrix in range(4)]
