"""What the GPU kernels should reach, on paper: bytes and operations of each, and the limits that they set.

The one place of these figures: ``docs/gpu-kernels.md`` has what :func:`markdown` gives, and what ``mambax bench
--backend mlx`` prints beside it is from :mod:`mambax_mlx.kernels.measured`.

Dimensions: D channels (of all heads), N d_state.
"""

from __future__ import annotations

from typing import NamedTuple

from mambax_mlx.kernels import ssd_plan
from mambax_mlx.kernels.layout import layout

STATES, CHANNELS = 16, 1536
"""Of a block of mamba-130m, to which the figures of Mamba-1 belong."""

DUAL_STATES, HEADS, WIDTH = 128, 24, 64
"""Of a block of mamba2-130m."""

ITEM, WIDE = 2, 4
"""Bytes of a number: bfloat16 for what lies along the row, float32 for states."""

SPECIAL = 4
"""Multiply-adds in the time of an exponential, a logarithm or a division."""

MODEL_LAYERS, MODEL_PRODUCTS = 24, 0.2e9
"""Of mamba-130m: blocks, and operations of the matrix products for a token."""


class Kernel(NamedTuple):
    """The cost of a kernel per token and channel.

    Attributes:
        name: what it computes.
        bytes: read and written in memory.
        special: exponentials and the like.
        other: multiply-adds, additions, shuffles and loads from threadgroup memory.
    """

    name: str
    bytes: float
    special: float
    other: float


class Chip(NamedTuple):
    """An Apple GPU.

    Attributes:
        name: of the chip.
        cores: of its GPU, of 128 lanes each.
        bandwidth: bytes per second, as Apple states it.
        clock: cycles per second, as it is commonly measured.
    """

    name: str
    cores: int
    bandwidth: float
    clock: float

    @property
    def rate(self) -> float:
        """Multiply-adds per second."""
        return self.cores * 128 * self.clock


CHIPS = (
    Chip("M2", 10, 100e9, 1.4e9),
    Chip("M3 Max", 40, 400e9, 1.38e9),
    Chip("M4 Max", 40, 546e9, 1.58e9),
)


def kernels() -> tuple[Kernel, ...]:
    """Every kernel at the sizes above, forward and backward.

    A state costs 8 operations for a step of Mamba-1 (its decay, the update, the sum, and loading B and C), 6 where
    there is no output. Those of Mamba-2 share their decay with the head, and B and C with three other channels: 4.5
    and 2.5, and 6.5 in the gradients, of which there are two. A chunk's state costs four accesses: by itself it is
    written and read, then what arrives.
    """
    n, dual = STATES, DUAL_STATES
    state = WIDE * n / layout(n).chunk  # bytes of a chunk's state, per step
    dual_state = WIDE * dual / ssd_plan.CHUNK
    small_state = WIDE * dual / ssd_plan.GRADIENT_CHUNK
    block = ssd_plan.plan(WIDTH, dual, gradient=True).block
    shares = 2 * WIDE * min(24, 1024 // n) * n * 2 / CHANNELS  # of the gradients of B and C, written and read
    dual_shares = 2 * WIDE * dual * 2 / block  # the same, added to in memory
    return (
        Kernel("scan, whole rows", 4 * ITEM, n + 5, 8 * n),
        Kernel("scan, by chunks", 6 * ITEM + 4 * state, 2 * n + 8, 14 * n),
        Kernel("scan, backward", 12 * ITEM + 7 * state + shares, 4 * n + 10, 38 * n),
        Kernel("scan, one token", 4 * ITEM + 3 * WIDE * n, n + 5, 8 * n),
        Kernel("convolution", 2 * ITEM, 2, 15),
        Kernel("convolution, backward", 3 * ITEM, 2, 30),
        Kernel("ssd, whole rows", 2 * ITEM, 0, 4.5 * dual),
        Kernel("ssd, by chunks", 3 * ITEM + 4 * dual_state, 0, 7 * dual),
        Kernel("ssd, backward", 7 * ITEM + 10 * small_state + dual_shares, 0, (2 * 2.5 + 2 * 6.5) * dual),
        Kernel("ssd, one token", 2 * ITEM + 2 * WIDE * dual, 0, 4.5 * dual),
    )


def limits(kernel: Kernel, chip: Chip) -> tuple[float, float]:
    """Tokens times channels per second by memory alone, and by arithmetic alone."""
    return chip.bandwidth / kernel.bytes, chip.rate / (SPECIAL * kernel.special + kernel.other)


def expected(kernel: Kernel, chip: Chip) -> tuple[float, float]:
    """Tokens times channels per second between which a kernel should be: nothing overlaps, everything does.

    A threadgroup loads a tile, then computes with it; that they overlap is left to the others on the same core.
    """
    memory, arithmetic = limits(kernel, chip)
    return 1 / (1 / memory + 1 / arithmetic), min(memory, arithmetic)


def two_digits(number: float) -> str:
    """A number with two digits, or all of those before the point."""
    return f"{number:.2g}" if number < 10 else f"{number:.0f}"


def rows() -> list[list[str]]:
    """The table: a kernel's costs, and for each chip the range that is expected, in 10^9 tokens times channels."""
    found = [["", "bytes", "special", "other", *(chip.name for chip in CHIPS)]]
    for kernel in kernels():
        ranges = [" to ".join(two_digits(rate / 1e9) for rate in expected(kernel, chip)) for chip in CHIPS]
        found.append([kernel.name, *(f"{cost:.0f}" for cost in kernel[1:]), *ranges])
    return found


def markdown() -> str:
    """The tables of the documentation, and what they mean for a model."""
    head, *body = rows()
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    lines += ["| " + " | ".join(row) + " |" for row in body]
    lines += ["", "| | GPU cores | memory | multiply-adds per second |", "| --- | ---: | ---: | ---: |"]
    for chip in CHIPS:
        lines.append(
            f"| {chip.name} | {chip.cores} | {chip.bandwidth / 1e9:.0f} GB/s | {chip.rate / 1e12:.1f} 10^12 |"
        )
    scan = next(kernel for kernel in kernels() if kernel.name == "scan, by chunks")
    low, high = (rate / (MODEL_LAYERS * CHANNELS) for rate in expected(scan, CHIPS[0]))
    products = 2 * CHIPS[0].rate / MODEL_PRODUCTS
    lines += [
        "",
        f"A model of 130M parameters has {MODEL_LAYERS} times {CHANNELS:,} channels: on an {CHIPS[0].name}",
        f"its scans take {round(low, -3):,.0f} to {round(high, -3):,.0f} tokens per second. Its matrix products,",
        f"{MODEL_PRODUCTS / 1e9:.1f} 10^9 operations per token, end at {round(products, -3):,.0f}: the scans add",
        f"{100 * products / high:.0f} to {100 * products / low:.0f} % to their time.",
    ]
    return "\n".join(lines) + "\n"
