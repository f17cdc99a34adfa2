"""Threads and launches of the machine. All blocks go through the instructions together until their ways part."""

from __future__ import annotations

from typing import Any

import numpy as np

from ptx.instructions import Writer, size_of
from ptx.matrices import LANES, Matrices
from ptx.memory import Global, Shared, Who
from ptx.text import Instruction, parse

Copies = list[tuple[np.ndarray, np.ndarray, np.ndarray]]
"""Places in shared memory, values and whether there is any, of every lane."""


class Stretch:
    """Instructions that follow each other without a jump, the jump behind them, and where it goes on otherwise."""

    def __init__(self, writer: Writer, instructions: list[Instruction], following: int):
        self.following, self.jump = following, None
        if instructions and instructions[-1].parts[0] in ("bra", "ret"):
            *instructions, self.jump = instructions
        lines = [f"    {line}\n" for each in instructions for line in writer.written(each).splitlines()]
        exec(compile("".join(["def run(s, R):\n    pass\n", *lines]), "<ptx>", "exec"), writer.names)
        self.run = writer.names["run"]


class Program:
    """A kernel, ready to be launched."""

    def __init__(self, ptx: str):
        self.kernel = parse(ptx)
        given, writer = self.kernel.instructions, Writer()
        behind = (i + 1 for i, each in enumerate(given) if each.parts[0] in ("bra", "ret"))
        starts = sorted({0, *behind, *self.kernel.labels.values()} - {len(given)})
        stops = [*starts[1:], len(given)]
        self.stretches = {
            start: Stretch(writer, given[start:stop], stop) for start, stop in zip(starts, stops, strict=True)
        }

    def launch(
        self, grid: tuple[int, int, int], threads: int, shared: int, values: dict[str, Any], memory: Global
    ) -> None:
        """Runs every block of a grid to its end.

        Args:
            grid: blocks along each axis.
            threads: of a block.
            shared: bytes of shared memory of a block.
            values: of each parameter by its name.
            memory: what may be touched.

        Raises:
            Fault: for what compute-sanitizer would report.
            NotImplementedError: for an instruction that is not known, and where threads of a block part ways.
        """
        launch = Launch(grid, threads, shared, values, memory)
        everything = Threads(launch, np.arange(launch.blocks))
        pending = [(0, everything, Registers(everything.count))]
        with np.errstate(all="ignore"):
            while pending:
                self._run(*pending.pop(), pending)

    def _run(
        self,
        start: int,
        state: Threads,
        registers: dict[str, Any],
        pending: list[tuple[int, Threads, dict[str, Any]]],
    ) -> None:
        """Some blocks to their end; those that part from them are put among the pending ones."""
        at: int | None = start
        while at is not None:
            stretch = self.stretches[at]
            stretch.run(state, registers)
            jump, at = stretch.jump, stretch.following
            if jump is None:
                continue
            target = self.kernel.labels[str(jump.operands[0])] if jump.parts[0] == "bra" else None
            taken = np.ones((len(state.blocks), state.threads), bool)
            if jump.guard:
                taken = (registers[jump.guard.lstrip("!")] ^ jump.guard.startswith("!")).reshape(taken.shape)
            if (taken.any(1) != taken.all(1)).any():
                raise NotImplementedError(f"threads of one block part ways: {jump.line}")
            taken = taken[:, 0]
            if taken.all():
                at = target
            elif taken.any():
                if target is not None:
                    pending.append((target, *state.of(taken, registers)))
                state, registers = state.of(~taken, registers)


class Registers(dict[str, Any]):
    """Of the threads of some blocks. One that nothing was put in holds NaN, or true: compilers read such registers
    where they know that it does not matter."""

    def __init__(self, count: int):
        super().__init__()
        self.count = count

    def __missing__(self, name: str) -> np.ndarray:
        size = size_of(name)
        return np.full(self.count, np.iinfo(f"u{size}").max if size else True, f"u{size}" if size else bool)


class Launch:
    """What all blocks of a launch share."""

    def __init__(
        self, grid: tuple[int, int, int], threads: int, shared: int, values: dict[str, Any], memory: Global
    ):
        self.grid, self.threads, self.values, self.memory = grid, threads, values, memory
        self.blocks = grid[0] * grid[1] * grid[2]
        self.shared = Shared(self.blocks, shared)


