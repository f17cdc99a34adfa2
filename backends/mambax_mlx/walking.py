"""Every module and array below some modules of MLX, in a hurry: this runs before every token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

Place = tuple[Any, Any]
"""A module, which in MLX is a dictionary, or a list in one, and the key of one of its arrays."""


def walk(layers: Sequence[Any]) -> tuple[list[Any], list[Place]]:
    """Every module, and the place of every array in them."""
    modules: list[Any] = []
    places: list[Place] = []
    waiting: list[Any] = [*reversed(layers)]
    while waiting:
        module = waiting.pop()
        if isinstance(module, dict):
            modules.append(module)
        for key, value in module.items() if isinstance(module, dict) else enumerate(module):
            if isinstance(value, mx.array):
                places.append((module, key))
            elif isinstance(value, (dict, list)):
                waiting.append(value)
    return modules, places


def same(before: list[Any], now: list[Any]) -> bool:
    """Whether these are the same objects in the same order."""
    return len(before) == len(now) and all(a is b for a, b in zip(before, now, strict=True))
