"""Numbers, comparisons and lanes in kernels: what Python's operators emit.

Whole numbers are int64 and wrap around; ``//`` and ``%`` round down as Python's do, and give 0 for a division by 0.
Two numbers become the narrowest of int64, float32 and float64 that holds both as NumPy sees it: int64 with float32
is float64. Python's own numbers are computed with here, while compiling.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir

from mambax_cpu.kernel_types import (
    Float,
    IntegerLiteral,
    KernelError,
    Pointer,
    Type,
    Value,
    Vector,
    Whole,
    boolean,
    declared,
    float32,
    float64,
    int64,
)

_PYTHON: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.LShift: operator.lshift,
    ast.RShift: operator.rshift, ast.BitAnd: operator.and_, ast.BitOr: operator.or_, ast.BitXor: operator.xor,
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le,
    ast.Gt: operator.gt, ast.GtE: operator.ge, ast.USub: operator.neg, ast.Invert: operator.invert,
}  # fmt: skip
_FLOATS = {ast.Add: "fadd", ast.Sub: "fsub", ast.Mult: "fmul", ast.Div: "fdiv"}
_WHOLE = {
    ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.LShift: "shl", ast.RShift: "ashr", ast.BitAnd: "and_",
    ast.BitOr: "or_", ast.BitXor: "xor",
}  # fmt: skip
_COMPARED = {ast.Eq: "==", ast.NotEq: "!=", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">="}
_SIGN = {ast.USub: "-", ast.Invert: "~"}


def is_constant(given: Any) -> bool:
    """Whether this is one of Python's numbers, known while compiling."""
    return isinstance(given, (bool, int, float))


def value_of(given: Any) -> Value:
    """A value as it is, one of Python's numbers as a value.

    Raises:
        KernelError: for anything else.
    """
    if isinstance(given, Value):
        return given
    if isinstance(given, bool):
        return Value(boolean, ir.Constant(boolean.llvm, int(given)))
    if isinstance(given, int):
        return Value(int64, ir.Constant(int64.llvm, given))
    if isinstance(given, float):
        return Value(float64, ir.Constant(float64.llvm, given))
    raise KernelError(f"expected a number, an address or lanes, found {given!r}")


def cast(builder: Any, given: Any, to: Type) -> Any:
    """What LLVM knows a value as, made one of another type where Python's arithmetic does so unasked."""
    found = value_of(given)
    kind, value = found.type, found.llvm
    if kind is to or isinstance(to, IntegerLiteral):
        return value
    if isinstance(to, Float) and is_constant(given):
        return ir.Constant(to.llvm, float(given))
    if isinstance(to, Float):
        if kind is boolean:
            return builder.uitofp(value, to.llvm)
        if isinstance(kind, Whole):
            return builder.sitofp(value, to.llvm)
        if isinstance(kind, Float):
            return builder.fpext(value, to.llvm) if to is float64 else builder.fptrunc(value, to.llvm)
    if isinstance(to, Whole) and kind is boolean:
        return builder.zext(value, to.llvm)
    if isinstance(to, Whole) and kind is int64:
        return builder.trunc(value, to.llvm)
    raise KernelError(f"expected {to}, found {kind}")


def loaded(builder: Any, base: Value, index: Any) -> Value:
    """base[index]."""
    element = _element(base)
    value = builder.load(builder.gep(base.llvm, [cast(builder, index, int64)]))
    if isinstance(element, Whole) and element is not int64:
        extend = builder.sext if element.signed else builder.zext
        return Value(int64, extend(value, int64.llvm))
    return Value(element, value)


def stored(builder: Any, base: Value, index: Any, given: Any) -> None:
    """base[index] = given."""
    element = _element(base)
    builder.store(cast(builder, given, element), builder.gep(base.llvm, [cast(builder, index, int64)]))


def _element(base: Any) -> Type:
    if not isinstance(base, Value) or not isinstance(base.type, Pointer):
        raise KernelError(f"expected an address before [...], found {value_of(base).type}")
    return base.type.dtype


def unified(a: Type, b: Type) -> Type:
    """The type of what comes of two: of their sum, or of a choice between them."""
    if a is b:
        return a
    kinds = {a, b}
    if kinds <= {boolean, int64}:
        return int64
    if kinds <= {boolean, int64, float32, float64}:
        return float32 if kinds == {boolean, float32} else float64
    raise KernelError(f"expected two values of one type, found {a} and {b}")


def binary(builder: Any, operation: ast.AST, left: Any, right: Any) -> Any:
    """left <operation> right."""
    kind = type(operation)
    if is_constant(left) and is_constant(right) and kind in _PYTHON:
        return _PYTHON[kind](left, right)
    result = unified(value_of(left).type, value_of(right).type)
    if result is boolean and kind not in (ast.BitAnd, ast.BitOr, ast.BitXor):
        result = int64
    if kind is ast.Div and result is int64:
        result = float64
    a, b = cast(builder, left, result), cast(builder, right, result)
    if isinstance(result, (Float, Vector)) and kind in _FLOATS:
        return Value(result, getattr(builder, _FLOATS[kind])(a, b))
    if result in (int64, boolean) and kind in _WHOLE:
        return Value(result, getattr(builder, _WHOLE[kind])(a, b))
    if result is int64 and kind in (ast.FloorDiv, ast.Mod):
        divide = _quotient if kind is ast.FloorDiv else _remainder
        return Value(int64, divide(builder, a, b, right))
    raise KernelError(f"{kind.__name__} of {result}: not known in kernels")


