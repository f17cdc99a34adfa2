"""Triton kernels of the causal convolution with bias and SiLU.

Rows are counted with the initial state in front: rows 0 to K-2 are the initial state, row K-1+t is x[t]. An output
takes the rows 0, 1, ..., K-1 steps back from its own. Under a mask a step leads to the neighbour that exists, which
a table of links gives; with boundaries a row counts where it has the number of the output's sequence.

A program handles a tile of time by channels. The shifted tiles that the taps need overlap, and come from the cache.

Dimensions: B batch, L length, D channels, K width; T tiles of BLOCK_T steps, C tiles of BLOCK_D channels.
"""

# Triton's language is not Python's: what pyright knows of its types does not hold inside kernels.
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportArgumentType=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _rows(
    x, initial, row, there, channels,
    x_stride, x_channel_stride, initial_stride, length, D,
    PAST: tl.constexpr, HAS_INITIAL: tl.constexpr,
):  # fmt: skip
    """The inputs at rows (BLOCK_T,), (BLOCK_T, BLOCK_D) float32; zero where there is none."""
    exists = there & (row >= PAST) & (row < PAST + length)
    inside = exists[:, None] & (channels < D)[None, :]
    places = (row - PAST)[:, None] * x_stride + channels[None, :] * x_channel_stride
    values = tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
    if HAS_INITIAL:
        inside = (there & (row >= 0) & (row < PAST))[:, None] & (channels < D)[None, :]
        places = row[:, None] * initial_stride + channels[None, :]
        values += tl.load(initial + places, mask=inside, other=0.0).to(tl.float32)
    return values


@triton.jit
def _number(numbers, row, length, PAST: tl.constexpr):
    """The number of the sequence that rows belong to, (BLOCK_T,); of the initial state, 0."""
    return tl.load(numbers + (row - PAST), mask=(row >= PAST) & (row < PAST + length), other=0)


@triton.jit
def _back(links, row, length, PAST: tl.constexpr, LINKED: tl.constexpr):
    """The row one step back from rows."""
    if LINKED:
        link = tl.load(links + (row - PAST), mask=(row >= PAST) & (row < PAST + length), other=-1)
        row = tl.where(row >= PAST, link, row - 1)
    else:
        row = row - 1
    return row


