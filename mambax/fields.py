"""Checks of the fields of frozen dataclasses, on construction."""

from __future__ import annotations

import dataclasses
from numbers import Integral, Real
from typing import Any


def fail(config: object, field: str, value: object, allowed: str) -> None:
    """Refuse a field's value.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """
    raise ValueError(f"{type(config).__name__}.{field} is {value!r}; expected {allowed}")


def check_int(config: object, field: str, low: int, high: int) -> None:
    """Refuse what is not a whole number from low to high."""
    value = getattr(config, field)
    if isinstance(value, bool) or not isinstance(value, Integral) or not low <= int(value) <= high:
        fail(config, field, value, f"a whole number from {low} to {high}")
    object.__setattr__(config, field, int(value))  # a NumPy integer too, which JSON does not know


def check_float(config: object, field: str, low: float, high: float) -> None:
    """Refuse what is not a number from low to high."""
    value = getattr(config, field)
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not low <= float(value) <= high:
        fail(config, field, value, f"a number from {low:g} to {high:g}")
    if not isinstance(value, (int, float)):
        object.__setattr__(config, field, float(value))


def check_bool(config: object, *fields: str) -> None:
    """Refuse what is neither True nor False."""
    for field in fields:
        if not isinstance(getattr(config, field), bool):
            fail(config, field, getattr(config, field), "True or False")


def check_choice(config: object, field: str, choices: tuple[str, ...]) -> None:
    """Refuse what is none of the choices."""
    if getattr(config, field) not in choices:
        fail(config, field, getattr(config, field), "one of " + ", ".join(map(repr, choices)))


def check_options(config: object, field: str, options: type[Any]) -> None:
    """Make options of a plain dict, as a file has them."""
    value = getattr(config, field)
    if isinstance(value, dict):
        known = dataclasses.fields(options)
        if unknown := sorted(value.keys() - {item.name for item in known}):
            fail(config, field, unknown, f"fields of {options.__name__}")
        needed = [item.name for item in known if item.default is dataclasses.MISSING]
        if not value.keys() >= set(needed):
            fail(config, field, value, f"{options.__name__} with at least {', '.join(needed)}")
        object.__setattr__(config, field, options(**value))
    elif value is not None and not isinstance(value, options):
        fail(config, field, value, f"{options.__name__} or None")
