"""Numba kernels for weights as ``mlx.core.quantize`` packs them, in 4 and in 8 bits.

Weight i of a row is ``q[i] scale[g] + bias[g]`` with g = i // group size. Its bits are bits ``b (i % V)`` and on of
word ``i // V``, where b is the number of bits and V = 32 / b. Loops run over words, so that sixteen of them are one
vector; x is laid out to match, all inputs of place k of a word together.

Dimensions: R rows of x, O outputs, W words of a row of weights, G groups, V weights to a word.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

_SUMS = {"reassoc", "contract", "nsz"}  # which let LLVM split a sum over lanes; NaN and infinity stay


def _kernel(function: Any) -> Any:
    return numba.njit(nogil=True, cache=True, fastmath=_SUMS)(function)


def arrange(x: np.ndarray, words: int) -> tuple[np.ndarray, np.ndarray]:
    """x (R, in) as the kernels take it, (R, V, W), and its sum over each word, (R, W)."""
    by_word = x.reshape(len(x), words, -1)
    return np.ascontiguousarray(by_word.transpose(0, 2, 1)), by_word.sum(2)


@_kernel
def product4(
    packed: Any, scales: Any, biases: Any, x: Any, sums: Any, shift: int, out: Any, first: int, last: int
) -> None:
    """Outputs `first` to `last` - 1 of x weight^T, weights of 4 bits.

    Args:
        packed: (O, W) uint32.
        scales, biases: (O, G) float32.
        x, sums: from :func:`arrange`.
        shift: log2 of the words of a group.
        out: (R, O) float32, which is written.
        first, last: of the outputs.
    """
    words, mask = packed.shape[1], np.uint32(15)
    for row in range(x.shape[0]):
        places, sum_ = x[row], sums[row]
        for o in range(first, last):
            total = np.float32(0)
            for w in range(words):
                word = packed[o, w]
                dot = np.float32(word & mask) * places[0, w]
                dot += np.float32((word >> np.uint32(4)) & mask) * places[1, w]
                dot += np.float32((word >> np.uint32(8)) & mask) * places[2, w]
                dot += np.float32((word >> np.uint32(12)) & mask) * places[3, w]
                dot += np.float32((word >> np.uint32(16)) & mask) * places[4, w]
                dot += np.float32((word >> np.uint32(20)) & mask) * places[5, w]
                dot += np.float32((word >> np.uint32(24)) & mask) * places[6, w]
                dot += np.float32(word >> np.uint32(28)) * places[7, w]
                total += scales[o, w >> shift] * dot + biases[o, w >> shift] * sum_[w]
            out[row, o] = total


@_kernel
def product8(
    packed: Any, scales: Any, biases: Any, x: Any, sums: Any, shift: int, out: Any, first: int, last: int
) -> None:
    """As :func:`product4`, weights of 8 bits."""
    words, mask = packed.shape[1], np.uint32(255)
    for row in range(x.shape[0]):
        places, sum_ = x[row], sums[row]
        for o in range(first, last):
            total = np.float32(0)
            for w in range(words):
                word = packed[o, w]
                dot = np.float32(word & mask) * places[0, w]
                dot += np.float32((word >> np.uint32(8)) & mask) * places[1, w]
                dot += np.float32((word >> np.uint32(16)) & mask) * places[2, w]
                dot += np.float32(word >> np.uint32(24)) * places[3, w]
                total += scales[o, w >> shift] * dot + biases[o, w >> shift] * sum_[w]
            out[row, o] = total
