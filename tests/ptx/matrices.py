"""Products of small matrices, whose elements are spread over the threads of a warp or of four warps.

Where each element is: PTX ISA, the sections on the fragments of mma.m16n8k8 and k16, ldmatrix, the registers of
wgmma.mma_async, and the layout of its matrices in shared memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ptx.memory import Who
from ptx.numbers import elements, halves, joined

LANES = 32
GROUP = 4 * LANES
ROW = {0: 16, 1: 128, 2: 64, 3: 32}
"""Bytes of a row of a tile in shared memory, by the swizzling that a descriptor names; 0 is none."""

EIGHTH, QUARTER = np.arange(LANES) // 4, np.arange(LANES) % 4
"""Of each lane, among eight groups of four."""


class Matrices:
    """What the threads of some blocks do with matrices."""

    launch: Any
    base: np.ndarray
    who: Who
    count: int

    def _rows(self, address: np.ndarray, count: int) -> np.ndarray:
        """Where the rows of `count` matrices of eight are, as lanes 8 i to 8 i + 7 say: (warps, count, 8)."""
        lanes = address.reshape(-1, LANES)[:, : 8 * count]
        place = self.launch.shared.place(lanes, 16, self.base.reshape(-1, LANES)[:, :1])
        return place.reshape(-1, count, 8)

    def _pieces(self, rows: np.ndarray, trans: bool) -> tuple[np.ndarray, np.ndarray]:
        """Where the two 16-bit elements of each lane are, in one matrix with these rows (warps, 8)."""
        if trans:
            column = 2 * EIGHTH
            return (rows[:, 2 * QUARTER] + column).reshape(-1), (rows[:, 2 * QUARTER + 1] + column).reshape(-1)
        first = (rows[:, EIGHTH] + 4 * QUARTER).reshape(-1)
        return first, first + 2

    def load_matrices(self, address: np.ndarray, count: int, trans: bool) -> list[np.ndarray]:
        """ldmatrix."""
        rows, load = self._rows(address, count), self.launch.shared.load
        pieces = (self._pieces(rows[:, i], trans) for i in range(count))
        return [joined(*(load(place, 2, self.who) for place in both)) for both in pieces]

    def store_matrices(self, address: np.ndarray, values: list[np.ndarray], trans: bool) -> None:
        """stmatrix."""
        rows = self._rows(address, len(values))
        for i, value in enumerate(values):
            for place, half in zip(self._pieces(rows[:, i], trans), halves(value), strict=True):
                self.launch.shared.store(place, half, self.who)

    def product(
        self, shape: str, kind: str, a: list[np.ndarray], b: list[np.ndarray], c: list[np.ndarray]
    ) -> list[np.ndarray]:
        """mma.sync: A (16, K) times B (K, 8) plus C."""
        if not shape.startswith("m16n8k"):
            raise NotImplementedError(shape)
        K, each = int(shape[6:]), 1 if kind == "tf32" else 2
        B = np.full((self.count // LANES, K, 8), np.nan, np.float32)
        for i, value in enumerate(b):
            for j, x in enumerate(elements(value.reshape(-1, LANES), kind)):
                B[:, QUARTER * each + j + 4 * each * i, EIGHTH] = x
        return self._sums(self._left(a, kind, K).astype(np.float64) @ B, c, len(c))

    def _left(self, a: list[np.ndarray], kind: str, K: int) -> np.ndarray:
        """A (warps, 16, K) from registers."""
        each = 1 if kind == "tf32" else 2
        A = np.full((self.count // LANES, 16, K), np.nan, np.float32)
        for i, value in enumerate(a):
            for j, x in enumerate(elements(value.reshape(-1, LANES), kind)):
                A[:, EIGHTH + 8 * (i % 2), QUARTER * each + j + 4 * each * (i // 2)] = x
        return A

    def _sums(self, product: np.ndarray, c: list[np.ndarray] | None, count: int) -> list[np.ndarray]:
        """A product (warps, 16, columns), plus C where there is one, in `count` registers."""
        out = []
        for i in range(count):
            value = product[:, EIGHTH + 8 * (i // 2 % 2), 8 * (i // 4) + QUARTER * 2 + i % 2].reshape(-1)
            value = value if c is None else value + c[i].view(np.float32)
            out.append(value.astype(np.float32).view(np.uint32))
        return out

    def group_product(
        self, shape: str, kind: str, a: list[np.ndarray] | np.ndarray, b: np.ndarray,
        d: list[np.ndarray] | None, add: np.ndarray, turned: list[int],
    ) -> list[np.ndarray]:  # fmt: skip
        """wgmma.mma_async: A (64, K), of registers or described, times B (K, columns), described, plus D if `add`.

        A described matrix lies in shared memory; turned: K is not its fastest dimension.
        """
        columns, K = (int(number) for number in shape.removeprefix("m64n").split("k"))
        if ((kind == "tf32") != (K == 8)) or K not in (8, 16):
            raise NotImplementedError(f"wgmma {shape} of {kind}")
        if isinstance(a, list):
            A = self._left(a, kind, K).reshape(-1, 64, K)
        else:
            A = self._described(a, 64, K, turned[0], kind)
        B = self._described(b, columns, K, turned[1], kind).swapaxes(1, 2)
        product, count = (A.astype(np.float64) @ B).reshape(-1, 16, columns), columns // 2
        fresh = self._sums(product, None, count)
        if d is None:
            return fresh
        return [np.where(add, x, y) for x, y in zip(self._sums(product, d, count), fresh, strict=True)]

    def _described(self, descriptor: np.ndarray, rows: int, K: int, turned: int, kind: str) -> np.ndarray:
        """The tile (groups, rows, K) in shared memory of which a descriptor tells."""
        told, size = descriptor.reshape(-1, GROUP), 4 if kind == "tf32" else 2
        one = told[:, 0]
        if (told != told[:, :1]).any() or (one >> np.uint64(62) != one[0] >> np.uint64(62)).any():
            raise NotImplementedError("descriptors that differ between threads, or swizzle differently")
        start, leading, stride = (
            (((one >> np.uint64(bit)) & np.uint64(0x3FFF)) << np.uint64(4)).astype(np.int64)[:, None, None]
            for bit in (0, 16, 32)
        )
        width = ROW[int(one[0] >> np.uint64(62))]
        if ((one >> np.uint64(49)) & np.uint64(7)).any() or (turned and size == 4):
            raise NotImplementedError("a descriptor with a base offset, or a turned tile of TF32")
        r, k = np.arange(rows)[:, None], np.arange(K)[None, :]
        if not turned and width == 16:
            place = r % 8 * 16 + r // 8 * stride + k * size % 16 + k * size // 16 * leading
        elif not turned:
            place = r % 8 * width + r // 8 * stride + k * size
        elif width == 16:
            place = r % 8 * 2 + r // 8 * stride + k % 8 * 16 + k // 8 * leading
        else:
            place = r % (width // 2) * 2 + r // (width // 2) * leading + k % 8 * width + k // 8 * stride
        place = start + place
        if width > 16:
            place = place ^ ((place >> 3) & (width - 16))
        base = self.base.reshape(-1, GROUP)[:, 0]
        flat = self.launch.shared.place(place.reshape(len(base), -1), size, base[:, None]).reshape(-1)
        found = flat
        for warp in range(0, GROUP, LANES):  # all four read
            who = Who(*(x.reshape(-1, GROUP)[:, warp] for x in self.who)).each(rows * K)
            found = self.launch.shared.load_fenced(flat, size, who)
        return elements(found, kind)[0].reshape(-1, rows, K)
