"""Whole-number arithmetic of launches. Triton's own is typed for kernels, differently from version to version."""

from __future__ import annotations


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is not below n, which is at least 1."""
    return 1 << (n - 1).bit_length()
