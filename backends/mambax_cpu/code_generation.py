"""From a kernel in Python to object code, by LLVM.

A kernel becomes a function that CPython calls as one of its own (see :mod:`mambax_cpu.native_code`): it takes its
arguments from Python objects, releases the GIL, and refers to nothing but CPython's interface and the C library.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir

from mambax_cpu import native_code
from mambax_cpu.arithmetic import value_of
from mambax_cpu.kernel_types import Type, Value, array, declared, float64, int64
from mambax_cpu.translation import Functions, body_of

_EXTERNAL = ("Py", "mem", "sqrt", "__chkstk", "___chkstk")
"""Beginnings of the names that object code may leave to the process: CPython's, the C library's, Windows' own."""

_KINDS: dict[str, Type] = {"a": array, "i": int64, "d": float64}
_BYTE, _INT, _LONG = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_OBJECT = _BYTE.as_pointer()
_BUFFER = ir.ArrayType(_LONG, 16)  # a Py_buffer with room to spare; it begins with the address and the owner
_C = {
    "PyLong_AsLongLong": ir.FunctionType(_LONG, [_OBJECT]),
    "PyFloat_AsDouble": ir.FunctionType(ir.DoubleType(), [_OBJECT]),
    "PyObject_GetBuffer": ir.FunctionType(_INT, [_OBJECT, _OBJECT, _INT]),
    "PyBuffer_Release": ir.FunctionType(ir.VoidType(), [_OBJECT]),
    "PyErr_Occurred": ir.FunctionType(_OBJECT, []),
    "PyErr_SetString": ir.FunctionType(ir.VoidType(), [_OBJECT, _OBJECT]),
    "PyEval_SaveThread": ir.FunctionType(_OBJECT, []),
    "PyEval_RestoreThread": ir.FunctionType(ir.VoidType(), [_OBJECT]),
    "PyLong_FromLongLong": ir.FunctionType(_OBJECT, [_LONG]),
}


