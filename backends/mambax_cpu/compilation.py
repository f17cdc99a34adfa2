"""How the kernels of this package are written, compiled and called.

A kernel is a Python function with :func:`kernel` above it. What runs is machine code: made at the first call
ever (:mod:`mambax_cpu.translation`, :mod:`mambax_cpu.code_generation`), kept on disk by
:mod:`mambax_cpu.object_files`, and from then on loaded. So that nothing is imported which only compiling needs, the
files that call kernels do not import those that define them, but name them::

    kernels = KernelFile("mambax_cpu.scan_forward")
    kernels.forward(table, length, channels, states, use_softplus, first, last, scratch)

Kernels take whole numbers, floats and C-contiguous arrays, of which they see the address, ``array.ctypes.data``.
They return a whole number, which is 0 where the function returns nothing, and run without the GIL.
"""

from __future__ import annotations

import importlib
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from mambax_cpu import native_code, object_files
from mambax_cpu.parts import Intrinsic, Part, Selection

_SILENCE = 3.0
"""Seconds that compiling may take in a process before it says what it is doing."""

_log = logging.getLogger("mambax")
_lock = threading.RLock()
_spent = 0.0  # seconds of compiling in this process


class KernelFile:
    """The kernels that a module defines, as attributes. The module is imported when one of them must be compiled.

    Args:
        module: its full name.
    """

    def __init__(self, module: str) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Kernel:
        if name.startswith("__"):
            raise AttributeError(name)
        made = Kernel(self._module, name, owner=self)
        setattr(self, name, made)
        return made


class Kernel:
    """A kernel, callable with positional arguments. Its machine code is looked for at the first call.

    Args:
        module, name: where the function is.
        function: the function, where its module is imported already.
        owner: of which the kernel is an attribute; from the first call on the compiled function takes its place,
            which saves the calls after it the way through this object.
    """

    def __init__(
        self, module: str, name: str, function: Callable[..., Any] | None = None, owner: KernelFile | None = None
    ) -> None:
        self.module, self.name, self.function, self.owner = module, name, function, owner
        self._call: Callable[..., Any] = self._first_call

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def _first_call(self, *args: Any) -> Any:
        kinds = "".join(map(_kind, args))
        with _lock:
            if self._call == self._first_call:
                self._call = native_code.load(*self._object_code(kinds))
                if self.owner is not None:
                    setattr(self.owner, self.name, self._call)
        return self._call(*args)

    def _object_code(self, kinds: str) -> tuple[str, bytes]:
        """The symbol and the object code of this kernel for arguments of these kinds."""
        key = object_files.key(self.module, self.name, kinds)
        symbol = f"mambax_{key[:32]}"
        code = object_files.read(key)
        if code is None:
            code = _compiled(self._python(), kinds, symbol)
            if object_files.unchanged(self.module):  # else this is not the code of what is on disk now
                object_files.write(key, code)
        return symbol, code

    def _python(self) -> Callable[..., Any]:
        """The function, for which its module is imported."""
        if self.function is None:
            found = getattr(importlib.import_module(self.module), self.name, None)
            if not isinstance(found, Kernel) or found.function is None:
                raise AttributeError(f"{self.module} has no kernel {self.name!r}")
            self.function = found.function
        return self.function


def _kind(argument: Any) -> str:
    """One letter: a for an array, i for a whole number, d for a float."""
    if isinstance(argument, np.ndarray):
        return "a"
    if isinstance(argument, (int, np.integer)):
        return "i"
    if isinstance(argument, (float, np.floating)):
        return "d"
    raise TypeError(f"a kernel takes whole numbers, floats and arrays, found {type(argument).__name__}")


def _compiled(function: Callable[..., Any], kinds: str, symbol: str) -> bytes:
    """The object code of a function, and a line for the user when compiling takes long."""
    global _spent
    from mambax_cpu.code_generation import object_code

    notice = threading.Timer(
        max(0.0, _SILENCE - _spent),
        _log.warning,
        ("mambax: compiling the CPU kernels for this machine, which is done once",),
    )
    notice.daemon = True
    start = time.perf_counter()
    if _spent < _SILENCE:
        notice.start()
    try:
        return object_code(function, kinds, symbol)
    finally:
        notice.cancel()
        _spent += time.perf_counter() - start


# --- what files of kernels are written with -------------------------------------------------------------------


def kernel(function: Callable[..., Any]) -> Any:
    """A function that Python calls: see :class:`Kernel`."""
    object_files.sources(function.__module__)  # as they are now, when they are imported
    return Kernel(function.__module__, function.__name__, function)


def part(function: Callable[..., Any]) -> Any:
    """A function that kernels call. One that gives something back is inlined, as :func:`inlined` is."""
    return Part(function)


def inlined(function: Callable[..., Any]) -> Any:
    """A short function that kernels call, whose instructions take the place of the call."""
    return Part(function, inlined=True)


def spliced(function: Callable[..., Any]) -> Any:
    """As :func:`inlined`, for one that is called in one place, or is given functions."""
    return Part(function, inlined=True)


def selection(function: Callable[..., Any]) -> Any:
    """A function that kernels call as the part that it returns, of the types of their arguments."""
    return Selection(function)


def intrinsic(function: Callable[..., Any]) -> Any:
    """A function that types its arguments and returns what emits its instructions: see :class:`Intrinsic`."""
    return Intrinsic(function)
