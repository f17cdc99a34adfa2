"""Tokens through a stack of blocks by the fused CPU kernels, where that means the same as calling the blocks: one
for each row, or many.

A stack is examined once. What was found holds until an attribute of any module changes, which
:mod:`mambax_numpy.module` notices.

Dimensions: B batch, L length, M d_model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from operator import is_
from typing import TYPE_CHECKING, Any
from weakref import ReferenceType, ref

import ml_dtypes
import numpy as np

from mambax.blocks import LayerState
from mambax_numpy import module
from mambax_numpy.layers import CausalConv1d, Linear, RMSNorm
from mambax_numpy.quantized import QuantizedLinear

if TYPE_CHECKING:
    from mambax_cpu.chain import Weights
    from mambax_cpu.mamba2_step import Mamba2Stack
    from mambax_cpu.stacks import Classes
    from mambax_cpu.step import Stack
    from mambax_cpu.stepping import States

_FLOAT32 = np.dtype(np.float32)
_NARROW = (_FLOAT32, np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16))

_OWN = ("mambax.blocks", "mambax.mamba2", "mambax_numpy.layers", "mambax_numpy.quantized")
"""Where the definitions are that the kernels compute; a patched class has its ``forward`` from elsewhere."""


@dataclass
class _Examined:
    """What a stack was found to be.

    Attributes:
        stamp: what :func:`mambax_numpy.module.stamp` gave before it was examined.
        layers: the ids of its blocks, which the model keeps alive as long as the stamp is the same.
        stack: for the kernels; None where the blocks have to be called one by one.
        narrow: dtype of the small weights and the convolution's state.
        wide: whether the residual stream is float32 whatever it is given as.
        forwards: what calling a layer of each class ran.
        arrays: what the addresses in the stack lead to.
        latest: the states that a step gave last, which are not kept alive, and where they lie.
    """

    stamp: object
    layers: list[int]
    stack: Stack | Mamba2Stack | None
    narrow: np.dtype
    wide: bool
    forwards: list[Any]
    arrays: list[np.ndarray]
    latest: tuple[list[ReferenceType[np.ndarray]], States | None] = ([], None)

    def holds(self, layers: Sequence[Any]) -> bool:
        """Whether the stack still is that."""
        same = self.stamp is module.stamp() and self.layers == list(map(id, layers))
        return same and all(map(is_, self.forwards, _classes().forwards()))


Room = Callable[[int, tuple[int, ...]], Sequence[np.ndarray]]
"""Of a number of layers and a shape, so many contiguous float32 arrays to write to."""


def decode_step(
    layers: Sequence[Any], hidden: np.ndarray, states: Sequence[LayerState], room: Room | None = None
) -> tuple[np.ndarray, tuple[LayerState, ...]] | None:
    """See :meth:`mambax.backend.Backend.decode_step`. ``room`` is for the recurrence's states after one token."""
    batch, length, _ = hidden.shape
    if not len(layers) or hidden.dtype not in _NARROW or (room is not None and length > 1):
        return None
    from mambax_cpu import linear, prefill, stepping, threads

    few = batch * length <= linear.FEW_ROWS
    if few != (length == 1):  # of a few tokens in a row, and of very many rows, the blocks are as fast
        return None
    examined = _examine(layers)
    stack = examined.stack
    many = prefill.chosen(stack) if length > 1 else None
    if stack is None or (length > 1 and many is None):
        return None
    shapes = stack.state_shapes(batch)
    before = _found(states, examined, shapes)
    if before is None:
        return None
    conv = np.empty((len(layers), *shapes[0]), examined.narrow)
    ssm: Any = (stack.memory.take if room is None else room)(len(layers), shapes[1])
    places = stepping.States(*map(_places, (conv, ssm)))
    if many is None:
        out = stack.advance(hidden[:, 0], before, places, threads.default_threads())[:, None]
    else:
        out = prefill.read(many, hidden, before, places, threads.default_threads())
    after = tuple(map(LayerState, conv, ssm))
    examined.latest = list(map(ref, chain.from_iterable(after))), places
    return out.astype(_FLOAT32 if examined.wide else hidden.dtype, copy=False), after


