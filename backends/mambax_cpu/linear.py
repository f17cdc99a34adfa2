"""Linear layers for a few rows: every weight read once, at the speed of memory, widened to float32 in registers.

A matrix product that is fast for many rows packs the weights first, which for a few rows costs more than the
product. Up to about eight rows the kernels here take as long as reading the weights. Above :data:`FEW_ROWS` the
framework's own product is used, over weights that :func:`widen` makes float32 where it has none for their kind.
"""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np

from mambax.quantization import GROUP_SIZES, Quantized
from mambax_cpu import phase_table as field
from mambax_cpu import products
from mambax_cpu.chain import KERNELS, Weights, perform, prepared_size, product_phase, table_of
from mambax_cpu.compilation import KernelFile
from mambax_cpu.operands import check_shape, refuse_float64
from mambax_cpu.threads import default_threads, run

FEW_ROWS = 32
"""Rows up to which the kernels are used. A constant, so that the same input gives the same bits in every process.

Measured on Zen 5, one thread, weights of 3072 x 768 and 768 x 1536 not in cache, against OpenBLAS and PyTorch
(MKL): in float32 the kernels take 0.3 to 0.8 of the time of either from 2 to 64 rows; in bfloat16, 0.3 to 0.6 of
that of PyTorch up to 8 rows, as long at 16 to 24; in float16, for which PyTorch has no fast product, at most 0.7.
"""

_SMALL = 1 << 20
"""Bytes of weights, once for each eight rows of x, below which waking another thread costs more than it saves."""

_CHUNK = 1 << 20
"""Weights that are made float32 together: they are multiplied while they are in cache."""

_kernels = KernelFile("mambax_cpu.linear_kernels")

_FLOATS = {
    np.dtype(np.float32): "float32",
    np.dtype(np.float16): "float16",
    np.dtype(ml_dtypes.bfloat16): "bfloat16",
}


def address_of(array: np.ndarray | None) -> int:
    """The address of the first element; 0 for None."""
    return 0 if array is None else array.__array_interface__["data"][0]


