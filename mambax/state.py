"""The recurrent state of a model, as a value.

Dimensions: B batch, K d_conv, D d_inner, N d_state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, TypeVar

import numpy as np

from mambax.backend import Array, Backend
from mambax.blocks import LayerState

State = TypeVar("State", bound="InferenceParams")


class CacheInfo(NamedTuple):
    """What a state holds.

    Attributes:
        layers: number of blocks.
        batch: number of rows.
        tokens_seen: for each row, how many tokens it has read.
        bytes: memory of its arrays; does not grow with the tokens seen.
    """

    layers: int
    batch: int
    tokens_seen: tuple[int, ...]
    bytes: int


@dataclass(eq=False)
class InferenceParams:
    """Everything a model remembers of the tokens it has read.

    A model takes one and returns the next; the arrays of a state are never written to, so that keeping an old
    state costs nothing but its memory, and going back to it is exact.

    Args:
        layers: the state of each block.
        tokens_seen: (B,) int64, the tokens each row has read; masked positions do not count.
    """

    nn: ClassVar[Backend]

    layers: tuple[LayerState, ...]
    tokens_seen: Array

    @property
    def batch(self) -> int:
        """Number of rows."""
        return self.tokens_seen.shape[0]

    def fork(self: State) -> State:
        """A second state equal to this one. Shares the arrays, which nothing writes to."""
        return type(self)(self.layers, self.tokens_seen)

    def reset_cache(self: State) -> State:
        """Forget everything read so far: this state becomes that of ``init_state`` and is returned.

        Other states, forks included, keep what they hold.
        """
        nn = self.nn
        self.layers = tuple(
            LayerState(*(nn.zeros(tuple(array.shape), array.dtype, like=array) for array in layer))
            for layer in self.layers
        )
        self.tokens_seen = nn.zeros((self.batch,), nn.int64, like=self.tokens_seen)
        return self

    def select(self: State, rows: int | Sequence[int]) -> State:
        """The state of some rows, in that order; a row may be named more than once.

        Args:
            rows: row numbers from 0 to batch - 1, or one of them.

        Raises:
            ValueError: when a number is out of range, or none is given.
        """
        wanted = [rows] if isinstance(rows, int) else list(rows)
        if not wanted or not all(0 <= row < self.batch for row in wanted):
            raise ValueError(
                f"InferenceParams.select: rows are {wanted}; expected one or more from 0 to {self.batch - 1}"
            )
        index = self.nn.from_numpy(np.asarray(wanted, np.int64), like=self.tokens_seen)
        layers = tuple(LayerState(*(array[index] for array in layer)) for layer in self.layers)
        return type(self)(layers, self.tokens_seen[index])

    def where(self: State, rows: Array, other: State) -> State:
        """This state where ``rows`` (B,) bool is True, the other one elsewhere."""
        nn = self.nn

        def choose(a: Array, b: Array) -> Array:
            return nn.where(rows.reshape(-1, *[1] * (len(a.shape) - 1)), a, b)

        layers = tuple(
            LayerState(*map(choose, ours, theirs)) for ours, theirs in zip(self.layers, other.layers, strict=True)
        )
        return type(self)(layers, choose(self.tokens_seen, other.tokens_seen))

    def arrays(self) -> dict[str, Array]:
        """Its arrays by the names under which they are saved."""
        named = {"tokens_seen": self.tokens_seen}
        for i, layer in enumerate(self.layers):
            named[f"layers.{i}.conv_state"] = layer.conv
            named[f"layers.{i}.ssm_state"] = layer.ssm
        return named

    def get_cache_info(self) -> CacheInfo:
        """Layers, batch, tokens seen by each row, and bytes."""
        arrays = self.arrays()
        size = sum(array.nbytes for array in arrays.values())
        seen = tuple(int(n) for n in self.nn.to_numpy(arrays["tokens_seen"]))
        return CacheInfo(len(self.layers), self.batch, seen, size)
