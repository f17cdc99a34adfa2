"""Fields of configurations that say what they allow, so that one function checks them all."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any


def _field(default: Any, allowed: str, fits: Callable[[Any], bool]) -> Any:
    metadata = {"allowed": allowed, "fits": fits}
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def whole(default: Any, low: int, high: int = 2**40, *, optional: bool = False) -> Any:
    """A whole number from low to high; None too when optional."""

    def fits(value: Any) -> bool:
        number = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
        return number or (optional and value is None)

    return _field(default, f"a whole number from {low} to {high}" + (", or none" if optional else ""), fits)


def number(default: Any, low: float, high: float) -> Any:
    """A finite number from low to high."""

    def fits(value: Any) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high

    return _field(default, f"a number from {low:g} to {high:g}", fits)


def flag(default: bool) -> Any:
    """True or False."""
    return _field(default, "true or false", lambda value: isinstance(value, bool))


def choice(default: str, *choices: str) -> Any:
    """One of some words."""
    return _field(default, "one of " + ", ".join(map(repr, choices)), lambda value: value in choices)


def text(default: Any, *, optional: bool = False) -> Any:
    """Text that is not empty; None too when optional."""

    def fits(value: Any) -> bool:
        return (isinstance(value, str) and bool(value)) or (optional and value is None)

    return _field(default, "text" + (", or none" if optional else ""), fits)


def texts(default: tuple[str, ...] = ()) -> Any:
    """A tuple of texts."""

    def fits(value: Any) -> bool:
        return isinstance(value, tuple) and all(isinstance(item, str) and item for item in value)

    return _field(default, "a list of texts", fits)


def check(config: Any) -> None:
    """Refuse a dataclass with a value that its field does not allow.

    Raises:
        ValueError: naming the field, the value and what is allowed.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if "fits" in field.metadata and not field.metadata["fits"](value):
            raise ValueError(
                f"{type(config).__name__}.{field.name} is {value!r}; expected {field.metadata['allowed']}"
            )