def product(weights: Weights, x: int, rows: int, out: int, bias: int = 0, *, threads: int | None = None) -> None:
    """out = x weights^T + bias, over addresses of contiguous float32 arrays.

    Args:
        weights: (out, in).
        x: address of (rows, in).
        rows: any number; see :data:`FEW_ROWS`.
        out: address of (rows, out), which is written.
        bias: address of (out,), or 0.
        threads: how many may work; as many as :func:`mambax_cpu.threads.default_threads` says when None.
    """
    if rows * weights.outputs == 0:
        return
    scratch = np.empty(prepared_size(weights, rows), np.float32)
    phase = product_phase(weights, rows, x, out)
    phase[field.WIDE_BIAS], phase[field.PREPARED] = bias, address_of(scratch)
    if weights.nbytes * (1 + rows // 8) < _SMALL:
        threads = 1
    elif threads is None:
        threads = default_threads()
    narrow = weights.kind if weights.kind in _FLOATS.values() else "float32"
    perform(KERNELS[weights.kind, narrow], table_of([phase]), threads, 0)


def widen(weights: Weights, out: int, first: int, last: int, *, threads: int | None = None) -> None:
    """Rows `first` to `last` - 1 of weights of any kind but float32, as float32.

    Args:
        out: the address of a contiguous (last - first, in) float32 array, which is written.
        threads: as of :func:`product`.
    """
    kind, _, inputs, address, scales, shift = weights
    out -= 4 * first * inputs
    widen_floats = getattr(_kernels, f"widen_{kind}")

    def work(begin: int, end: int) -> None:
        if kind == "int4":
            _kernels.widen_int4(address, scales, shift, inputs, out, first + begin, first + end)
        else:
            widen_floats(address, inputs, scales, out, first + begin, first + end)

    count = last - first
    if count * inputs < _SMALL:
        work(0, count)
    else:
        run(work, count, default_threads() if threads is None else threads)


def apply(
    weights: Weights, x: np.ndarray, bias: np.ndarray | None = None, *, threads: int | None = None
) -> np.ndarray:
    """x (..., in) weights^T + bias in float32, (..., out), for any number of rows.

    Raises:
        ValueError: when x does not fit the weights, or is float64.
    """
    refuse_float64("linear", x)
    *batch, inputs = x.shape
    check_shape("linear", "x", x, (*batch, weights.inputs))
    check_shape("linear", "bias", bias, (weights.outputs,))
    rows = math.prod(batch)
    x = np.ascontiguousarray(x, np.float32).reshape(rows, inputs)
    y = np.empty((rows, weights.outputs), np.float32)
    if rows <= FEW_ROWS:
        bias = None if bias is None else np.ascontiguousarray(bias, np.float32)
        product(weights, address_of(x), rows, address_of(y), address_of(bias), threads=threads)
    else:
        height = max(1, _CHUNK // max(1, inputs))
        chunk = np.empty((min(height, weights.outputs), inputs), np.float32)
        for first in range(0, weights.outputs, height):
            last = min(first + height, weights.outputs)
            widen(weights, address_of(chunk), first, last, threads=threads)
            products.fastest(x, chunk[: last - first], out=y[:, first:last], threads=threads)
        if bias is not None:
            y += bias
    return y.reshape(*batch, weights.outputs)


def linear(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None, *, threads: int | None = None
) -> np.ndarray:
    """x (..., in) weight^T + bias in float32, (..., out).

    Args:
        x: float32 or narrower.
        weight: (out, in), float32, bfloat16 or float16.
        bias: (out,) or None.
        threads: how many may work; as many as :func:`mambax_cpu.threads.default_threads` says when None.

    Raises:
        ValueError: for shapes that do not fit, and other dtypes.
    """
    kind = _FLOATS.get(weight.dtype)
    if kind is None or weight.ndim != 2:
        raise ValueError(
            "linear: weight must be (out, in) of float32, bfloat16 or float16, "
            f"found {weight.dtype.name} of shape {weight.shape}"
        )
    weight = _aligned(weight)
    if kind == "float32" and math.prod(x.shape[:-1]) > FEW_ROWS:
        refuse_float64("linear", x)
        rows = x.astype(np.float32, copy=False).reshape(-1, x.shape[-1])
        check_shape("linear", "bias", bias, (weight.shape[0],))
        return products.fastest(rows, weight, bias, threads=threads).reshape(*x.shape[:-1], weight.shape[0])
    return apply(Weights(kind, weight.shape[0], weight.shape[1], address_of(weight)), x, bias, threads=threads)


def quantized(matrix: Quantized) -> Weights:
    """A quantised matrix for the kernels, for as long as its arrays are kept; they are contiguous."""
    shift = 0 if matrix.kind == "int8" else (matrix.group_size // GROUP_SIZES[0]).bit_length() - 1
    address, scales = address_of(matrix.weight), address_of(matrix.scales)
    return Weights(matrix.kind, len(matrix.weight), matrix.inputs, address, scales, shift)


def quantized_linear(
    x: np.ndarray, matrix: Quantized, bias: np.ndarray | None = None, *, threads: int | None = None
) -> np.ndarray:
    """x (..., in) times a quantised matrix (out, in) transposed, plus bias; as :func:`apply`."""
    return apply(quantized(matrix), x, bias, threads=threads)


def quantized_rows(matrix: Quantized, ids: np.ndarray) -> np.ndarray:
    """Rows of a quantised matrix as float32: ids (...) to (..., in).

    Raises:
        IndexError: for an id outside the matrix.
    """
    some = Quantized(matrix.weight[ids.reshape(-1)], matrix.scales[ids.reshape(-1)], matrix.inputs)
    values = np.empty((ids.size, matrix.inputs), np.float32)
    widen(quantized(some), address_of(values), 0, ids.size)
    return values.reshape(*ids.shape, matrix.inputs)


def _aligned(array: np.ndarray) -> np.ndarray:
    """The array with its elements one after another and aligned; a copy only where it has to be."""
    flags = array.flags
    return array if flags.c_contiguous and flags.aligned else np.array(array, order="C")
