"""How the Triton scan is laid out over a GPU: by a rule, or for a class of sizes as a measurement found.

:func:`tune` measures the few :data:`CANDIDATES` and keeps the fastest in a file, by GPU, Triton version and class
of sizes; nothing is ever measured unasked. The choice moves results by rounding alone.

Dimensions: B batch, L length, D channels, N d_state.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from mambax_cpu.object_files import cache_folder

from mambax_torch.kernels.sizes import cdiv, next_power_of_2

SHORTEST = 16
"""Steps of a segment, at least. Starting one costs about as much as some steps."""

AGAIN = 1.1
"""How much longer a block of channels takes whose sums are added to those of blocks before."""


class Layout(NamedTuple):
    """What can be chosen.

    Attributes:
        cells: d_state times channels of a program, where time is cut into segments.
        full: programs per processor from which it is not: two for each of its schedulers, by default.
        fill: programs per processor that cutting it aims at: as many as find registers.
        resident: programs per processor in the gradient kernel.
    """

    cells: int = 1024
    full: int = 8
    fill: int = 12
    resident: int = 8


CANDIDATES = (
    Layout(), Layout(full=4), Layout(full=16), Layout(full=16, fill=16), Layout(full=16, fill=8),
    Layout(cells=512, full=16, fill=16), Layout(resident=6), Layout(resident=12),
)  # fmt: skip


class Segments(NamedTuple):
    """Time cut into `number` segments of `steps` steps, and channels into blocks of `block`."""

    block: int
    number: int
    steps: int


@cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; for the interpreter, 2."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def block_of(cells: int, channels: int, states: int) -> int:
    """Channels of a program that holds about so many states, a power of two."""
    return max(1, min(cells // next_power_of_2(states), 128, next_power_of_2(channels)))


def segments_of(layout: Layout, batch: int, length: int, channels: int, states: int, processors: int) -> Segments:
    """How the forward pass cuts a scan. All programs of a cut one are to run at the same time."""
    for cells in (1024, 512):
        block = block_of(cells, channels, states)
        if batch * cdiv(channels, block) >= layout.full * processors:
            return Segments(block, 1, length)
    block = block_of(layout.cells, channels, states)
    most = max(1, layout.fill * processors // (batch * cdiv(channels, block)))
    steps = max(SHORTEST, cdiv(length, most))
    return Segments(block, cdiv(length, steps), steps) if steps < length else Segments(block, 1, length)


@cache
def groups_of(intervals: int, blocks: int, programs: int) -> int:
    """Into how many groups the gradient kernel takes blocks of channels: as few as cost little time.

    Each group has sums of its own over its channels, in memory; a program takes the blocks of a group and of an
    interval one after another.
    """

    def time(groups: int) -> float:
        rounds = cdiv(intervals * groups, programs) * cdiv(blocks, groups)
        return rounds * (1.0 if groups == blocks else AGAIN)

    times = [time(groups) for groups in range(1, blocks + 1)]
    return 1 + next(i for i, found in enumerate(times) if found <= 1.2 * min(times))


def layout_of(device: torch.device, batch: int, length: int, channels: int, states: int) -> Layout:
    """The layout measured for this class of sizes on this GPU, else the default."""
    if device.type != "cuda":
        return Layout()
    return _measured().get(_key(device, batch, length, channels, states), Layout())


@cache
def _name(device: torch.device) -> str:
    return f"{torch.cuda.get_device_name(device)} | triton {triton.__version__}"


def _key(device: torch.device, batch: int, length: int, channels: int, states: int) -> str:
    sizes = (next_power_of_2(max(1, size)) for size in (batch * channels, length, states))
    return " | ".join((_name(device), *map(str, sizes)))


def path() -> Path:
    """The file of measurements, in the folder for what mambax keeps on this machine."""
    return cache_folder() / "triton-scan.json"


@cache
def _measured() -> dict[str, Layout]:
    """What the file holds; nothing where there is none, or none that can be read: it only makes things faster."""
    try:
        held = json.loads(path().read_text(encoding="utf-8"))
        return {key: Layout(**{name: int(value) for name, value in fields.items()}) for key, fields in held.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def tune(
    device: torch.device, batch: int, length: int, channels: int, states: int, seconds: Callable[[Layout], float]
) -> dict[Layout, float]:
    """Measure every candidate, and keep the fastest for this class of sizes in the file and in this process.

    Args:
        device: a CUDA device.
        batch, length, channels, states: B, L, D, N.
        seconds: runs the work with a layout and returns how long it took.

    Returns:
        The seconds of every candidate.
    """
    times = {candidate: seconds(candidate) for candidate in CANDIDATES}
    held = dict(_measured())
    held[_key(device, batch, length, channels, states)] = min(times, key=times.__getitem__)
    file = path()
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps({key: value._asdict() for key, value in held.items()}, indent=1), encoding="utf-8")
    part.replace(file)
    _measured.cache_clear()
    return times
