"""JSON files that come from elsewhere, read strictly."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

SIZE_LIMIT = 16 * 2**20
"""Bytes. The largest index of a sharded checkpoint has some hundred thousand."""


def parse_object(text: bytes, where: str) -> dict[str, Any]:
    """A JSON object, with infinities in any spelling of transformers.

    Args:
        text: UTF-8, with or without a byte order mark.
        where: what is parsed, for messages.

    Raises:
        ValueError: for text that is not JSON or not an object, for a key that comes twice, and for NaN.
    """

    def unique(pairs: list[tuple[str, Any]]) -> Any:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"the key {key[:80]!r} comes twice")
            found[key] = value
        if found.keys() == {"__float__"} and isinstance(found["__float__"], str):
            return float(found["__float__"])
        for key, value in pairs:
            if _has_nan(value):
                raise ValueError(f"{key[:80]!r} is NaN; expected a number")
        return found

    try:
        value = json.loads(text.decode("utf-8-sig"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON: {error}; download or write the file again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a JSON object, {{...}}, found {type(value).__name__}")
    return value


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: as :func:`parse_object`, and for files above :data:`SIZE_LIMIT`.
    """
    size = path.stat().st_size
    if size > SIZE_LIMIT:
        raise ValueError(f"{path}: {size} bytes; expected a JSON file of at most {SIZE_LIMIT}")
    return parse_object(path.read_bytes(), str(path))


def dump_object(value: dict[str, Any]) -> bytes:
    """The text of a JSON object as transformers 5 writes it: two spaces, a newline at the end, UTF-8, and infinity,
    which JSON does not know, as ``{"__float__": "Infinity"}``."""
    return (json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")


def _has_nan(value: Any) -> bool:
    return any(map(_has_nan, value)) if isinstance(value, list) else value != value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and math.isinf(value):
        return {"__float__": "Infinity" if value > 0 else "-Infinity"}
    return value
