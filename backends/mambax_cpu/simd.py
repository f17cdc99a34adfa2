"""Sixteen float32 lanes as one value in kernels, and the functions of them that a kernel needs.

LLVM's loop vectoriser gives up where pointers might overlap, and does not keep a recurrent state in registers. Here
a value of lanes is an LLVM ``<16 x float>``: one register of AVX-512, two of AVX, four of NEON or SSE. ``+ - * /``
work between two of them.

Functions are written with :class:`_Value`, whose operators emit instructions. They need no vector math library.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from mambax_cpu import kernel_types as types
from mambax_cpu.compilation import intrinsic
from mambax_cpu.kernel_types import declared, lanes
from mambax_cpu.tiles import WIDTH

_FLOATS = ir.VectorType(ir.FloatType(), WIDTH)
_INTEGERS = ir.VectorType(ir.IntType(32), WIDTH)


floats = types.CPointer(types.float32)
"""The type of an address of float32 values."""

# --- memory --------------------------------------------------------------------------------------------------


def address_of(element: Any) -> Any:
    """An intrinsic: an int64 address as an address of elements of this type."""
    result = types.CPointer(element)

    @intrinsic
    def emit(typing_context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(result))

        return result(types.int64), generate

    return emit


pointer = address_of(types.float32)
bytes_at = address_of(types.uint8)
integers_at = address_of(types.int64)


def _vector_address(builder: Any, base: Any, index: Any) -> Any:
    return builder.bitcast(builder.gep(base, [index]), _FLOATS.as_pointer())


@intrinsic
def load(typing_context: Any, base: Any, index: Any) -> Any:
    """The sixteen values from base[index] on."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(_vector_address(builder, *args), align=4)

    return lanes(floats, types.int64), generate


@intrinsic
def store(typing_context: Any, base: Any, index: Any, value: Any) -> Any:
    """Write sixteen values from base[index] on."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[2], _vector_address(builder, *args[:2]), align=4)
        return context.get_dummy_value()

    return types.void(floats, types.int64, lanes), generate


@intrinsic
def prefetch(typing_context: Any, base: Any, index: Any) -> Any:
    """Have the cache line of base[index] fetched. Any address will do: one that is not readable has no effect."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        byte, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, flag, flag, flag])
        function = declared(builder.module, "llvm.prefetch.p0i8", kind)
        read, keep, data = (ir.Constant(flag, value) for value in (0, 3, 1))
        builder.call(function, [builder.bitcast(builder.gep(args[0], [args[1]]), byte), read, keep, data])
        return context.get_dummy_value()

    return types.void(base, types.int64), generate


@intrinsic
def splat(typing_context: Any, value: Any) -> Any:
    """The same float32 in every lane."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        undefined = ir.Constant(_FLOATS, ir.Undefined)
        one = builder.insert_element(undefined, args[0], ir.Constant(ir.IntType(32), 0))
        return builder.shuffle_vector(one, undefined, ir.Constant(_INTEGERS, [0] * WIDTH))

    return lanes(types.float32), generate


@intrinsic
def total(typing_context: Any, value: Any) -> Any:
    """The sum of all lanes, as a tree: always in the same order."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        (value,) = args
        undefined = ir.Constant(_FLOATS, ir.Undefined)
        for distance in (8, 4, 2, 1):
            order = ir.Constant(_INTEGERS, [lane ^ distance for lane in range(WIDTH)])
            value = builder.fadd(value, builder.shuffle_vector(value, undefined, order))
        return builder.extract_element(value, ir.Constant(ir.IntType(32), 0))

    return types.float32(lanes), generate


# --- arithmetic ----------------------------------------------------------------------------------------------


