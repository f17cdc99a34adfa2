"""One token through a stack of blocks: on a GPU one compiled graph, on the CPU NumPy's blocks or block by block.

Dimensions: B batch, M d_model.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

from mambax.layer_states import LayerState
from mambax_mlx.cpu_step import cpu_step
from mambax_mlx.host import default_device
from mambax_mlx.walking import Place, same, walk

Arrays = list[mx.array]


def decode_step(
    layers: Sequence[Any], hidden: mx.array, states: Sequence[Any]
) -> tuple[mx.array, tuple[Any, ...]] | None:
    """The blocks as one function; see :meth:`mambax.backend.Backend.decode_step`.

    On a GPU what MLX compiles, on the CPU :func:`mambax_mlx.cpu_step.cpu_step`. None for more than one token, and
    where a block keeps anything but a state of fixed size: a graph of every length would have to be compiled.
    """
    if hidden.shape[1] != 1 or not all(type(state) is LayerState for state in states):
        return None
    return (compiled_step if default_device() == "gpu" else cpu_step)(layers, hidden, states)


def compiled_step(
    layers: Sequence[Any], hidden: mx.array, states: Sequence[Any]
) -> tuple[mx.array, tuple[Any, ...]]:
    """hidden (B, 1, M) through the blocks, compiled at the first call, and again after a layer was replaced."""
    modules, places = walk(layers)
    step = vars(layers[0]).get("_compiled_step")
    if step is None or not same(step.modules, modules):
        step = _Step(list(layers), modules)
        object.__setattr__(layers[0], "_compiled_step", step)
    weights = [module[name] for module, name in places]
    hidden, *flat = step.compiled(weights, hidden, [array for state in states for array in state])
    return hidden, _as_states(flat)


class _Step:
    """A stack of blocks and the function that was compiled of it. It is not copied or pickled with the model."""

    def __init__(self, layers: list[Any], modules: list[Any]) -> None:
        self.layers, self.modules = layers, modules
        held = weakref.ref(self)  # MLX keeps the function for as long as it lives, and must not keep the model

        def run(weights: Arrays, hidden: mx.array, flat: Arrays) -> Arrays:
            step = held()
            assert step is not None
            return step.run(weights, hidden, flat)

        self.compiled = mx.compile(run)

    def __reduce__(self) -> Any:
        return type(None), ()

    def run(self, weights: Arrays, hidden: mx.array, flat: Arrays) -> Arrays:
        """What is compiled: block by block, over weights that are arguments."""
        after: Arrays = []
        with _holding(walk(self.layers)[1], weights):
            for layer, state in zip(self.layers, _as_states(flat), strict=True):
                hidden, state = layer(hidden, state)
                after += state
        return [hidden, *after]


def _as_states(flat: Arrays) -> tuple[LayerState, ...]:
    """The arrays, two for each block, as states."""
    return tuple(map(LayerState, flat[0::2], flat[1::2]))


@contextmanager
def _holding(places: list[Place], arrays: Arrays) -> Iterator[None]:
    """Let the modules have these arrays for a while."""
    before = [module[name] for module, name in places]
    try:
        for (module, name), array in zip(places, arrays, strict=True):
            module[name] = array
        yield
    finally:
        for (module, name), array in zip(places, before, strict=True):
            module[name] = array
