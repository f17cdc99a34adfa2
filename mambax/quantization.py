"""Weights of 8 and of 4 bits: how they are chosen, kept and read back.

- ``"int8"``: a weight is a whole number from -127 to 127 times the scale of its row, float32.
- ``"int4"``: a weight is a whole number from -8 to 7 times the scale of its group, bfloat16. Groups are 32 or 64
  inputs of one row: 4.5 or 4.25 bits for each weight.

Decided by the held-out loss of a small model trained on text, in nats per token: 2.7183 in float32, 2.7187 in int8,
2.7340 in int4 with groups of 32, 2.7357 of 64. A minimum for each group besides its scale costs half a bit more for
each weight and made it 2.7443; taking the largest weight for the scale instead of trying several, 2.7465; float32
scales, 2.7331, for another half bit. The whole numbers are chosen after the scale is rounded.

The weights of four bits of a row are stored in blocks of 128 inputs, 64 bytes each: sixteen words of 32 bits,
little-endian. Bits 4 k to 4 k + 3 of word l are the weight at input 16 k + l, plus 8. A row is padded to whole
blocks with zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from mambax.affine import Affine

BLOCK = 128
"""Inputs of a row of int4 that are stored together."""

WORDS = 16
"""Words of 32 bits of a block; word l has the inputs l, l + 16, ..., l + 112, four bits each."""

KINDS = ("int8", "int4")
GROUP_SIZES = (32, 64)

LAYERS = ("in_proj", "x_proj", "out_proj", "lm_head")
"""Names of the linear layers that are quantised; so is a table of embeddings that is the head. The others stay:
dt_proj, the convolution, A_log, D and the norms are small, and the recurrence is sensitive to them."""

_FACTORS = (1.0, 8 / 7, 0.95, 0.9, 0.85)
"""Scales that are tried for a group of int4, times the one that makes its largest weight -8; 8/7 makes it -7."""

_ROWS = 1 << 20
"""Weights that are quantised together, so that what is computed on the way stays small."""


class Quantized(NamedTuple):
    """A quantised matrix (out, in).

    Attributes:
        weight: (out, in) int8; or of int4 (out, ceil(in / 128) * 64) uint8.
        scales: (out,) float32; or of int4 (out, ceil(in / 128) * 128 / group size) bfloat16.
        inputs: in.
    """

    weight: np.ndarray
    scales: np.ndarray
    inputs: int

    @property
    def kind(self) -> str:
        """One of :data:`KINDS`."""
        return "int8" if self.weight.dtype == np.int8 else "int4"

    @property
    def group_size(self) -> int:
        """Inputs to a scale of int4."""
        return 2 * self.weight.shape[1] // self.scales.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.weight.shape[0], self.inputs


Layout = dict[str, tuple[tuple[int, ...], np.dtype]]
"""Shape and dtype of the arrays of a quantised matrix, by name."""


def kind_of(layer: str, kind: str) -> str:
    """The kind of a layer in a model of a kind: x_proj, which gives delta, B and C, has 8 bits at least."""
    return "int8" if layer == "x_proj" else kind


def layout(kind: str, outputs: int, inputs: int, group_size: int = 32) -> Layout:
    """Shape and dtype of the weight and the scales of a quantised matrix.

    Raises:
        ValueError: for another kind or group size.
    """
    check_kind(kind, group_size)
    if kind == "int8":
        return {
            "weight": ((outputs, inputs), np.dtype(np.int8)),
            "scales": ((outputs,), np.dtype(np.float32)),
        }
    padded = -(-inputs // BLOCK) * BLOCK
    return {
        "weight": ((outputs, padded // 2), np.dtype(np.uint8)),
        "scales": ((outputs, padded // group_size), np.dtype(ml_dtypes.bfloat16)),
    }


def check_kind(kind: Any, group_size: int) -> None:
    """Refuse a kind or group size that there is not.

    Raises:
        ValueError: with those that there are.
    """
    if isinstance(kind, Affine):
        raise ValueError(
            f"the weights are quantised as MLX packs them, {kind.default}, which the mlx backend alone reads; load "
            "with backend='mlx', or take the full weights"
        )
    if kind not in KINDS:
        raise ValueError(f"quantize is {kind!r}; expected one of {', '.join(map(repr, KINDS))}")
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size is {group_size!r}; expected one of {', '.join(map(str, GROUP_SIZES))}")


def quantize(weight: np.ndarray, kind: str, group_size: int = 32) -> Quantized:
    """The closest quantised matrix to a matrix; to a placeholder, one.

    Args:
        weight: (out, in), float32, float16 or bfloat16.
        kind: "int8" or "int4".
        group_size: 32 or 64, of int4.

    Raises:
        ValueError: for another kind or group size, another shape or dtype, and weights that are not finite.
    """
    if weight.ndim != 2:
        raise ValueError(f"quantize: weight must be (out, in), found {weight.shape}")
    check_layers({"weight": weight})
    outputs, inputs = weight.shape
    if is_placeholder(weight):
        forms = layout(kind, outputs, inputs, group_size)
        empty = {name: np.broadcast_to(dtype.type(0), shape) for name, (shape, dtype) in forms.items()}
        return Quantized(**empty, inputs=inputs)
    arrays = {name: np.empty(*form) for name, form in layout(kind, outputs, inputs, group_size).items()}
    height = max(1, _ROWS // max(1, inputs))
    for first in range(0, outputs, height):
        rows = slice(first, first + height)
        values = weight[rows].astype(np.float32)
        chosen = _int8(values) if kind == "int8" else _int4(values, group_size)
        arrays["weight"][rows], arrays["scales"][rows] = chosen
    return Quantized(arrays["weight"], arrays["scales"], inputs)


def _int8(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scales = np.abs(values).max(1, initial=0.0) / np.float32(127)
    return np.rint(values / _divisors(scales)[:, None]).astype(np.int8), scales


def _int4(values: np.ndarray, group_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each group, the scale that leaves the smallest squared error, and the whole numbers for it, packed."""
    rows, inputs = values.shape
    padded = -(-inputs // BLOCK) * BLOCK
    groups = np.zeros((rows, padded), np.float32)
    groups[:, :inputs] = values
    groups = groups.reshape(rows, padded // group_size, group_size)
    largest = np.take_along_axis(groups, np.abs(groups).argmax(2)[..., None], 2)[..., 0]
    best = np.full(largest.shape, np.inf, np.float32)
    scales, numbers = np.zeros_like(largest), np.zeros(groups.shape, np.int8)
    for factor in _FACTORS:
        tried = _rounded(largest * np.float32(-factor / 8))
        whole = np.clip(np.rint(groups / _divisors(tried)[..., None]), -8, 7)
        error = np.square(whole * tried[..., None] - groups).sum(2)
        better = error < best
        best, scales = np.where(better, error, best), np.where(better, tried, scales)
        numbers = np.where(better[..., None], whole, numbers).astype(np.int8)
    return packed(numbers.reshape(rows, padded)), scales.astype(ml_dtypes.bfloat16)


def _rounded(scales: np.ndarray) -> np.ndarray:
    """To bfloat16, as float32."""
    return scales.astype(ml_dtypes.bfloat16).astype(np.float32)


def _divisors(scales: np.ndarray) -> np.ndarray:
    """The scales, 1 for those that are 0: of weights that are all 0, or too small for a float32 scale."""
    return np.where(scales == 0, np.float32(1), scales)


def packed(numbers: np.ndarray) -> np.ndarray:
    """(rows, n * 128) from -8 to 7 as (rows, n * 64) bytes: bits 4k of word l of a block are input 16 k + l."""
    q = (numbers + 8).astype(np.uint32).reshape(len(numbers), -1, BLOCK // WORDS, WORDS)
    shifts = np.arange(0, 4 * q.shape[2], 4, dtype=np.uint32)[:, None]
    words = np.bitwise_or.reduce(q << shifts, axis=2)  # (rows, n, 16)
    return words.astype("<u4").reshape(len(numbers), -1).view(np.uint8)


def dequantize(quantized: Quantized) -> np.ndarray:
    """(out, in) float32, in plain NumPy: what the kernels are compared with."""
    weight, scales, inputs = quantized
    if quantized.kind == "int8":
        return weight.astype(np.float32) * scales[:, None]
    rows = len(weight)
    words = np.ascontiguousarray(weight).view("<u4").reshape(rows, -1, 1, WORDS)
    shifts = np.arange(0, 32, 4, dtype=np.uint32)[:, None]
    numbers = ((words >> shifts) & 15).reshape(rows, -1).astype(np.float32) - 8
    return (numbers * np.repeat(scales.astype(np.float32), quantized.group_size, axis=1))[:, :inputs]


def is_placeholder(array: np.ndarray) -> bool:
    """Whether an array stands for values that arrive later: all its elements are one."""
    return array.size > 1 and not any(array.strides)


def check_layers(layers: Mapping[str, np.ndarray]) -> None:
    """Refuse to quantise a model that has nothing to quantise, or not the weights for it.

    Args:
        layers: the weights that would be replaced, by a name for messages.

    Raises:
        ValueError: saying why.
    """
    from mambax.checkpoint.tensors import is_finite  # which comes with all that reads checkpoints

    if not layers:
        raise ValueError(
            f"quantize: the model has none of the layers that can be quantised ({', '.join(LAYERS)}), or they are "
            "quantised already; load it anew"
        )
    for name, weight in layers.items():
        if weight.dtype.name not in ("float32", "float16", "bfloat16"):
            raise ValueError(
                f"quantize: {name} is {weight.dtype.name}; expected float32, float16 or bfloat16: quantised layers "
                "compute in float32, load the model with dtype='float32'"
            )
        if not is_placeholder(weight) and not is_finite(weight):
            raise ValueError(f"quantize: {name} has weights that are NaN or infinite; load the model anew")
