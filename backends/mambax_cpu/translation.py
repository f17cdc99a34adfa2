"""Kernels, in Python, into modules of LLVM's.

A compiler for all of Python took three quarters of the wait at the first call. Kernels need little of Python, and
all that is known of them is known while walking over their text once (:mod:`mambax_cpu.kernel_bodies`).

Parts that give something back, and those that are to be inlined, are emitted in place of their call; others become
functions of the module, one for each combination of types.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir

from mambax_cpu.arithmetic import value_of
from mambax_cpu.kernel_bodies import Body
from mambax_cpu.kernel_expressions import leaves, mapped
from mambax_cpu.kernel_types import Value
from mambax_cpu.parts import Part, Text, text_of


class Functions:
    """The functions of a module, which become as many as are called.

    Args:
        module: of ``llvmlite.ir``.
    """

    def __init__(self, module: Any) -> None:
        self.module = module
        self._made: dict[Any, Any] = {}

    def place(self, function: Callable[..., Any], builder: Any, given: Sequence[Any]) -> Any:
        """Emit a function's body at the place of a builder; what it gives, None for nothing.

        Raises:
            KernelError: for what kernels cannot do.
        """
        return Body(self.call, text_of(function), builder, given).emit()

    def call(self, part: Part, builder: Any, given: Sequence[Any]) -> Any:
        """Emit the call of a part."""
        text = text_of(part.function)
        if part.inlined or text.returns:
            return Body(self.call, text, builder, given).emit()
        arguments = mapped(value_of, tuple(given))
        key = part.function, mapped(lambda value: value.type, arguments)
        if key not in self._made:
            self._made[key] = self._function(text, arguments)
        builder.call(self._made[key], [value.llvm for value in leaves(arguments)])
        return None

    def _function(self, text: Text, like: tuple[Any, ...]) -> Any:
        """A function for arguments of the types of these."""
        kind = ir.FunctionType(ir.VoidType(), [value.type.llvm for value in leaves(like)])
        function = ir.Function(self.module, kind, self.module.get_unique_name(text.node.name))
        function.linkage = "internal"
        function.attributes.add("nounwind")
        function.attributes.add("noinline")
        arguments = iter(function.args)
        with body_of(function) as builder:
            Body(self.call, text, builder, mapped(lambda v: Value(v.type, next(arguments)), like)).emit()
            if not builder.block.is_terminated:
                builder.ret_void()
        return function


@contextmanager
def body_of(function: Any) -> Iterator[Any]:
    """A builder for what a function does. Its first block is for the places of variables."""
    first, body = (function.append_basic_block() for _ in range(2))
    yield ir.IRBuilder(body)
    ir.IRBuilder(first).branch(body)
