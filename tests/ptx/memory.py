"""Memory of the machine: what a kernel may touch, and which thread touched what last.

Kept in units of two bytes: threads that write neighbouring bytes of one are reported, though they are right.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import numpy as np

UNIT = 2
NOBODY, SEVERAL_LANES, SEVERAL_WARPS = 0, -2, -3


class Fault(Exception):
    """What compute-sanitizer would report on a GPU."""


class Who(NamedTuple):
    """Of every lane of an access: its number among all threads, warps and blocks, from 1 on, and how often it has
    waited for its warp and for its block. Threads of different blocks never wait for each other."""

    thread: np.ndarray
    warp: np.ndarray
    block: np.ndarray
    warp_waits: np.ndarray
    block_waits: np.ndarray

    def of(self, picked: np.ndarray | slice) -> Who:
        """Some of the lanes."""
        return Who(*(x[picked] for x in self))

    def each(self, count: int) -> Who:
        """Every lane so many times."""
        return self if count == 1 else Who(*(np.repeat(x, count) for x in self))


class Marks:
    """The last access of one kind to each unit."""

    def __init__(self, units: int):
        self.thread, self.warp, self.block, self.warp_waits, self.block_waits = (
            np.zeros(units, np.int32)
            for _ in Who._fields  # not touched where nothing is marked
        )

    def put(self, unit: np.ndarray, who: Who) -> None:
        """Marks accesses, of which several may be of one unit."""
        self.thread[unit], self.warp[unit], self.block[unit] = who.thread, who.warp, who.block
        self.warp_waits[unit], self.block_waits[unit] = who.warp_waits, who.block_waits
        self.thread[unit[self.thread[unit] != who.thread]] = SEVERAL_LANES
        self.several_warps(unit[self.warp[unit] != who.warp])
        self.block[unit[self.block[unit] != who.block]] = SEVERAL_WARPS

    def several_warps(self, unit: np.ndarray) -> None:
        """Accesses of more than one warp, which nothing but a barrier of the block puts in order with others."""
        self.thread[unit] = self.warp[unit] = SEVERAL_WARPS

    def before(self, unit: np.ndarray, who: Who) -> np.ndarray:
        """Whether each access is behind a barrier that the marked one is before."""
        of_warp = (self.warp[unit] == who.warp) & (self.warp_waits[unit] < who.warp_waits)
        return of_warp | (self.block[unit] == who.block) & (self.block_waits[unit] < who.block_waits)

    def races(self, unit: np.ndarray, who: Who, what: str) -> None:
        """Raises Fault where another thread's access is marked and nothing was waited for since."""
        marked = self.thread[unit]
        bad = (marked != NOBODY) & (marked != who.thread)
        if bad.any() and (bad := bad & ~self.before(unit, who)).any():
            i = int(np.flatnonzero(bad)[0])
            one, other = int(who.thread[i]) - 1, int(marked[i]) - 1
            raise Fault(
                f"thread {one} {what} thread {other} and did not wait for it, at byte {int(unit[i]) * UNIT}; so "
                f"do {int(bad.sum())} lanes (below 0: several threads)"
            )


class Shadow:
    """Who has written each unit last, and who has read it since."""

    def __init__(self, units: int):
        self.written, self.read_since = Marks(units), Marks(units)

    def read(self, unit: np.ndarray, who: Who) -> None:
        """Marks a read; raises Fault for a race."""
        self.written.races(unit, who, "reads what was written by")
        marks = self.read_since
        others = np.where(marks.before(unit, who), NOBODY, marks.thread[unit])
        warp, block = marks.warp[unit], marks.block[unit]
        marks.put(unit, who)
        found, alone = others != NOBODY, marks.warp[unit] != SEVERAL_WARPS
        marks.thread[unit[found & alone & (others != who.thread)]] = SEVERAL_LANES
        marks.several_warps(unit[found & (warp != who.warp)])
        marks.block[unit[found & (block != who.block)]] = SEVERAL_WARPS

    def write(self, unit: np.ndarray, who: Who) -> None:
        """Marks a write; raises Fault for a race."""
        self.written.races(unit, who, "overwrites what was written by")
        self.read_since.races(unit, who, "overwrites what is read by")
        self.written.put(unit, who)
        self.read_since.thread[unit] = NOBODY


def units(place: np.ndarray, width: int) -> np.ndarray:
    """The units of accesses of `width` bytes from each place on, side by side."""
    return place // UNIT if width <= UNIT else (place[:, None] // UNIT + np.arange(width // UNIT)).reshape(-1)


def put(view: np.ndarray, index: np.ndarray, values: np.ndarray, who: Who) -> None:
    """Values at their places. Threads of different warps must not write different ones to one place. Lanes of one
    warp may: PTX leaves open which of them is kept, and a GPU keeps the same one every time."""
    view[index] = values
    lost = view[index] != values
    if lost.any():
        winner = np.zeros(len(view), np.int64)
        winner[index] = np.arange(len(index))
        if (who.warp[lost] != who.warp[winner[index[lost]]]).any():
            raise Fault("threads of different warps write different values to one place")