@triton.jit
def _before_activation(
    x, weight, bias, initial, links, numbers, row, there, channels,
    x_stride, x_channel_stride, initial_stride, length, D,
    K: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr, LINKED: tl.constexpr,
    NUMBERED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The convolution at rows, (BLOCK_T, BLOCK_D) float32."""
    PAST: tl.constexpr = K - 1
    total = tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + channels, mask=channels < D, other=0.0).to(tl.float32)[None, :]
    source, counts = row, there
    if NUMBERED:
        own = _number(numbers, row, length, PAST)
    for step in tl.static_range(K):
        if NUMBERED:
            counts = there & (_number(numbers, source, length, PAST) == own)
        values = _rows(
            x, initial, source, counts, channels, x_stride, x_channel_stride, initial_stride, length, D,
            PAST, HAS_INITIAL,
        )  # fmt: skip
        factor = tl.load(weight + channels * K + (K - 1 - step), mask=channels < D, other=0.0).to(tl.float32)
        total += values * factor[None, :]
        if step + 1 < K:
            source = _back(links, source, length, PAST, LINKED)
    return total


@triton.jit
def _starts_at(links, t, length, LINKED: tl.constexpr):
    """Whether positions of x, (BLOCK_T,), have an output: they are there and not masked."""
    there = t < length
    if LINKED:
        there = there & (tl.load(links + t, mask=there, other=-2) != -2)
    return there


@triton.jit
def forward_kernel(
    x, weight, bias, initial, links, numbers, y,
    x_batch_stride, x_stride, x_channel_stride, initial_batch_stride, initial_stride, length, D, tiles, blocks,
    K: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr, LINKED: tl.constexpr,
    NUMBERED: tl.constexpr, SILU: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """y (B, L, D), contiguous. Programs: B * T * C, the channels fastest."""
    program = tl.program_id(0).to(tl.int64)
    channels = (program % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    t = (program // blocks % tiles) * BLOCK_T + tl.arange(0, BLOCK_T)
    batch = program // blocks // tiles
    links += batch * length
    total = _before_activation(
        x + batch * x_batch_stride, weight, bias, initial + batch * initial_batch_stride, links,
        numbers + batch * length, t + (K - 1), _starts_at(links, t, length, LINKED), channels,
        x_stride, x_channel_stride, initial_stride, length, D,
        K, HAS_BIAS, HAS_INITIAL, LINKED, NUMBERED, BLOCK_T, BLOCK_D,
    )  # fmt: skip
    if SILU:
        total = total * tl.sigmoid(total)
    places = (batch * length + t)[:, None] * D + channels[None, :]
    tl.store(y + places, total.to(y.dtype.element_ty), mask=(t < length)[:, None] & (channels < D)[None, :])


@triton.jit
def weight_gradient_kernel(
    dy, x, weight, bias, initial, links, numbers, g, partials,
    dy_batch_stride, dy_stride, dy_channel_stride, x_batch_stride, x_stride, x_channel_stride,
    initial_batch_stride, initial_stride, length, D, chunks, blocks, tiles,
    K: tl.constexpr, ROWS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr,
    LINKED: tl.constexpr, NUMBERED: tl.constexpr, SILU: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradient before the activation, g (B, L, D) contiguous, and what it gives weight and bias.

    A program goes through `tiles` tiles of one row of the batch; its sums go to partials (B * chunks, K + 1, D)
    float32: those of the taps, oldest first, and that of the bias. Programs: B * chunks * C.
    """
    program = tl.program_id(0).to(tl.int64)
    channels = (program % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    part = program // blocks
    first, batch = part % chunks * tiles * BLOCK_T, part // chunks
    dy += batch * dy_batch_stride
    x += batch * x_batch_stride
    initial += batch * initial_batch_stride
    links += batch * length
    numbers += batch * length
    PAST: tl.constexpr = K - 1
    taps = tl.arange(0, ROWS)[:, None]
    sums = tl.zeros((ROWS, BLOCK_D), dtype=tl.float32)
    for tile in range(tiles):
        t = first + tile * BLOCK_T + tl.arange(0, BLOCK_T)
        there = _starts_at(links, t, length, LINKED)
        inside = there[:, None] & (channels < D)[None, :]
        places = t[:, None] * dy_stride + channels[None, :] * dy_channel_stride
        gradient = tl.load(dy + places, mask=inside, other=0.0).to(tl.float32)
        if SILU:
            total = _before_activation(
                x, weight, bias, initial, links, numbers, t + PAST, there, channels,
                x_stride, x_channel_stride, initial_stride, length, D,
                K, HAS_BIAS, HAS_INITIAL, LINKED, NUMBERED, BLOCK_T, BLOCK_D,
            )  # fmt: skip
            rise = tl.sigmoid(total)
            gradient *= rise * (1.0 + total * (1.0 - rise))
            own = (batch * length + t)[:, None] * D + channels[None, :]
            # also where a masked position has no gradient: g is read everywhere
            tl.store(g + own, gradient.to(g.dtype.element_ty), mask=(t < length)[:, None] & (channels < D)[None, :])
        sums += tl.where(taps == K, tl.sum(gradient, axis=0)[None, :], 0.0)
        source, counts = t + PAST, there
        if NUMBERED:
            number = _number(numbers, source, length, PAST)
        for step in tl.static_range(K):
            if NUMBERED:
                counts = there & (_number(numbers, source, length, PAST) == number)
            values = _rows(
                x, initial, source, counts, channels, x_stride, x_channel_stride, initial_stride, length, D,
                PAST, HAS_INITIAL,
            )  # fmt: skip
            sums += tl.where(taps == K - 1 - step, tl.sum(gradient * values, axis=0)[None, :], 0.0)
            if step + 1 < K:
                source = _back(links, source, length, PAST, LINKED)
    places = (part * (K + 1) + taps) * D + channels[None, :]
    tl.store(partials + places, sums, mask=(taps <= K) & (channels < D)[None, :])


@triton.jit
def input_gradient_kernel(
    g, weight, nexts, numbers, dx, dinitial,
    g_batch_stride, g_stride, g_channel_stride, length, D, tiles, blocks,
    K: tl.constexpr, HAS_INITIAL: tl.constexpr, LINKED: tl.constexpr, NUMBERED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dx (B, L, D) and dinitial (B, K-1, D), contiguous, from the gradient before the activation.

    A row reached the outputs 0, 1, ..., K-1 steps on from it. Programs: B * T * C, of rows that get a gradient.
    """
    program = tl.program_id(0).to(tl.int64)
    channels = (program % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    row = (program // blocks % tiles) * BLOCK_T + tl.arange(0, BLOCK_T)
    batch = program // blocks // tiles
    PAST: tl.constexpr = K - 1
    if not HAS_INITIAL:
        row += PAST
    g += batch * g_batch_stride
    nexts += batch * (length + PAST)
    numbers += batch * length
    end = length + PAST
    there = row < end
    if LINKED:
        there = there & (tl.load(nexts + row, mask=row < end, other=-2) != -2)
    if NUMBERED:
        own = _number(numbers, row, length, PAST)
    total = tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32)
    target = row
    for step in tl.static_range(K):
        counts = there & (target >= PAST) & (target < end)
        if NUMBERED:
            counts = counts & (_number(numbers, target, length, PAST) == own)
        inside = counts[:, None] & (channels < D)[None, :]
        places = (target - PAST)[:, None] * g_stride + channels[None, :] * g_channel_stride
        values = tl.load(g + places, mask=inside, other=0.0).to(tl.float32)
        factor = tl.load(weight + channels * K + (K - 1 - step), mask=channels < D, other=0.0).to(tl.float32)
        total += values * factor[None, :]
        if step + 1 < K:
            if LINKED:
                target = tl.load(nexts + target, mask=there & (target < end), other=0)
                target = tl.where(there, target, end)
            else:
                target = target + 1
    inside = ((row >= PAST) & (row < end))[:, None] & (channels < D)[None, :]
    places = (batch * length + row - PAST)[:, None] * D + channels[None, :]
    tl.store(dx + places, total.to(dx.dtype.element_ty), mask=inside)
    if HAS_INITIAL:
        inside = (row < PAST)[:, None] & (channels < D)[None, :]
        places = (batch * PAST + row)[:, None] * D + channels[None, :]
        tl.store(dinitial + places, total.to(dinitial.dtype.element_ty), mask=inside)
