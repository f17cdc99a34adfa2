"""Arithmetic of PTX that NumPy has not. Registers are arrays of whole numbers without a sign."""

from __future__ import annotations

from typing import Any

import numpy as np


def shifted_left(a: Any, b: Any) -> Any:
    """shl: nothing is left after a shift by as many bits as there are."""
    bits = 8 * a.dtype.itemsize
    return np.where(b < bits, a << np.minimum(b, bits - 1).astype(a.dtype), a.dtype.type(0)).astype(a.dtype)


def shifted_right(a: Any, b: Any) -> Any:
    """shr, of numbers with a sign too."""
    bits = 8 * a.dtype.itemsize
    moved = a >> np.minimum(b, bits - 1).astype(a.dtype)
    return (moved if a.dtype.kind == "i" else np.where(b < bits, moved, a.dtype.type(0))).astype(a.dtype)


def field(a: Any, start: Any, count: Any) -> Any:
    """bfe: `count` bits from `start` on, the topmost of them the sign where there is one."""
    one, start, count = np.uint64(1), np.asarray(start, np.int64) & 255, np.asarray(count, np.int64) & 255
    wide = a.astype(
        np.int64 if a.dtype.kind == "i" else np.uint64
    )  # beyond the top are copies of the sign, or zeros
    bits = np.minimum(count, 63).astype(np.uint64)
    kept = (wide >> np.minimum(start, 63).astype(wide.dtype)).astype(np.uint64) & ((one << bits) - one)
    if a.dtype.kind == "i":
        top = np.where(count > 0, one << (np.maximum(bits, one) - one), np.uint64(0))
        kept = (kept ^ top) - top
    return kept.astype(f"u{a.dtype.itemsize}").view(a.dtype)


def permuted(a: Any, b: Any, selector: Any) -> Any:
    """prmt: four bytes of the eight of a and b, each or its sign."""
    a, b, selector = (np.asarray(x).astype(np.uint64) for x in (a, b, selector))
    both, out = a | (b << np.uint64(32)), np.zeros(np.broadcast_shapes(a.shape, b.shape, selector.shape), np.uint32)
    for i in range(4):
        wanted = (selector >> np.uint64(4 * i)) & np.uint64(15)
        byte = (both >> ((wanted & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
        byte = np.where(wanted & np.uint64(8), (byte >> np.uint64(7)) * np.uint64(255), byte)
        out |= (byte << np.uint64(8 * i)).astype(np.uint32)
    return out


def quotient(a: Any, b: Any) -> Any:
    """div: of whole numbers towards zero, of floats to within two units of the last place."""
    if a.dtype.kind == "f":
        return roughly(a.astype(np.float64) / b, a, 2)
    if not np.all(b):
        raise ZeroDivisionError("a whole number is divided by zero")
    down = a // b
    return down + ((a - down * b != 0) & ((a < 0) != (b < 0))).astype(a.dtype)


def roughly(exact: Any, like: Any, units: float) -> Any:
    """float32 next to an exact value, made wrong by up to so many units of its last place, differently for every
    argument, of which `like` is one. So results do not rest on digits that a GPU does not promise."""
    noise = (np.asarray(like).view(np.uint32) * np.uint32(2654435761) >> np.uint32(8)).astype(np.float64)
    return (exact * (1 + (noise / 2**23 - 1) * units * 2.0**-24)).astype(np.float32)


def flushed(x: Any) -> Any:
    """ftz: what is below the least normal float32 becomes zero."""
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


def fma(a: Any, b: Any, c: Any) -> Any:
    """a b + c of up to float32, rounded once but for about one case in 2^29."""
    if a.dtype == np.float64:
        raise NotImplementedError("fma of float64")
    return (a.astype(np.float64) * b + c).astype(a.dtype)


def from_bf16(x: Any) -> Any:
    """float32 of the 16 bits of a bfloat16."""
    return (x.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(x: Any) -> Any:
    """The 16 bits of float32 as bfloat16, ties to even."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def to_tf32(x: Any, away: bool) -> Any:
    """The bits of a float32 of which ten are left behind the point; ties away from zero, or to even."""
    bits = x.view(np.uint32)
    half = np.uint32(0x1000) if away else np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))
    return np.where(np.isfinite(x), (bits + half) & np.uint32(0xFFFFE000), bits)


def halves(x: Any) -> tuple[Any, Any]:
    """The lower and the upper 16 bits."""
    return (x & np.uint32(0xFFFF)).astype(np.uint16), (x >> np.uint32(16)).astype(np.uint16)


def joined(low: Any, high: Any) -> Any:
    """32 bits of twice 16."""
    return low.astype(np.uint32) | (high.astype(np.uint32) << np.uint32(16))


def whole(x: Any, kind: str) -> Any:
    """cvt.rzi: floats as whole numbers of a NumPy kind, the nearest to zero that there are; NaN is 0."""
    limits = np.iinfo(kind)
    return np.clip(np.trunc(np.nan_to_num(x.astype(np.float64), nan=0.0)), limits.min, limits.max).astype(kind)


def elements(value: np.ndarray, kind: str) -> list[np.ndarray]:
    """The numbers in a register, or in 16 bits by themselves, as float32: one of TF32, two of 16 bits."""
    if kind == "tf32":
        return [(value & np.uint32(0xFFFFE000)).view(np.float32)]
    parts = halves(value) if value.itemsize == 4 else [value]
    return [from_bf16(x) if kind == "bf16" else x.view(np.float16).astype(np.float32) for x in parts]