class Region:
    """The bytes of one tensor's storage."""

    def __init__(self, start: int, size: int):
        start, size = start - start % 8, size + start % 8  # a mapped file's tensors begin anywhere
        self.start, self.size = start, size
        held = np.frombuffer((ctypes.c_ubyte * size).from_address(start), np.uint8)
        self.views = {width: held[: size // width * width].view(f"u{width}") for width in (1, 2, 4, 8)}
        self.shadow = Shadow(-(-size // UNIT))


class Global:
    """Device memory: the storages of the tensors that a kernel is given, as (address, bytes)."""

    def __init__(self, storages: list[tuple[int, int]]):
        self.regions = [Region(*each) for each in sorted(set(storages)) if each[1]]
        self.starts = np.array([each.start for each in self.regions], np.int64)

    def _found(
        self, address: np.ndarray, width: int, aligned: int
    ) -> list[tuple[Region, np.ndarray | slice, np.ndarray]]:
        """The region of accesses, which ones they are, and their bytes from its start."""
        if (crooked := address % aligned != 0).any():
            raise Fault(f"{aligned} bytes at {int(address[crooked][0]):#x} are not aligned")
        number, found = np.searchsorted(self.starts, address, "right") - 1, []
        for each in np.unique(number).tolist():
            here = slice(None) if (number == each).all() else number == each
            last = int(address[here].max())
            if each < 0 or last + width > self.regions[each].start + self.regions[each].size:
                raise Fault(f"{width} bytes at {last:#x} are outside of every tensor")
            region = self.regions[each]
            found.append((region, here, address[here] - region.start))
        return found

    def load(self, address: np.ndarray, width: int, aligned: int, who: Who) -> np.ndarray:
        """`width` bytes at each address, as a whole number."""
        values = np.zeros(len(address), f"u{width}")
        for region, here, place in self._found(address, width, aligned) if len(address) else []:
            region.shadow.read(units(place, width), who.of(here).each(max(1, width // UNIT)))
            values[here] = region.views[width][place // width]
        return values

    def store(self, address: np.ndarray, values: np.ndarray, aligned: int, who: Who) -> None:
        """Whole numbers at addresses."""
        width = values.dtype.itemsize
        for region, here, place in self._found(address, width, aligned) if len(address) else []:
            region.shadow.write(units(place, width), who.of(here).each(max(1, width // UNIT)))
            put(region.views[width], place // width, values[here], who.of(here))


class Shared:
    """Shared memory of every block of a launch; it holds NaN until it is written."""

    def __init__(self, blocks: int, size: int):
        self.size = -(-max(size, 16) // 16) * 16
        held = np.full(blocks * self.size, 0xFF, np.uint8)
        self.views = {width: held.view(f"u{width}") for width in (1, 2, 4, 8)}
        self.shadow = Shadow(len(held) // UNIT)
        self.unfenced = np.zeros((blocks, self.size // UNIT), bool)

    def place(self, address: np.ndarray, width: int, base: np.ndarray) -> np.ndarray:
        """Where an address of each lane's own block, of accesses of `width` bytes, is among all."""
        if address.size and (address % width).any():
            raise Fault(f"{width} bytes of shared memory are not aligned")
        if address.size and (int(address.min()) < 0 or int(address.max()) + width > self.size):
            raise Fault(f"{width} bytes of shared memory at {int(address.max())} are outside of its {self.size}")
        return base + address

    def load(self, place: np.ndarray, width: int, who: Who) -> np.ndarray:
        """`width` bytes at each place, as a whole number."""
        self.shadow.read(units(place, width), who.each(max(1, width // UNIT)))
        return self.views[width][place // width]

    def load_fenced(self, place: np.ndarray, width: int, who: Who) -> np.ndarray:
        """The same for wgmma, which sees what was stored before a fence."""
        if self.unfenced.reshape(-1)[units(place, width)].any():
            raise Fault("wgmma reads what was stored, without fence.proxy.async between")
        return self.load(place, width, who)

    def fence(self, blocks: np.ndarray) -> None:
        """fence.proxy.async by all threads of these blocks."""
        self.unfenced[blocks] = False

    def store(self, place: np.ndarray, values: np.ndarray, who: Who, *, copied: bool = False) -> None:
        """Whole numbers at places; copied: by cp.async, for which compilers before Triton 3.7 put no fence."""
        width = values.dtype.itemsize
        touched = units(place, width)
        self.shadow.write(touched, who.each(max(1, width // UNIT)))
        self.unfenced.reshape(-1)[touched] = not copied
        put(self.views[width], place // width, values, who)
