"""Races: two accesses to one place, one of them a write, that no barrier orders."""

from __future__ import annotations

import numpy as np
from ptx_values import WARP, Array, KernelError

GRANULE = 2  # bytes: of the smallest numbers in global memory


class GlobalRaces:
    """Of one launch. Threads of a block are ordered by its barriers, blocks by nothing."""

    def __init__(self) -> None:
        self.pending: list[tuple[Array, int, Array, bool, str]] = []
        self.written: list[tuple[Array, Array]] = []  # places and blocks, of all barriers so far

    def add(self, address: Array, size: int, threads: Array, write: bool, what: str) -> None:
        self.pending.append((address, size, threads, write, what))

    @staticmethod
    def places(address: Array, size: int, threads: Array) -> tuple[Array, Array]:
        """Granules and threads, one pair for each that is accessed."""
        count = size // GRANULE
        first = np.broadcast_to(address // GRANULE, threads.shape)
        return (first[:, None] + np.arange(count)).ravel(), np.repeat(threads, count)

    def barrier(self, size: int, first: int) -> None:
        """Of every block at once. `size`: threads of a block; `first`: the number of the first block."""
        accesses, self.pending = self.pending, []
        stores = [self.places(*each[:3]) for each in accesses if each[3]]
        if not stores:
            return
        places, threads = (np.concatenate(each) for each in zip(*stores, strict=True))
        order = np.argsort(places, kind="stable")
        places, threads = places[order], threads[order]
        if np.any((places[1:] == places[:-1]) & (threads[1:] != threads[:-1])):
            raise KernelError(f"a race in global memory: {', '.join(each[4] for each in accesses if each[3])}")
        self.written.append((places, threads // size + first))
        low, high = places[0] * GRANULE, places[-1] * GRANULE
        for address, width, of, write, what in accesses:
            if write or np.max(address) + width <= low or np.min(address) > high:
                continue
            read, by = self.places(address, width, of)
            at = np.minimum(np.searchsorted(places, read), len(places) - 1)
            if np.any((places[at] == read) & (threads[at] != by)):
                raise KernelError(f"a race in global memory: {what}")

    def end(self) -> None:
        """No place may have been written by two blocks."""
        if self.written:
            places, blocks = (np.concatenate(each) for each in zip(*self.written, strict=True))
            order = np.argsort(places, kind="stable")
            places, blocks = places[order], blocks[order]
            if np.any((places[1:] == places[:-1]) & (blocks[1:] != blocks[:-1])):
                raise KernelError("a race between blocks, in global memory")
        self.written = []


class Races:
    """Of accesses to shared memory between barriers: no thread may touch what another one writes.

    Accesses are kept until a barrier, of the block or of the warp, and then compared by thread. What is left after that
    of a warp is compared by warp, up to the block's.
    """

    def __init__(self, words: int, log_granule: int) -> None:
        self.shift = log_granule
        self.pending: list[tuple[Array, int, Array, bool, str]] = []
        self.last = np.zeros(words, np.int32)  # who wrote it in this turn
        self.turn = 0
        # warps that have written and read since the block's barrier: 0 none, −1 several, else one's number + 1
        self.writer, self.reader = np.zeros(words, np.int32), np.zeros(words, np.int32)
        self.by_warp = False

    def add(self, place: Array, size: int, threads: Array, write: bool, what: str) -> None:
        self.pending.append((place, size, threads, write, what))

    def words(self, place: Array, size: int) -> Array:
        first = place >> self.shift
        count = max(1, size >> self.shift)
        return first if count == 1 else first[:, None] + np.arange(count)

    def compare(self) -> None:
        """By thread; the turn is over."""
        self.turn += 1
        turn = self.turn << 16
        accesses = [
            (self.words(place, size), threads, write, what) for place, size, threads, write, what in self.pending
        ]
        self.pending = []
        for write in (True, False):
            for words, threads, writes, what in accesses:
                own = (threads + turn).astype(np.int32).reshape(-1, *[1] * (words.ndim - 1))
                if write and writes:
                    self.last[words] = own
                    continue
                last = self.last[words]
                if np.any((last >= turn) & (last != own) if not writes else last != own):
                    raise KernelError(f"a race between threads: {what}")
        if self.by_warp:
            for each in accesses:
                self.keep(*each)

    def keep(self, words: Array, threads: Array, writes: bool, what: str) -> None:
        own = (threads // WARP + 1).astype(np.int32).reshape(-1, *[1] * (words.ndim - 1))
        writer, reader = self.writer[words], self.reader[words]
        if np.any((writer != 0) & (writer != own)) or (writes and np.any((reader != 0) & (reader != own))):
            raise KernelError(f"a race between warps: {what}")
        (self.writer if writes else self.reader)[words] = own
        if not writes:
            self.reader[words[np.broadcast_to((reader != 0) & (reader != own), words.shape)]] = -1

    def warp_barrier(self, threads: Array) -> None:
        self.by_warp = True
        waiting = []
        active = np.zeros(int(max(threads.max(), *(each[2].max() for each in self.pending), 0)) // WARP + 1, bool)
        active[threads // WARP] = True
        mine = []
        for place, size, of, write, what in self.pending:
            now = active[of // WARP]
            if now.all():
                mine.append((place, size, of, write, what))
            else:
                mine.append((place[now], size, of[now], write, what))
                waiting.append((place[~now], size, of[~now], write, what))
        self.pending = mine
        self.compare()
        self.pending = waiting

    def block_barrier(self) -> None:
        self.compare()
        if self.by_warp:
            self.writer[:] = self.reader[:] = 0
