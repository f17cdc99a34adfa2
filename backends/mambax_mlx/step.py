"""One token through a stack of blocks: on a GPU one compiled graph, on the CPU block by block.

Dimensions: B batch, M d_model.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

from mambax_mlx.host import default_device

Arrays = list[mx.array]
Place = tuple[Any, Any]
"""A module, which in MLX is a dictionary, or a list in one, and the key of one of its arrays."""


def decode_step(
    layers: Sequence[Any], hidden: mx.array, states: Sequence[Any]
) -> tuple[mx.array, tuple[Any, ...]] | None:
    """The blocks as one function that MLX has compiled; see :meth:`mambax.backend.Backend.decode_step`.

    None on the CPU, where the kernels of :mod:`mambax_cpu` are faster than what MLX compiles and cannot be in it,
    and for more than one token: a graph of every length would have to be compiled.
    """
    if default_device() != "gpu" or hidden.shape[1] != 1:
        return None
    return compiled_step(layers, hidden, states)


def compiled_step(
    layers: Sequence[Any], hidden: mx.array, states: Sequence[Any]
) -> tuple[mx.array, tuple[Any, ...]]:
    """hidden (B, 1, M) through the blocks, compiled at the first call, and again after a layer was replaced."""
    modules, places = _walk(layers)
    step = vars(layers[0]).get("_compiled_step")
    if step is None or not step.is_of(modules):
        step = _Step(list(layers), modules)
        object.__setattr__(layers[0], "_compiled_step", step)
    weights = [module[name] for module, name in places]
    hidden, *flat = step.compiled(weights, hidden, [array for state in states for array in state])
    return hidden, _as_states(flat, states)


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

    def is_of(self, modules: list[Any]) -> bool:
        """Whether these are the modules that were compiled."""
        return len(modules) == len(self.modules) and all(a is b for a, b in zip(modules, self.modules, strict=True))

    def run(self, weights: Arrays, hidden: mx.array, flat: Arrays) -> Arrays:
        """What is compiled: block by block, over weights that are arguments."""
        like = [layer.mixer.init_state(hidden.shape[0]) for layer in self.layers]
        after: Arrays = []
        with _holding(_walk(self.layers)[1], weights):
            for layer, state in zip(self.layers, _as_states(flat, like), strict=True):
                hidden, state = layer(hidden, state)
                after += state
        return [hidden, *after]


def _as_states(flat: Arrays, like: Sequence[Any]) -> tuple[Any, ...]:
    """The arrays as states of these types."""
    rest = iter(flat)
    return tuple(type(state)(*(next(rest) for _ in state)) for state in like)


def _walk(layers: Sequence[Any]) -> tuple[list[Any], list[Place]]:
    """Every module, and the place of every array in them."""
    modules: list[Any] = []
    places: list[Place] = []
    waiting: list[Any] = [*reversed(layers)]
    while waiting:
        module = waiting.pop()
        if isinstance(module, dict):
            modules.append(module)
        for key, value in module.items() if isinstance(module, dict) else enumerate(module):
            if isinstance(value, mx.array):
                places.append((module, key))
            elif isinstance(value, (dict, list)):
                waiting.append(value)
    return modules, places


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
