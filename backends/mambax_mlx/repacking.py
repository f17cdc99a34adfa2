"""The quantised weights of mambax's other backends in MLX's packing: the same numbers, exactly.

A weight of ``"int4"`` is ``q scale`` with q from -8 to 7, and so ``(q + 8) scale - 8 scale``: MLX's form with a
bias. Eight times a bfloat16 is one. ``"int8"`` is ``(q + 128) scale - 128 scale``, the scale of the row for every
group.
"""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
import numpy as np

from mambax import quantization
from mambax.affine import GROUP_SIZES, Packing
from mambax.quantization import Quantized
from mambax_mlx.host import values

Arrays = dict[str, mx.array]


def packing_of(kind: str, inputs: int, group_size: int) -> Packing | None:
    """How a matrix of a kind is packed; None when MLX has no group that divides its width."""
    if kind == "int4":
        return None if inputs % group_size else Packing(4, group_size)
    fitting = [size for size in GROUP_SIZES if inputs % size == 0]
    return Packing(8, max(fitting)) if fitting else None


def packed(matrix: Quantized, packing: Packing) -> Arrays:
    """The arrays of a quantised matrix in MLX's packing; scales and biases float32."""
    outputs, inputs = matrix.shape
    if matrix.kind == "int4":
        words = np.ascontiguousarray(matrix.weight).view("<u4").reshape(outputs, -1, 1, quantization.WORDS)
        shifts = np.arange(0, 32, 4, dtype=np.uint32)[:, None]
        numbers = ((words >> shifts) & 15).reshape(outputs, -1)[:, :inputs]  # q + 8
        scales = matrix.scales[:, : inputs // packing.group_size].astype(np.float32)
    else:
        numbers = (matrix.weight.astype(np.int16) + 128).astype(np.uint32)
        scales = np.repeat(matrix.scales[:, None], inputs // packing.group_size, axis=1)
    places = 32 // packing.bits
    shifts = np.arange(0, 32, packing.bits, dtype=np.uint32)
    parts = numbers.astype(np.uint32).reshape(outputs, -1, places) << shifts
    weight = np.bitwise_or.reduce(parts, axis=2)
    biases = scales * np.float32(-(2 ** (packing.bits - 1)))
    return {"weight": mx.array(weight), "scales": mx.array(scales), "biases": mx.array(biases)}


def repacked(given: Mapping[str, mx.array], held: Mapping[str, mx.array]) -> Arrays:
    """The values with matrices that mambax packed in MLX's packing.

    Args:
        given: values by path; a matrix of mambax has ``weight`` (uint8 or int8) and ``scales``.
        held: the parameters of the model, by path.
    """
    result = dict(given)
    for name in given:
        path = name.removesuffix(".scales")
        weight = given.get(f"{path}.weight")
        if path == name or weight is None or weight.dtype not in (mx.uint8, mx.int8):
            continue
        words, groups = (held[f"{path}.{part}"].shape[1] for part in ("weight", "scales"))
        bits = 4 if weight.dtype == mx.uint8 else 8
        inputs = 32 * words // bits
        matrix = Quantized(values(weight), values(given[name]), inputs)
        arrays = packed(matrix, Packing(bits, inputs // groups))
        result |= {f"{path}.{part}": array for part, array in arrays.items()}
    return result