class _Value:
    """A value while instructions are emitted; arithmetic with it, and with numbers, emits more."""

    def __init__(self, builder: Any, value: Any) -> None:
        self.builder, self.value = builder, value

    def like(self, other: _Value | float) -> _Value:
        """A number as a value of this builder; a value as it is."""
        if isinstance(other, _Value):
            return other
        return _Value(self.builder, ir.Constant(_FLOATS, [float(other)] * WIDTH))

    def __add__(self, other: _Value | float) -> _Value:
        return _Value(self.builder, self.builder.fadd(self.value, self.like(other).value))

    def __sub__(self, other: _Value | float) -> _Value:
        return _Value(self.builder, self.builder.fsub(self.value, self.like(other).value))

    def __mul__(self, other: _Value | float) -> _Value:
        return _Value(self.builder, self.builder.fmul(self.value, self.like(other).value))

    def __truediv__(self, other: _Value | float) -> _Value:
        return _Value(self.builder, self.builder.fdiv(self.value, self.like(other).value))

    def times_plus(self, factor: _Value | float, term: _Value | float) -> _Value:
        """self factor + term, rounded once where the processor can do that in one instruction."""
        kind = ir.FunctionType(_FLOATS, [_FLOATS] * 3)
        function = declared(self.builder.module, f"llvm.fmuladd.v{WIDTH}f32", kind)
        args = [self.value, self.like(factor).value, self.like(term).value]
        return _Value(self.builder, self.builder.call(function, args))

    def larger(self, other: _Value | float) -> _Value:
        """The larger of the two per lane; NaN where `other` is NaN."""
        args = (self.value, self.like(other).value)
        return _Value(self.builder, self.builder.select(self.builder.fcmp_ordered(">", *args), *args))

    def smaller(self, other: _Value | float) -> _Value:
        """The smaller of the two per lane; NaN where `other` is NaN."""
        args = (self.value, self.like(other).value)
        return _Value(self.builder, self.builder.select(self.builder.fcmp_ordered("<", *args), *args))

    def rounded(self) -> _Value:
        """The nearest integer per lane, to even between two; of AVX-512."""
        return self._call("llvm.nearbyint.v16f32", [_FLOATS], [self.value])

    def times_power(self, exponent: _Value) -> _Value:
        """self 2^exponent of whole numbers, 0 and infinity beyond the range; of AVX-512."""
        undefined, every = ir.Constant(_FLOATS, ir.Undefined), ir.Constant(ir.IntType(16), -1)
        args = [self.value, exponent.value, undefined, every, ir.Constant(ir.IntType(32), 4)]
        return self._call("llvm.x86.avx512.mask.scalef.ps.512", [arg.type for arg in args], args)

    def reciprocal(self) -> _Value:
        """1 / self within two units of the last place, for numbers from 1 to 2^126; of AVX-512."""
        args = [self.value, ir.Constant(_FLOATS, ir.Undefined), ir.Constant(ir.IntType(16), -1)]
        guess = self._call("llvm.x86.avx512.rcp14.ps.512", [arg.type for arg in args], args)
        return guess.times_plus(self.like(1.0) - self * guess, guess)  # a step of Newton's

    def _call(self, name: str, kinds: list[Any], args: list[Any]) -> _Value:
        function = declared(self.builder.module, name, ir.FunctionType(_FLOATS, kinds))
        return _Value(self.builder, self.builder.call(function, args))

    def low_bits_as_power(self) -> _Value:
        """The low 8 bits of each lane moved into the exponent of a float: 2^(bits - 127)."""
        bits = self.builder.bitcast(self.value, _INTEGERS)
        shifted = self.builder.shl(bits, ir.Constant(_INTEGERS, [23] * WIDTH))
        return _Value(self.builder, self.builder.bitcast(shifted, _FLOATS))


