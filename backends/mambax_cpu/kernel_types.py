"""The types of what kernels compute with, and how LLVM sees them.

A type that is called makes the signature of an intrinsic: ``float32(floats, int64)`` takes an address of float32
values and a whole number, and gives a float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from llvmlite import ir

from mambax_cpu.tiles import WIDTH


class KernelError(TypeError):
    """What the text of a kernel asks for and compiling it does not know.

    Args:
        problem: what was expected, what was found.
        where: the function and the line, once they are known.
    """

    def __init__(self, problem: str, where: str = "") -> None:
        super().__init__(f"{where}: {problem}" if where else problem)
        self.where = where


class Signature(NamedTuple):
    """The types of an intrinsic."""

    result: Type
    parameters: tuple[Type, ...]


@dataclass(frozen=True, eq=False)
class Type:
    """The type of a value; each is one object.

    Attributes:
        name: for messages.
        llvm: LLVM's type.
    """

    name: str
    llvm: Any

    def __call__(self, *parameters: Type) -> Signature:
        """The signature with this result."""
        return Signature(self, parameters)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, eq=False)
class Whole(Type):
    """A type of whole numbers. In expressions all are int64; the narrow ones are of what lies in memory."""

    signed: bool = True


@dataclass(frozen=True, eq=False)
class Float(Type):
    """A type of floating-point numbers."""


@dataclass(frozen=True, eq=False)
class Vector(Type):
    """A type of float32 lanes."""


@dataclass(frozen=True, eq=False)
class Pointer(Type):
    """The type of addresses of elements of a type."""

    dtype: Type


@dataclass(frozen=True, eq=False)
class IntegerLiteral(Type):
    """The type of a whole number that stands in the text of a kernel."""

    literal_value: int


_BYTE = ir.IntType(8)
void = Type("nothing", ir.VoidType())
boolean = Type("bool", ir.IntType(1))
array = Type("array", ir.IntType(64))
"""A C-contiguous array, of which a kernel has the address, ``array.ctypes.data``."""
int64 = Whole("int64", ir.IntType(64))
uint32 = Whole("uint32", ir.IntType(32), signed=False)
int16, uint16 = Whole("int16", ir.IntType(16)), Whole("uint16", ir.IntType(16), signed=False)
int8, uint8 = Whole("int8", _BYTE), Whole("uint8", _BYTE, signed=False)
float32, float64 = Float("float32", ir.FloatType()), Float("float64", ir.DoubleType())
lanes = Vector("lanes", ir.VectorType(ir.FloatType(), WIDTH))
"""Sixteen float32 values: see :mod:`mambax_cpu.simd`."""


@cache
def CPointer(element: Type) -> Pointer:
    """The type of addresses of elements."""
    return Pointer(f"address of {element}", element.llvm.as_pointer(), element)


@cache
def literal(value: int) -> IntegerLiteral:
    """The type of this number."""
    return IntegerLiteral(f"int64 {value}", int64.llvm, value)


@dataclass(frozen=True, eq=False)
class Value:
    """What an expression gives, known when the kernel runs."""

    type: Type
    llvm: Any


# --- what all that emits instructions needs ---------------------------------------------------------------------


def declared(module: Any, name: str, kind: Any) -> Any:
    """A function from outside a module, of LLVM's or of the process."""
    found = module.globals.get(name)
    return ir.Function(module, kind, name) if found is None else found


def allocated(builder: Any, kind: Any) -> Any:
    """Room for a value of one of LLVM's types, for as long as the function runs."""
    with builder.goto_entry_block():
        return builder.alloca(kind)
