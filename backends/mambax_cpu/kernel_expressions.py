"""The expressions of kernels: what they give, and the instructions that find it.

An expression gives a :class:`mambax_cpu.kernel_types.Value`; one of Python's numbers where it is known while
compiling; a tuple of these; or what a global name stands for: a function, a type, a module.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import numpy as np
from llvmlite import ir

from mambax_cpu import arithmetic
from mambax_cpu.arithmetic import NAMED, cast, is_constant, truth, unified, value_of
from mambax_cpu.kernel_types import KernelError, Signature, Type, Value, array, boolean, float32, int64, literal
from mambax_cpu.parts import Context, Intrinsic, Part, Selection

_CONTEXT = Context()


class Slot:
    """Where a variable is kept."""

    def __init__(self, kind: Type, place: Any) -> None:
        self.type, self.place = kind, place


def leaves(given: Any) -> Iterator[Any]:
    """The values in a tuple of tuples."""
    if isinstance(given, tuple):
        for inner in given:
            yield from leaves(inner)
    else:
        yield given


def mapped(function: Callable[[Any], Any], given: Any) -> Any:
    """A tuple of tuples, or one value, of what a function makes of each value."""
    if not isinstance(given, tuple):
        return function(given)
    inner = [mapped(function, value) for value in given]
    return type(given)(*inner) if hasattr(given, "_fields") else tuple(inner)


def loaded(builder: Any, given: Any) -> Any:
    """What slots hold; anything else as it is."""
    return mapped(lambda g: Value(g.type, builder.load(g.place)) if isinstance(g, Slot) else g, given)


class Expressions:
    """Emits expressions at the place of a builder.

    Args:
        call: emits the call of a part: takes it, the builder and the arguments.
        names: what names stand for that are no variables.
        variables: the slots of variables, or what else a name stands for; they may become more.
        builder: of ``llvmlite.ir``.
    """

    def __init__(
        self, call: Callable[[Part, Any, Sequence[Any]], Any], names: dict[str, Any], variables: dict[str, Any],
        builder: Any,
    ) -> None:  # fmt: skip
        self.call_part, self.names, self.variables, self.builder = call, names, variables, builder
        self._emit: dict[type[ast.expr], Callable[[Any], Any]] = {
            ast.Constant: self._constant, ast.Name: self._name, ast.Attribute: self._attribute,
            ast.Tuple: self._tuple, ast.Subscript: self._subscript, ast.Call: self._call, ast.BinOp: self._binary,
            ast.UnaryOp: self._unary, ast.Compare: self._compare, ast.BoolOp: self._logic, ast.IfExp: self._choice,
        }  # fmt: skip

    def find(self, node: Any) -> Any:
        """What an expression gives."""
        emit = self._emit.get(type(node))
        if emit is None:
            raise KernelError(f"{type(node).__name__} is not known in kernels, found {ast.unparse(node)[:60]!r}")
        return emit(node)

    def condition(self, node: ast.expr) -> Any:
        """Whether an expression is true: Python's answer where it is known, else a boolean value."""
        if isinstance(node, ast.BoolOp):
            return self._short_circuit(node)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return arithmetic.negated(self.builder, self.condition(node.operand))
        return truth(self.builder, self.find(node))

    def _constant(self, node: ast.Constant) -> Any:
        if not is_constant(node.value):
            raise KernelError(f"expected a number, found {node.value!r}")
        return node.value

    def _name(self, node: ast.Name) -> Any:
        if node.id in self.variables:
            return loaded(self.builder, self.variables[node.id])
        if node.id not in self.names:
            raise KernelError(f"{node.id}: has no value here; give it one before")
        return _as_number(self.names[node.id])

    def _attribute(self, node: ast.Attribute) -> Any:
        base = self.find(node.value)
        if isinstance(base, Value) and base.type is array and node.attr == "ctypes":
            return base
        if isinstance(base, Value) and base.type is array and node.attr == "data":
            return Value(int64, base.llvm)
        if isinstance(base, ModuleType) or node.attr in getattr(base, "_fields", ()):
            return _as_number(getattr(base, node.attr))
        raise KernelError(f"{ast.unparse(node)!r} is not known in kernels; of an array there is array.ctypes.data")

    def _tuple(self, node: ast.Tuple) -> tuple[Any, ...]:
        return tuple(self.find(inner) for inner in node.elts)

    def _subscript(self, node: ast.Subscript) -> Value:
        base = self.find(node.value)
        return arithmetic.loaded(self.builder, base, self.find(node.slice))

    def _binary(self, node: ast.BinOp) -> Any:
        left = self.find(node.left)
        return arithmetic.binary(self.builder, node.op, left, self.find(node.right))

    def _unary(self, node: ast.UnaryOp) -> Any:
        if isinstance(node.op, ast.Not):
            return self.condition(node)
        return arithmetic.unary(self.builder, node.op, self.find(node.operand))

    def _compare(self, node: ast.Compare) -> Any:
        if len(node.ops) != 1:
            raise KernelError(f"one comparison at a time, found {ast.unparse(node)!r}; join them with `and`")
        left = self.find(node.left)
        return arithmetic.compared(self.builder, node.ops[0], left, self.find(node.comparators[0]))

    def _logic(self, node: ast.BoolOp) -> Any:
        return self._short_circuit(node, only_booleans=True)

    def _short_circuit(self, node: ast.BoolOp, *, only_booleans: bool = False) -> Any:
        """`and` and `or`: what decides is not followed by what comes after it."""
        deciding = isinstance(node.op, ast.Or)
        decided: list[Any] = []  # blocks that know the answer
        end = None
        for number, inner in enumerate(node.values):
            found = self.find(inner) if only_booleans else self.condition(inner)
            if only_booleans and not isinstance(found, bool) and value_of(found).type is not boolean:
                raise KernelError(f"`and` and `or` of numbers: compare them with 0, found {ast.unparse(node)!r}")
            last = number == len(node.values) - 1
            if isinstance(found, bool) and end is None and (found is deciding or last):
                return found
            if isinstance(found, bool) and found is not deciding and not last:
                continue
            if last and end is None:
                return found
            value = value_of(found).llvm
            if last:
                decided.append((self.builder.block, value))
                self.builder.branch(end)
                break
            end = self.builder.append_basic_block() if end is None else end
            further = self.builder.append_basic_block()
            decided.append((self.builder.block, ir.Constant(boolean.llvm, int(deciding))))
            self.builder.cbranch(value, *((end, further) if deciding else (further, end)))
            self.builder.position_at_end(further)
        self.builder.position_at_end(end)
        answer = self.builder.phi(boolean.llvm)
        for block, value in decided:
            answer.add_incoming(value, block)
        return Value(boolean, answer)

    def _choice(self, node: ast.IfExp) -> Any:
        """One value if a condition holds, else another; only that one is found."""
        known = self.condition(node.test)
        if isinstance(known, bool):
            return self.find(node.body if known else node.orelse)
        blocks = [self.builder.append_basic_block() for _ in range(2)]
        after = self.builder.append_basic_block()
        self.builder.cbranch(known.llvm, *blocks)
        found, ends = [], []
        for block, inner in zip(blocks, (node.body, node.orelse), strict=True):
            self.builder.position_at_end(block)
            found.append(self.find(inner))
            ends.append(self.builder.block)
        result = unified(*(value_of(value).type for value in found))
        values = []
        for value, block in zip(found, ends, strict=True):
            self.builder.position_at_end(block)
            values.append(cast(self.builder, value, result))
            self.builder.branch(after)
        self.builder.position_at_end(after)
        answer = self.builder.phi(result.llvm)
        for value, block in zip(values, ends, strict=True):
            answer.add_incoming(value, block)
        return Value(result, answer)

    # --- calls ------------------------------------------------------------------------------------------------

    def _call(self, node: ast.Call) -> Any:
        called = self.find(node.func)
        if node.keywords or any(isinstance(argument, ast.Starred) for argument in node.args):
            raise KernelError(f"arguments are given one by one and without names, found {ast.unparse(node)[:60]!r}")
        given = [self.find(argument) for argument in node.args]
        if isinstance(called, Selection):
            called = called.choose(*(mapped(lambda value: value_of(value).type, argument) for argument in given))
        if isinstance(called, Part):
            return self.call_part(called, self.builder, given)
        if isinstance(called, Intrinsic):
            return self._intrinsic(called, given)
        if isinstance(called, type) and hasattr(called, "_fields") and issubclass(called, tuple):
            return called(*given)
        emit = NAMED.get(called) if callable(called) else None
        if emit is None:
            raise KernelError(f"kernels may call parts and intrinsics alone, found {ast.unparse(node.func)}")
        return emit(self.builder, *given)

    def _intrinsic(self, called: Intrinsic, given: Sequence[Any]) -> Any:
        kinds = [_literal(argument) for argument in given]
        signature, generate = called.define(_CONTEXT, *kinds)
        if not isinstance(signature, Signature):
            name = called.define.__name__
            raise KernelError(
                f"{name}: expected a signature of types of mambax_cpu.kernel_types, found {signature}"
            )
        if len(signature.parameters) != len(given):
            raise KernelError(f"{called.define.__name__}: expected {len(signature.parameters)} arguments")
        values = [cast(self.builder, *pair) for pair in zip(given, signature.parameters, strict=True)]
        result = generate(_CONTEXT, self.builder, signature, values)
        return None if result is None else Value(signature.result, result)


def _literal(given: Any) -> Type:
    whole = isinstance(given, int) and not isinstance(given, bool)
    return literal(given) if whole else value_of(given).type


def _as_number(found: Any) -> Any:
    """NumPy's numbers as those of Python's that they are, and anything else as it is."""
    if isinstance(found, np.floating) and found.dtype == np.float32:
        return Value(float32, ir.Constant(float32.llvm, float(found)))
    return found.item() if isinstance(found, np.generic) else found