class _Wrapper:
    """Emits a kernel as a function of CPython's.

    Args:
        module: of ``llvmlite.ir``.
        kernel: Python.
        kinds: of its arguments, as in :mod:`mambax_cpu.compilation`.
        symbol: the name of the function.
    """

    def __init__(self, module: Any, kernel: Callable[..., Any], kinds: str, symbol: str) -> None:
        self.module, self.kernel, self.kinds = module, kernel, kinds
        kind = ir.FunctionType(_OBJECT, [_OBJECT, _OBJECT.as_pointer(), _LONG])
        self.function = ir.Function(module, kind, symbol)
        self.function.attributes.add("nounwind")
        with body_of(self.function) as self.builder:
            self.end = self.function.append_basic_block()
            self._emit()

    def call(self, name: str, *args: Any) -> Any:
        """A call of a function of CPython's."""
        return self.builder.call(declared(self.module, name, _C[name]), args)

    def leave_if(self, failed: Any, message: str | None = None) -> None:
        """Go to the end; with an exception of this message, or else with the one that is set."""
        with self.builder.if_then(failed, likely=False):
            if message is not None:
                self.call("PyErr_SetString", self.function.args[0], self.text(message))
            self.builder.branch(self.end)

    def text(self, message: str) -> Any:
        """The address of a constant string."""
        data = bytearray(message.encode() + b"\0")
        kind = ir.ArrayType(_BYTE, len(data))
        constant: Any = ir.GlobalVariable(self.module, kind, self.module.get_unique_name("text"))
        constant.linkage, constant.global_constant = "internal", True
        constant.initializer = ir.Constant(kind, data)
        return self.builder.bitcast(constant, _OBJECT)

    def _emit(self) -> None:
        b, (_, given, count), name = self.builder, self.function.args, self.kernel.__qualname__
        with b.goto_entry_block():
            result = b.alloca(_OBJECT)
            buffers = [b.alloca(_BUFFER) for kind in self.kinds if kind == "a"]
        b.store(ir.Constant(_OBJECT, None), result)
        for buffer in buffers:
            b.store(ir.Constant(_OBJECT, None), self.owner(buffer))
        wrong = b.icmp_signed("!=", count, ir.Constant(_LONG, len(self.kinds)))
        self.leave_if(wrong, f"{name}: expected {len(self.kinds)} arguments")
        waiting = iter(buffers)
        values = []
        for i, kind in enumerate(self.kinds):
            value = b.load(b.gep(given, [ir.Constant(_LONG, i)]))
            found = self.array(value, next(waiting)) if kind == "a" else self.number(value, kind)
            values.append(Value(_KINDS[kind], found))
        thread = self.call("PyEval_SaveThread")
        returned = self.returned(values)
        self.call("PyEval_RestoreThread", thread)
        b.store(self.call("PyLong_FromLongLong", returned), result)
        b.branch(self.end)
        b.position_at_end(self.end)
        for buffer in buffers:
            self.call("PyBuffer_Release", b.bitcast(buffer, _OBJECT))
        b.ret(b.load(result))

    def returned(self, values: Sequence[Value]) -> Any:
        """What the kernel returns, whose instructions are emitted here."""
        found = Functions(self.module).place(self.kernel, self.builder, values)
        if found is None:
            return ir.Constant(_LONG, 0)
        if isinstance(found, tuple) or value_of(found).type is not int64:
            kind = "a tuple" if isinstance(found, tuple) else value_of(found).type
            name = self.kernel.__qualname__
            raise RuntimeError(f"{name}: a kernel returns a whole number or nothing, not {kind}")
        return value_of(found).llvm

    def owner(self, buffer: Any) -> Any:
        """Where a Py_buffer says whose it is; null when it is nobody's."""
        fields = self.builder.bitcast(buffer, _OBJECT.as_pointer())
        return self.builder.gep(fields, [ir.Constant(_LONG, 1)])

    def array(self, value: Any, buffer: Any) -> Any:
        """The address of a C-contiguous array."""
        b = self.builder
        failed = self.call("PyObject_GetBuffer", value, b.bitcast(buffer, _OBJECT), ir.Constant(_INT, 0))
        self.leave_if(b.icmp_signed("!=", failed, ir.Constant(_INT, 0)))
        return b.load(b.bitcast(buffer, _LONG.as_pointer()))

    def number(self, value: Any, kind: str) -> Any:
        """A whole number or a float."""
        b = self.builder
        if kind == "i":
            found = self.call("PyLong_AsLongLong", value)
            suspect = b.icmp_signed("==", found, ir.Constant(_LONG, -1))
        else:
            found = self.call("PyFloat_AsDouble", value)
            suspect = b.fcmp_ordered("==", found, ir.Constant(ir.DoubleType(), -1.0))
        with b.if_then(suspect, likely=False):
            error = self.call("PyErr_Occurred")
            self.leave_if(b.icmp_unsigned("!=", b.ptrtoint(error, _LONG), ir.Constant(_LONG, 0)))
        return found


def object_code(function: Callable[..., Any], kinds: str, symbol: str) -> bytes:
    """The object code of a kernel.

    Args:
        function: Python.
        kinds: of its arguments, as in :mod:`mambax_cpu.compilation`.
        symbol: the name of the function in the code that CPython calls.

    Raises:
        KernelError: for what kernels cannot do.
        RuntimeError: when it returns something else than a whole number, and when the code would need more than a
            process has.
    """
    module = ir.Module(symbol)
    module.triple = llvm.get_process_triple()
    _Wrapper(module, function, kinds, symbol)
    machine = native_code.target_machine()
    parsed = llvm.parse_assembly(str(module))
    parsed.data_layout = str(machine.target_data)
    parsed.verify()
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    options.loop_vectorization, options.slp_vectorization = True, False
    passes = llvm.create_pass_builder(machine, options)
    passes.getModulePassManager().run(parsed, passes)
    _check(parsed, function.__qualname__)
    return machine.emit_object(parsed)


def _check(module: Any, name: str) -> None:
    """Refuse code that refers to what a process may not have: LLVM would end that process."""
    outside = {item.name for item in (*module.functions, *module.global_variables) if item.is_declaration}
    if foreign := sorted(found for found in outside if not found.startswith(("llvm.", *_EXTERNAL))):
        raise RuntimeError(f"{name}: kernels may call parts and intrinsics alone, found {', '.join(foreign)}")
