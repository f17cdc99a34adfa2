"""How functions of this package are handed to Numba.

Numba's decorators describe the Python function, not what compiled code can call; those here describe nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numba.extending

PART = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
"""Options of a function that only compiled code calls."""
INLINED = {**PART, "forceinline": True}
"""The same for a short one, whose code LLVM is to put in place of the call."""


def kernel(function: Callable[..., Any]) -> Any:
    """The function compiled at its first call, to run without the GIL.

    The result is kept on disk where Numba finds a folder it may write to, and otherwise for this process alone.
    What is kept is renewed when the function's own file changes; after editing a file it imports, touch it too.
    """
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError as error:
        if "no locator" not in str(error):  # Numba's words for having found no folder
            raise
        return numba.njit(nogil=True)(function)


def part(function: Callable[..., Any]) -> Any:
    """A function that kernels call."""
    options: dict[str, Any] = PART
    return numba.njit(**options)(function)


def inlined(function: Callable[..., Any]) -> Any:
    """A short function that kernels call."""
    options: dict[str, Any] = INLINED
    return numba.njit(**options)(function)


def spliced(function: Callable[..., Any]) -> Any:
    """A function whose code replaces the call before anything is compiled: for one that is called in one place."""
    return numba.njit(inline="always")(function)


def intrinsic(function: Callable[..., Any]) -> Any:
    """A function that types its arguments and returns what emits its instructions."""
    return numba.extending.intrinsic(function)


def overload(python_function: Any) -> Callable[[Callable[..., Any]], Any]:
    """What compiled code does for a Python function or operator, inlined; see ``numba.extending.overload``."""
    options: Any = INLINED
    return numba.extending.overload(python_function, jit_options=options)
