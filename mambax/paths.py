"""Paths as people give them."""

from __future__ import annotations

import os
from pathlib import Path


def path_of(given: str | os.PathLike[str], name: str) -> Path:
    """The path that an argument names, ``~`` written out.

    Args:
        given: what was given.
        name: of the argument, for messages.

    Raises:
        ValueError: for what is not a path, and for an empty one, which would mean the current folder.
    """
    if not isinstance(given, (str, os.PathLike)) or not isinstance(os.fspath(given), str):
        raise ValueError(f"{name} is of type {type(given).__name__}; expected a path, as text or pathlib.Path")
    if not os.fspath(given):
        raise ValueError(f"{name} is empty; expected a path ('.' is the current folder)")
    return Path(given).expanduser()
