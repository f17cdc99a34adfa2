"""From a kernel in Python to object code, by Numba.

Numba compiles every function that a kernel calls to machine code of its own, and then the kernel with all of them
once more. Here only the kernel is: the functions it calls go into it as they are, which halves the time.

A kernel becomes a function that CPython calls as one of its own (see :mod:`mambax_cpu.native_code`): it takes its
arguments from Python objects, releases the GIL, and refers to nothing but CPython's interface and the C library, so
that it runs in a process that does not know Numba.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils, codegen, config, cpu
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import CPUDispatcher, cpu_target
from numba.extending import make_attribute_wrapper, models, register_model

_EXTERNAL = ("Py", "mem", "sqrt", "__chkstk", "___chkstk")
"""Beginnings of the names that object code may leave to the process: CPython's, the C library's, Windows' own."""


class _Library(codegen.AOTCodeLibrary):
    """Functions on their way to object code, which is made of a kernel alone."""

    whole = False  # whether this is a kernel with all that it calls

    def _optimize_final_module(self) -> None:
        if self.whole:
            super()._optimize_final_module()

    def get_pointer_to_function(self, name: str) -> int:
        """None that Numba could call."""
        return 0


class _Codegen(codegen.JITCPUCodegen):
    """Code for this processor, which is not loaded here."""

    _library_class = _Library

    def _add_module(self, module: Any) -> None:
        """Nothing: see :mod:`mambax_cpu.native_code`."""

    def set_env(self, env_name: str, env: Any) -> None:
        """Nothing: what Numba would put there, kernels do not use."""


class _Context(cpu.CPUContext):
    """Numba's own compilation for the CPU, up to where it would load the code."""

    @classmethod
    def create(cls) -> _Context:
        """A copy of Numba's, whose knowledge of functions it shares."""
        original, context = cpu_target.target_context, object.__new__(cls)
        vars(context).update(vars(original))
        context._internal_codegen = _Codegen("mambax")
        context.cached_internal_func = {}
        return context

    def post_lowering(self, mod: Any, library: Any) -> None:
        """Numba's own adds its allocator, which no kernel needs."""


class _Target:
    """What a dispatcher compiles for."""

    options = cpu.CPUTargetOptions

    def __init__(self) -> None:
        self.typing_context, self.target_context = cpu_target.typing_context, _Context.create()


class _Dispatcher(CPUDispatcher):
    """A function of Numba's that is compiled for the kernels alone."""

    targetdescr = _Target()

    def get_call_template(self, args: Any, kws: Any) -> Any:
        """As Numba's own, but not compiled anew for each literal number among the arguments."""
        return super().get_call_template([types.unliteral(argument) for argument in args], kws)


def compiled_part(function: Callable[..., Any], **options: Any) -> Any:
    """A function that kernels, and the functions they call, may call.

    Args:
        function: Python.
        options: of ``numba.njit``.

    Raises:
        RuntimeError: where Numba has been told not to compile.
    """
    if vars(config).get("DISABLE_JIT"):
        raise RuntimeError("NUMBA_DISABLE_JIT is set, but the CPU kernels cannot run as Python; unset it")
    common = {"nopython": True, "no_cpython_wrapper": True, "no_cfunc_wrapper": True, "error_model": "numpy"}
    return _Dispatcher(function, targetoptions={**common, **options})


# --- arrays as kernels see them ------------------------------------------------------------------------------


class _Address(types.Type):
    def __init__(self) -> None:
        super().__init__(name="mambax_address")


class _Array(types.Type):
    def __init__(self) -> None:
        super().__init__(name="mambax_array")


_address, _array = _Address(), _Array()


@register_model(_Address)
class _AddressModel(models.StructModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, [("data", types.int64)])


@register_model(_Array)
class _ArrayModel(models.StructModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, [("ctypes", _address)])


make_attribute_wrapper(_Address, "data", "data")
make_attribute_wrapper(_Array, "ctypes", "ctypes")  # array.ctypes.data is all there is to it
_KINDS = {"a": _array, "i": types.int64, "d": types.float64}