def _unary(formula: Callable[[_Value], _Value]) -> Any:
    """An intrinsic of one value from a formula."""

    @intrinsic
    def emit(typing_context: Any, x: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return formula(_Value(builder, args[0])).value

        return lanes(lanes), generate

    emit.__doc__ = formula.__doc__
    return emit


@intrinsic
def multiply_add(typing_context: Any, a: Any, b: Any, c: Any) -> Any:
    """a b + c, rounded once where the processor can; the wait for c is one operation long."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        a, b, c = (_Value(builder, value) for value in args)
        return a.times_plus(b, c).value

    return lanes(lanes, lanes, lanes), generate


# --- functions -----------------------------------------------------------------------------------------------

LOG2_E = 1.4426950408889634
# ln 2 in two parts, the first with few enough bits for its product with an integer below 256 to be exact.
_LN_2_HIGH, _LN_2_LOW = 0.693359375, -2.12194440e-4
# 1.5 * 2^23: adding it to a small number rounds that to an integer, which then lies in the low bits of the
# mantissa. 127 more, the bias of the exponent.
_ROUND = float(3 << 22) + 127.0
# 2^f - 1 for f in [-1/2, 1/2], without a constant term, so that a decay close to 1 has no bias. Relative error
# 2e-9.
_POWER = (0.00015353361959569156, 0.0013398875016719103, 0.00961843691766262,
          0.055503323674201965, 0.24022647738456726, 0.6931471824645996, 1.0)  # fmt: skip
# 2 artanh(s) / s in powers of s^2, for s in [0, 1/3]. Relative error 5e-9.
_ARTANH = (0.2801198661327362, 0.28001806139945984, 0.4002152681350708, 0.666664183139801, 2.0)


def _polynomial(x: _Value, coefficients: tuple[float, ...]) -> _Value:
    """Horner's rule, the highest power first."""
    result = x.like(coefficients[0])
    for coefficient in coefficients[1:]:
        result = result.times_plus(x, coefficient)
    return result


def _exp2(x: _Value) -> _Value:
    """2^x per lane within one unit of the last place; 0 below -126.5, infinity above 127.5, NaN for NaN."""
    x = x.like(128.0).smaller(x.like(-127.0).larger(x))
    rounded = x + _ROUND
    return _polynomial(x - (rounded - _ROUND), _POWER) * rounded.low_bits_as_power()


def _exp(x: _Value) -> _Value:
    """e^x per lane within two units of the last place; 0 below -87.7, infinity above 88.4, NaN for NaN."""
    x = x.like(88.73).smaller(x.like(-88.03).larger(x))
    rounded = x.times_plus(LOG2_E, _ROUND)
    k = rounded - _ROUND
    rest = k.times_plus(-_LN_2_LOW, k.times_plus(-_LN_2_HIGH, x))
    return _polynomial(rest * LOG2_E, _POWER) * rounded.low_bits_as_power()


def _softplus(x: _Value) -> _Value:
    """log(1 + e^x) per lane, exact at both ends: max(x, 0) + log1p(e^-|x|).

    With e = e^-|x| and s = e / (2 + e), log1p(e) = 2 artanh(s).
    """
    zero = x.like(0.0)
    e = _exp((zero - x).smaller(x))
    s = e / (e + 2.0)
    return _polynomial(s * s, _ARTANH).times_plus(s, zero.larger(x))


def _sigmoid(x: _Value) -> _Value:
    """1 / (1 + e^-x) per lane."""
    return x.like(1.0) / (_exp(x.like(0.0) - x) + 1.0)


# --- for results of the type of an address ---------------------------------------------------------------------

# As _POWER, with a relative error of 3e-6.
_COARSE_POWER = (0.009582867146694627, 0.055906428929812346, 0.2402409832679317, 0.6931241927620444, 1.0)


def _exp2_coarse(x: _Value) -> _Value:
    """As _exp2, with a relative error of 3e-6; as what follows for results that are rounded to bfloat16, and for
    processors that multiply those, which have AVX-512."""
    x = x.like(-200.0).larger(x)  # infinity less infinity would be NaN
    whole = x.rounded()
    return _polynomial(x - whole, _COARSE_POWER).times_power(whole)


def _softplus_coarse(x: _Value) -> _Value:
    """As _softplus, with a relative error of 3e-6."""
    zero = x.like(0.0)
    e = _exp2_coarse((zero - x).smaller(x) * LOG2_E)
    s = e * (e + 2.0).reciprocal()
    return _polynomial(s * s, _ARTANH).times_plus(s, zero.larger(x))


def _sigmoid_coarse(x: _Value) -> _Value:
    """As _sigmoid, with a relative error of 3e-6."""
    return (_exp2_coarse(x.like(126.0).smaller(x * -LOG2_E)) + 1.0).reciprocal()


def _by_kind(formula: Callable[[_Value], _Value], coarse: Callable[[_Value], _Value]) -> Any:
    """An intrinsic of one value: a formula for results in float32, and another for results to be rounded. Which it
    is says the type of the first argument, an address of such results."""

    @intrinsic
    def emit(typing_context: Any, kind: Any, x: Any) -> Any:
        chosen = formula if kind.dtype == types.float32 else coarse

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return chosen(_Value(builder, args[1])).value

        return lanes(kind, lanes), generate

    return emit


exp2_for = _by_kind(_exp2, _exp2_coarse)
softplus_for = _by_kind(_softplus, _softplus_coarse)
sigmoid_for = _by_kind(_sigmoid, _sigmoid_coarse)

exp2, exp, softplus, sigmoid = (_unary(formula) for formula in (_exp2, _exp, _softplus, _sigmoid))
