"""The recurrent state of a model, as a value.

Dimensions: B batch, K d_conv, D d_inner, N d_state.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar, cast

import numpy as np

from mambax.backend import Array, Backend
from mambax.inputs import has_dtype
from mambax.layer_states import GROWING, of_fields
from mambax.paths import path_of

State = TypeVar("State", bound="InferenceParams")


class CacheInfo(NamedTuple):
    """What a state holds.

    Attributes:
        layers: number of blocks, each use of a shared one included.
        batch: number of rows.
        tokens_seen: for each row, how many tokens it has read.
        bytes: memory of its arrays; grows with the tokens seen in models with attention alone.
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
        layers: the state of each block, of the kind that its mixer keeps (see :mod:`mambax.layer_states`), and
            after them that of each use of a shared block.
        tokens_seen: (B,) int64, the tokens each row has read; masked positions do not count.
    """

    nn: ClassVar[Backend]

    layers: tuple[Any, ...]
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

        def cleared(field: str, array: Array) -> Array:
            shape = list(array.shape)
            if field in GROWING:
                shape[GROWING[field]] = 0
            return nn.zeros(tuple(shape), array.dtype, like=array)

        self.layers = tuple(type(layer)(*map(cleared, layer._fields, layer)) for layer in self.layers)
        self.tokens_seen = nn.zeros((self.batch,), nn.int64, like=self.tokens_seen)
        return self

    def select(self: State, rows: int | Sequence[int]) -> State:
        """The state of some rows, in that order; a row may be named more than once.

        Args:
            rows: row numbers from 0 to batch - 1, or one of them.

        Raises:
            ValueError: when a number is out of range, or none is given.
        """
        wanted = list(rows) if isinstance(rows, (Sequence, np.ndarray)) else [rows]
        whole = all(isinstance(row, (int, np.integer)) and not isinstance(row, bool) for row in wanted)
        if not wanted or not whole or not all(0 <= row < self.batch for row in wanted):
            raise ValueError(
                f"InferenceParams.select: rows are {wanted}; expected one or more from 0 to {self.batch - 1}"
            )
        index = self.nn.from_numpy(np.asarray(wanted, np.int64), like=self.tokens_seen)
        layers = tuple(type(layer)(*(array[index] for array in layer)) for layer in self.layers)
        return type(self)(layers, self.tokens_seen[index])

    def detach(self: State) -> State:
        """This state, from which no gradient flows back: for truncated backpropagation through time."""
        stop = self.nn.stop_gradient
        layers = tuple(type(layer)(*map(stop, layer)) for layer in self.layers)
        return type(self)(layers, self.tokens_seen)

    def where(self: State, rows: Array, other: State) -> State:
        """This state where ``rows`` (B,) bool is True, the other one elsewhere.

        One of the two may have read more: what attention keeps of the other gets positions that do not exist.

        Args:
            rows: an array of the framework or of NumPy, or a list.
            other: a state of the same model and batch.

        Raises:
            ValueError: for rows that are not (B,) bool, and when the other state is of another model or batch.
        """
        nn = self.nn
        if isinstance(rows, (list, tuple, np.ndarray)):
            chosen = np.asarray(rows)
            rows = nn.from_numpy(chosen, like=self.tokens_seen) if chosen.dtype == np.bool_ else chosen
        if not has_dtype(rows, [nn.bool_]) or tuple(rows.shape) != (self.batch,):
            found = f"{getattr(rows, 'dtype', type(rows).__name__)} {tuple(getattr(rows, 'shape', ()))}"
            raise ValueError(f"InferenceParams.where: rows are {found}; expected bool ({self.batch},)")
        if not isinstance(other, InferenceParams):
            raise ValueError(f"InferenceParams.where: expected another state, found {type(other).__name__}")
        other.check(nn.name, len(self.layers), self.batch)

        def choose(field: str, a: Array, b: Array) -> Array:
            if field in GROWING:
                length = max(array.shape[GROWING[field]] for array in (a, b))
                a, b = self._lengthened(field, a, length), self._lengthened(field, b, length)
            return nn.where(rows.reshape(-1, *[1] * (len(a.shape) - 1)), a, b)

        self._check_alike(other)
        layers = tuple(
            type(ours)(*map(choose, ours._fields, ours, theirs))
            for ours, theirs in zip(self.layers, other.layers, strict=True)
        )
        return type(self)(layers, choose("tokens_seen", self.tokens_seen, other.tokens_seen))

    def _check_alike(self, other: InferenceParams) -> None:
        """Refuse a state of another model: all shapes are the same, but along the axes that grow."""

        def fixed(state: InferenceParams) -> dict[str, list[int]]:
            shapes = {}
            for name, array in state.arrays().items():
                growing = GROWING.get(name.rpartition(".")[2].removesuffix("_state"))
                shapes[name] = [size for axis, size in enumerate(array.shape) if axis != growing]
            return shapes

        ours, theirs = fixed(self), fixed(other)
        for name in sorted(ours.keys() | theirs.keys()):
            if ours.get(name) != theirs.get(name):
                raise ValueError(
                    f"InferenceParams.where: {name} is {ours.get(name)} here and {theirs.get(name)} in the other "
                    "state; expected two states of the same model"
                )

    def _lengthened(self, field: str, array: Array, length: int) -> Array:
        """One of :data:`GROWING` fields with positions before its own that do not exist, ``length`` in all."""
        nn, shape = self.nn, list(array.shape)
        shape[GROWING[field]] = length - array.shape[GROWING[field]]
        if not shape[GROWING[field]]:
            return array
        missing = nn.zeros(tuple(shape), array.dtype, like=array) - (1 if field == "number" else 0)
        return nn.concat([missing, array], axis=GROWING[field])

    def check(self, backend: str, layers: int, batch: int) -> None:
        """Refuse a state that cannot belong to a model and an input.

        Raises:
            ValueError: when it is another backend's, or has another number of layers or rows.
        """
        if self.nn.name != backend:
            raise ValueError(
                f"state: it is a state of the {self.nn.name!r} backend and this model is on {backend!r}; move it "
                "with state.save(path) and model.load_state(path)"
            )
        if (len(self.layers), self.batch) != (layers, batch):
            raise ValueError(
                f"state: it holds {len(self.layers)} layer(s) and {self.batch} row(s), but this model and input "
                f"need {layers} and {batch}; use the state of the same model and rows (state.select picks rows)"
            )

    def arrays(self) -> dict[str, Array]:
        """Its arrays by the names under which they are saved."""
        named = {"tokens_seen": self.tokens_seen}
        for i, layer in enumerate(self.layers):
            named |= {f"layers.{i}.{field}_state": getattr(layer, field) for field in layer._fields}
        return named

    def get_cache_info(self) -> CacheInfo:
        """Layers, batch, tokens seen by each row, and bytes."""
        arrays = self.arrays()
        size = sum(array.nbytes for array in arrays.values())
        seen = tuple(int(n) for n in self.nn.to_numpy(arrays["tokens_seen"]))
        return CacheInfo(len(self.layers), self.batch, seen, size)

    @classmethod
    def from_arrays(
        cls: type[State],
        arrays: Mapping[str, np.ndarray],
        count: int,
        *,
        like: Array | None = None,
        device: str | None = None,
    ) -> State:
        """The state of ``count`` blocks from NumPy arrays under the names of :meth:`arrays`.

        They go to the device of ``like``, or to ``device``.
        """
        moved = {name: cls.nn.from_numpy(array, like=like, device=device) for name, array in arrays.items()}
        seen, fields = moved.pop("tokens_seen"), [dict[str, Array]() for _ in range(count)]
        for name, array in moved.items():
            _, number, field = name.split(".")
            fields[int(number)][field.removesuffix("_state")] = array
        return cls(tuple(map(of_fields, fields)), seen)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write this state to a file that every backend reads; the file appears complete or not at all.

        Raises:
            ValueError: when the state holds values that are not finite.
            OSError: when the file cannot be written.
        """
        from mambax.checkpoint.state_files import write_state

        arrays = {name: self.nn.to_numpy(array) for name, array in self.arrays().items()}
        write_state(path_of(path, "path"), arrays, len(self.layers))

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, backend: str | None = None, device: str | None = None
    ) -> InferenceParams:
        """Read a state that :meth:`save` wrote, on whichever backend.

        ``model.load_state(path)`` does so too, checks that the state fits the model, and brings it to its dtypes.

        Args:
            path: the file.
            backend: name of a backend; when None, that of this class, or for :class:`mambax.InferenceParams`
                itself the best installed.
            device: name of a device of the backend; its preferred one when None.

        Returns:
            The ``InferenceParams`` of the backend, in the dtypes of the file.

        Raises:
            FileNotFoundError: when there is no such file.
            ValueError: when it is not a state, is damaged, or has a dtype that the backend lacks, and for an
                unknown backend or device.
        """
        from mambax.checkpoint.state_files import read_state
        from mambax.registry import choose_backend, choose_device

        nn = choose_backend(cls.nn.name if backend is None and cls is not InferenceParams else backend)
        device = choose_device(nn, device)
        state_cls = cast("type[InferenceParams]", nn.InferenceParams)
        arrays, count = read_state(path_of(path, "path"))
        return state_cls.from_arrays(arrays, count, device=device)