# --- the function that CPython calls --------------------------------------------------------------------------

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
    """Emits the function around a kernel.

    Args:
        context: of the compilation.
        fndesc: the kernel.
        kinds: of its arguments, as in :mod:`mambax_cpu.compilation`.
        symbol: the name of the function.
    """

    def __init__(self, context: Any, fndesc: Any, kinds: str, symbol: str) -> None:
        self.context, self.fndesc, self.kinds = context, fndesc, kinds
        self.module = context.create_module(symbol)
        kind = ir.FunctionType(_OBJECT, [_OBJECT, _OBJECT.as_pointer(), _LONG])
        self.function = ir.Function(self.module, kind, symbol)
        self.builder = ir.IRBuilder(self.function.append_basic_block("entry"))
        self.end = self.function.append_basic_block("end")
        self.result = cgutils.alloca_once_value(self.builder, ir.Constant(_OBJECT, None))
        self.buffers = [cgutils.alloca_once(self.builder, _BUFFER) for kind in kinds if kind == "a"]

    def call(self, name: str, *args: Any) -> Any:
        """A call of a function of CPython's."""
        return self.builder.call(cgutils.get_or_insert_function(self.module, _C[name], name), args)

    def leave_if(self, failed: Any, message: str | None = None) -> None:
        """Go to the end; with an exception of this message, or else with the one that is set."""
        with self.builder.if_then(failed, likely=False):
            if message is not None:
                text = self.context.insert_const_string(self.module, message)
                self.call("PyErr_SetString", self.function.args[0], text)
            self.builder.branch(self.end)

    def emit(self) -> Any:
        """The module with the function."""
        b, (_, given, count) = self.builder, self.function.args
        for buffer in self.buffers:
            b.store(ir.Constant(_OBJECT, None), self.owner(buffer))
        expected = len(self.kinds)
        wrong = b.icmp_signed("!=", count, ir.Constant(_LONG, expected))
        self.leave_if(wrong, f"{self.fndesc.qualname}: expected {expected} arguments")
        buffers = iter(self.buffers)
        values = []
        for i, kind in enumerate(self.kinds):
            value = b.load(b.gep(given, [ir.Constant(_LONG, i)]))
            values.append(self.array(value, next(buffers)) if kind == "a" else self.number(value, kind))
        thread = self.call("PyEval_SaveThread")
        function = self.context.declare_function(self.module, self.fndesc)
        returned = self.fndesc.restype
        status, value = self.context.call_conv.call_function(b, function, returned, self.fndesc.argtypes, values)
        self.call("PyEval_RestoreThread", thread)
        self.leave_if(status.is_error, f"{self.fndesc.qualname} failed")
        number = ir.Constant(_LONG, 0) if returned == types.none else value
        b.store(self.call("PyLong_FromLongLong", number), self.result)
        b.branch(self.end)
        b.position_at_end(self.end)
        for buffer in self.buffers:
            self.call("PyBuffer_Release", b.bitcast(buffer, _OBJECT))
        b.ret(b.load(self.result))
        return self.module

    def owner(self, buffer: Any) -> Any:
        """Where a Py_buffer says whose it is; null when it is nobody's."""
        fields = self.builder.bitcast(buffer, _OBJECT.as_pointer())
        return self.builder.gep(fields, [ir.Constant(_LONG, 1)])

    def array(self, value: Any, buffer: Any) -> Any:
        """The address of a C-contiguous array."""
        b = self.builder
        failed = self.call("PyObject_GetBuffer", value, b.bitcast(buffer, _OBJECT), ir.Constant(_INT, 0))
        self.leave_if(b.icmp_signed("!=", failed, ir.Constant(_INT, 0)))
        address = cgutils.create_struct_proxy(_address)(self.context, b)
        address.data = b.load(b.bitcast(buffer, _LONG.as_pointer()))
        array = cgutils.create_struct_proxy(_array)(self.context, b)
        array.ctypes = address._getvalue()
        return array._getvalue()

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
        RuntimeError: when it returns something else than a whole number, and when the code would need more than a
            process without Numba has.
    """
    with global_compiler_lock:
        dispatcher = compiled_part(function)
        dispatcher.compile(tuple(_KINDS[kind] for kind in kinds))
        (compiled,) = dispatcher.overloads.values()
        if compiled.fndesc.restype not in (types.none, types.int64):
            found = compiled.fndesc.restype
            raise RuntimeError(f"{function.__qualname__}: a kernel returns a whole number or nothing, not {found}")
        library = compiled.library
        library.add_ir_module(_Wrapper(dispatcher.targetctx, compiled.fndesc, kinds, symbol).emit())
        library.whole = True
        code = library.emit_native_object()
        _check(library.get_llvm_str(), function.__qualname__)
    return code


def _check(text: str, name: str) -> None:
    """Refuse code that refers to what another process may not have: LLVM would end that process.

    Args:
        text: the whole code, as LLVM prints it.
        name: of the kernel.
    """
    lines = text.splitlines()
    body = "\n".join(line for line in lines if not line.startswith("declare "))
    outside = re.findall(r'^declare [^@]*@"?([^\s"(]+)|^@"?([^\s"]+)"? = external', text, re.MULTILINE)
    names = {function or variable for function, variable in outside}
    used = [n for n in names if re.search(rf'@"?{re.escape(n)}"?\b', body)]
    if foreign := sorted(n for n in used if not n.startswith(("llvm.", *_EXTERNAL))):
        raise RuntimeError(f"{name}: kernels may call parts and intrinsics alone, found {', '.join(foreign)}")