def _found(states: Sequence[LayerState], examined: _Examined, shapes: Sequence[tuple[int, ...]]) -> States | None:
    """Where states lie; None when one of them is not as the kernels take it: of these two shapes, contiguous."""
    from mambax_cpu.stepping import States

    arrays = list(chain.from_iterable(states))
    references, places = examined.latest
    if len(arrays) == len(references) and all(map(is_, arrays, [reference() for reference in references])):
        return places
    convs = _addresses(arrays[0::2], shapes[0], examined.narrow)
    ssms = _addresses(arrays[1::2], shapes[1], _FLOAT32)
    return None if convs is None or ssms is None else States(convs, ssms)


def _addresses(arrays: list[np.ndarray], shape: tuple[int, ...], dtype: np.dtype) -> list[int] | None:
    """Where contiguous arrays of a shape and dtype lie; None when one of them is none."""
    found = []
    for array in arrays:
        if array.shape != shape or array.dtype != dtype or not array.flags.c_contiguous & array.flags.aligned:
            return None
        found.append(array.__array_interface__["data"][0])
    return found


def _places(arrays: np.ndarray | Sequence[np.ndarray]) -> np.ndarray | list[int]:
    """Where arrays lie, or the parts of one along its first axis."""
    if not isinstance(arrays, np.ndarray):
        return [array.__array_interface__["data"][0] for array in arrays]
    return arrays.__array_interface__["data"][0] + np.arange(len(arrays)) * arrays.strides[0]


# --- what a stack is -----------------------------------------------------------------------------------------


def _examine(layers: Sequence[Any]) -> _Examined:
    """What a stack is, from the first time if nothing has changed."""
    found = module.examined.get(layers[0])
    if found is not None and found.holds(layers):
        return found
    from mambax_cpu.stacks import stack_of

    stamp = module.stamp()
    arrays: list[np.ndarray] = []
    stack = stack_of(layers, _classes(), _OWN, lambda dtype: _Given(dtype, arrays))
    narrow = layers[0].norm.weight.dtype if stack is not None else _FLOAT32
    wide = stack is not None and layers[0].residual_in_fp32
    found = _Examined(stamp, list(map(id, layers)), stack, narrow, wide, _classes().forwards(), arrays)
    module.examined[layers[0]] = found
    return found


@cache
def _classes() -> Classes:
    from mambax_cpu.stacks import Classes

    from mambax_numpy.models import Block, Mamba2Mixer, MambaMixer

    return Classes(Block, MambaMixer, Mamba2Mixer, RMSNorm, CausalConv1d, Linear, QuantizedLinear)


class _Given:
    """See :class:`mambax_cpu.stacks.Given`. Keeps what it took in `arrays`."""

    def __init__(self, dtype: np.dtype, arrays: list[np.ndarray]) -> None:
        self.dtype, self.narrow, self.arrays, self.fit = dtype, dtype.name, arrays, True

    def vector(self, array: np.ndarray | None, shape: tuple[int, ...], *, wide: bool = False) -> int:
        """The address of a contiguous array of a shape and dtype; 0 for None."""
        from mambax_cpu.linear import address_of

        if array is None:
            return 0
        flags, dtype = array.flags, _FLOAT32 if wide else self.dtype
        if array.shape != shape or array.dtype != dtype or not flags.c_contiguous & flags.aligned:
            self.fit = False
        self.arrays.append(array)
        return address_of(array)

    def matrix(self, layer: Linear | QuantizedLinear, shape: tuple[int, int]) -> Weights:
        """The weight of a linear layer."""
        from mambax_cpu.chain import Weights
        from mambax_cpu.linear import quantized

        if isinstance(layer, Linear):
            return Weights(self.narrow, *shape, self.vector(layer.weight, shape))
        matrix = layer.quantized
        for array in (matrix.weight, matrix.scales):
            if not array.flags.c_contiguous:
                self.fit = False
            self.arrays.append(array)
        if matrix.shape != shape:
            self.fit = False
        return quantized(matrix)