def _power_of_two(number: Any) -> bool:
    return isinstance(number, int) and number > 0 and number & (number - 1) == 0


def _number(value: int) -> Any:
    return ir.Constant(int64.llvm, value)


def _quotient(builder: Any, a: Any, b: Any, constant: Any) -> Any:
    """a // b."""
    if _power_of_two(constant):
        return builder.ashr(a, _number(constant.bit_length() - 1))
    zero, divisor, _, below = _division(builder, a, b)
    quotient = builder.sub(builder.sdiv(a, divisor), builder.zext(below, int64.llvm))
    return builder.select(zero, _number(0), quotient)


def _remainder(builder: Any, a: Any, b: Any, constant: Any) -> Any:
    """a % b."""
    if _power_of_two(constant):
        return builder.and_(a, _number(constant - 1))
    _, divisor, rest, below = _division(builder, a, b)
    return builder.add(rest, builder.select(below, divisor, _number(0)))  # by 1 in place of 0 there is no rest


def _division(builder: Any, a: Any, b: Any) -> tuple[Any, Any, Any, Any]:
    """Whether b is 0; b, or 1 in its place; the rest of a / b towards zero; whether that lies above a // b."""
    zero = builder.icmp_signed("==", b, _number(0))
    divisor = builder.select(zero, _number(1), b)
    rest = builder.srem(a, divisor)
    differ = builder.icmp_signed("<", builder.xor(rest, divisor), _number(0))
    return zero, divisor, rest, builder.and_(builder.icmp_signed("!=", rest, _number(0)), differ)


def compared(builder: Any, operation: ast.AST, left: Any, right: Any) -> Any:
    """left <operation> right."""
    kind = type(operation)
    if kind not in _COMPARED:
        raise KernelError(f"{kind.__name__}: not known in kernels")
    if is_constant(left) and is_constant(right):
        return _PYTHON[kind](left, right)
    common = unified(value_of(left).type, value_of(right).type)
    a, b = cast(builder, left, common), cast(builder, right, common)
    if isinstance(common, Float):
        compare = builder.fcmp_unordered if kind is ast.NotEq else builder.fcmp_ordered
    elif common is int64:
        compare = builder.icmp_signed
    elif common is boolean or isinstance(common, Pointer):
        compare = builder.icmp_unsigned
    else:
        raise KernelError(f"a comparison of {common}: not known in kernels")
    return Value(boolean, compare(_COMPARED[kind], a, b))


def truth(builder: Any, given: Any) -> Any:
    """Whether a number is not zero: Python's answer where it is known, else a boolean value."""
    if is_constant(given):
        return bool(given)
    found = value_of(given)
    return found if found.type is boolean else compared(builder, ast.NotEq(), found, 0)


def negated(builder: Any, given: Any) -> Any:
    """not given."""
    found = truth(builder, given)
    return not found if isinstance(found, bool) else Value(boolean, builder.not_(found.llvm))


def unary(builder: Any, operation: ast.AST, given: Any) -> Any:
    """<operation> given, of a number."""
    kind = type(operation)
    if kind in _SIGN and is_constant(given):
        return _PYTHON[kind](given)
    found = value_of(given)
    if kind is ast.USub and isinstance(found.type, Float):
        return Value(found.type, builder.fneg(found.llvm))
    if kind in _SIGN and found.type is int64:
        return Value(int64, (builder.neg if kind is ast.USub else builder.not_)(found.llvm))
    raise KernelError(f"{kind.__name__} of {found.type}: not known in kernels")


def extreme(builder: Any, function: Any, given: list[Any]) -> Any:
    """min or max of whole numbers."""
    if all(map(is_constant, given)):
        return function(given)
    result = given[0]
    for other in given[1:]:
        a, b = cast(builder, result, int64), cast(builder, other, int64)
        first = builder.icmp_signed("<" if function is min else ">", a, b)
        result = Value(int64, builder.select(first, a, b))
    return result


def converted(builder: Any, to: Type, given: Any) -> Value:
    """A number as a float of this type."""
    return Value(to, cast(builder, given, to))


def square_root(builder: Any, given: Any) -> Value:
    """The square root of a float in its precision; of a whole number in float64."""
    found = value_of(given)
    kind = found.type if isinstance(found.type, Float) else float64
    name = "llvm.sqrt.f32" if kind is float32 else "llvm.sqrt.f64"
    function = declared(builder.module, name, ir.FunctionType(kind.llvm, [kind.llvm]))
    return Value(kind, builder.call(function, [cast(builder, given, kind)]))


NAMED: dict[Any, Callable[..., Any]] = {
    min: lambda builder, *given: extreme(builder, min, list(given)),
    max: lambda builder, *given: extreme(builder, max, list(given)),
    float: lambda builder, given: converted(builder, float64, given),
    np.float32: lambda builder, given: converted(builder, float32, given),
    np.float64: lambda builder, given: converted(builder, float64, given),
    np.sqrt: square_root,
}
"""What kernels may call of Python's and NumPy's functions."""