class Threads(Matrices):
    """The threads of some blocks, which are all at the same instruction."""

    def __init__(self, launch: Launch, blocks: np.ndarray):
        self.launch, self.blocks, self.threads = launch, blocks, launch.threads
        self.count = len(blocks) * launch.threads
        own, block = np.tile(np.arange(launch.threads), len(blocks)), np.repeat(blocks, launch.threads)
        (x, y, _), none = launch.grid, np.zeros(self.count, np.int32)
        self.lane, self.tid_x, self.tid_y, self.tid_z = own % LANES, own, none, none
        self.ctaid_x, self.ctaid_y, self.ctaid_z = block % x, block // x % y, block // x // y
        self.nctaid_x, self.nctaid_y, self.nctaid_z = (self.full(n) for n in launch.grid)
        self.ntid_x, self.ntid_y, self.ntid_z = (self.full(n) for n in (launch.threads, 1, 1))
        self.base = block * launch.shared.size
        thread = (block * launch.threads + own).astype(np.int32)
        self.who = Who(thread + 1, thread // LANES + 1, (block + 1).astype(np.int32), none, none)
        self.copies: Copies = []
        self.groups: list[Copies] = []

    def of(self, taken: np.ndarray, registers: Registers) -> tuple[Threads, Registers]:
        """Those of some of the blocks, and their registers."""
        lanes = np.repeat(taken, self.threads)

        def some(copies: Copies) -> Copies:
            return [(place[lanes], value[lanes], there[lanes]) for place, value, there in copies]

        part = Threads(self.launch, self.blocks[taken])
        part.who, part.copies, part.groups = self.who.of(lanes), some(self.copies), [some(x) for x in self.groups]
        theirs = Registers(part.count)
        theirs.update((name, x[lanes]) for name, x in registers.items())
        return part, theirs

    # --- registers ---------------------------------------------------------------------------------------------

    def full(self, value: Any) -> np.ndarray:
        """Values of every lane, of one where there is but one."""
        return value if isinstance(value, np.ndarray) and value.ndim else np.full(self.count, value)

    def held(self, value: Any, size: int) -> np.ndarray:
        """Values as a register of `size` bytes holds them; a predicate has 0."""
        value = self.full(value)
        if size == 0:
            return value.astype(bool)
        if value.dtype.itemsize == size and value.dtype != bool:
            return value.view(f"u{size}")
        if value.dtype.kind not in "ui":
            raise TypeError(f"{value.dtype} in a register of {size} bytes")
        return value.astype(f"{value.dtype.kind}{size}").view(f"u{size}")

    def shuffled(self, how: str, value: np.ndarray, lane: Any) -> np.ndarray:
        """shfl.sync: each thread's value from another of its warp."""
        own, lane = np.arange(LANES), self.full(lane).astype(np.int64).reshape(-1, LANES)
        source = {"bfly": own ^ lane, "idx": lane % LANES, "up": own - lane, "down": own + lane}[how]
        source = np.where((source >= 0) & (source < LANES), source, own)
        return np.take_along_axis(value.reshape(-1, LANES), source, 1).reshape(-1)

    # --- memory ------------------------------------------------------------------------------------------------

    def _where(self, mask: np.ndarray | None) -> tuple[np.ndarray | slice, Who]:
        """The lanes that take part, for indexing, and who they are."""
        if mask is None or mask.all():
            return slice(None), self.who
        return mask, self.who.of(mask)

    def load_global(self, address: np.ndarray, kind: str, count: int, mask: np.ndarray | None) -> list[np.ndarray]:
        """ld.global of `count` values side by side; zero where nothing is loaded."""
        (here, who), width = self._where(mask), int(kind[1])
        values = [np.zeros(self.count, f"u{width}") for _ in range(count)]
        for i, value in enumerate(values):
            aligned = width * (count if i == 0 else 1)
            value[here] = self.launch.memory.load(address[here] + i * width, width, aligned, who)
        return [value.view(kind) for value in values]

    def store_global(self, address: np.ndarray, values: list[np.ndarray], mask: np.ndarray | None) -> None:
        """st.global."""
        (here, who), width = self._where(mask), values[0].dtype.itemsize
        for i, value in enumerate(values):
            aligned = width * (len(values) if i == 0 else 1)
            self.launch.memory.store(address[here] + i * width, value[here], aligned, who)

    def load_shared(self, address: np.ndarray, kind: str, count: int, mask: np.ndarray | None) -> list[np.ndarray]:
        """ld.shared."""
        (here, who), width, shared = self._where(mask), int(kind[1]), self.launch.shared
        place = shared.place(address[here], width * count, self.base[here])
        values = [np.zeros(self.count, f"u{width}") for _ in range(count)]
        for i, value in enumerate(values):
            value[here] = shared.load(place + i * width, width, who)
        return [value.view(kind) for value in values]

    def store_shared(self, address: np.ndarray, values: list[np.ndarray], mask: np.ndarray | None) -> None:
        """st.shared."""
        (here, who), width, shared = self._where(mask), values[0].dtype.itemsize, self.launch.shared
        place = shared.place(address[here], width * len(values), self.base[here])
        for i, value in enumerate(values):
            shared.store(place + i * width, value[here], who)

    # --- copies that go on beside the threads, and waiting -------------------------------------------------------

    def copy(
        self, to: np.ndarray, source: np.ndarray, size: int, count: np.ndarray, mask: np.ndarray | None
    ) -> None:
        """cp.async: `count` bytes, and zeros up to `size`. Until they arrive their place holds NaN."""
        mask, shared = np.ones(self.count, bool) if mask is None else mask, self.launch.shared
        start = np.zeros(self.count, np.int64)
        start[mask] = shared.place(to[mask], size, self.base[mask])
        who = self.who.of(mask)
        for i in range(0, size, 4):
            real, value = mask & (count.astype(np.int64) > i), np.zeros(self.count, np.uint32)
            aligned = size if i == 0 else 4
            value[real] = self.launch.memory.load(source[real] + i, 4, aligned, self.who.of(real))
            shared.store(start[mask] + i, np.full(len(who.thread), 0xFFFFFFFF, np.uint32), who)
            self.copies.append((start + i, value, mask))

    def commit(self) -> None:
        """cp.async.commit_group."""
        self.groups.append(self.copies)
        self.copies = []

    def arrive(self, left: int) -> None:
        """cp.async.wait_group: all but the last groups arrive."""
        number = max(0, len(self.groups) - left)
        for group in self.groups[:number]:
            for place, value, there in group:
                self.launch.shared.store(place[there], value[there], self.who.of(there), copied=True)
        del self.groups[:number]

    def fence(self) -> None:
        """fence.proxy.async."""
        self.launch.shared.fence(self.blocks)

    def wait(self, *, of_block: bool) -> None:
        """bar.sync, or bar.warp.sync."""
        warp, block = self.who.warp_waits + 1, self.who.block_waits + int(of_block)
        self.who = self.who._replace(warp_waits=warp, block_waits=block)
