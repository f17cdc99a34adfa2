"""Object code in this process: linked by LLVM, and callable from Python.

A kernel's code is a function in CPython's calling convention for built-in functions, ``METH_FASTCALL``, which
:mod:`mambax_cpu.code_generation` wraps around it, so that a call costs what one of a built-in function does.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any

_FASTCALL = 0x0080  # METH_FASTCALL in CPython's methodobject.h

_lock = threading.Lock()
_loaded: dict[str, Callable[..., Any]] = {}
_kept: list[Any] = []  # what CPython knows by its address alone


class _MethodDefinition(ctypes.Structure):
    """PyMethodDef."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("method", ctypes.c_void_p),
        ("flags", ctypes.c_int),
        ("doc", ctypes.c_char_p),
    )


@cache
def processor() -> str:
    """What code is compiled for: the system, the name of the processor, and what it can do."""
    import llvmlite.binding as llvm

    features = llvm.get_host_cpu_features().flatten()
    return f"{llvm.get_process_triple()} {llvm.get_host_cpu_name()} {features}"


@cache
def _target() -> Any:
    """What LLVM knows of this kind of processor."""
    import llvmlite.binding as llvm

    with suppress(RuntimeError):  # newer releases do this by themselves and refuse
        llvm.initialize()
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_default_triple()


def target_machine() -> Any:
    """LLVM's description of this very processor, for code that :func:`load` is given."""
    import llvmlite.binding as llvm

    return _target().create_target_machine(
        cpu=llvm.get_host_cpu_name(),
        features=llvm.get_host_cpu_features().flatten(),
        opt=3,
        reloc="static" if _target().name.startswith("x86") else "default",
        codemodel="jitdefault",
        jit=True,
    )


@cache
def _engine() -> Any:
    """LLVM's linker of code into this process."""
    import llvmlite.binding as llvm

    machine = _target().create_target_machine()
    return llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)


def load(symbol: str, code: bytes) -> Callable[..., Any]:
    """The function of this name in object code, for Python to call.

    The code stays in memory for as long as the process lives; the same name is the same function.
    """
    import llvmlite.binding as llvm

    with _lock:
        if symbol not in _loaded:
            engine = _engine()
            engine.add_object_file(llvm.ObjectFileRef.from_data(code))
            engine.finalize_object()
            _loaded[symbol] = _python_function(symbol, engine.get_function_address(symbol))
        return _loaded[symbol]


def _python_function(name: str, address: int) -> Callable[..., Any]:
    definition = _MethodDefinition(name.encode(), address, _FASTCALL, None)
    _kept.append(definition)
    create = ctypes.pythonapi.PyCFunction_NewEx
    create.restype, create.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.py_object, ctypes.c_void_p]
    return create(ctypes.addressof(definition), RuntimeError, None)  # what it is bound to is what it raises
