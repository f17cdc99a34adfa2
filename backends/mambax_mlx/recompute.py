"""Gradients by computing again what the forward pass did not keep, in MLX.

``mx.checkpoint`` frees the intermediates of the forward pass but says nothing of the order in which they are
computed again, and a lazy graph without an order computes several parts at once and keeps them all. Here each part
waits for the one before it (``mx.depends``), in both directions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn
from mlx.utils import tree_flatten, tree_unflatten

from mambax_mlx import ops
from mambax_mlx.host import computable, differentiable_once

Arrays = list[mx.array]


def recomputed(module: mlx.nn.Module) -> Callable[..., Any]:
    """The module as a function that keeps its inputs alone for the backward pass.

    Its arguments and results are arrays, tuples of them, and None. Gradients reach the arrays that it is given and
    the trainable parameters.
    """

    def call(*args: Any) -> Any:
        names, weights = _trainable(module)
        outputs: list[Any] = []

        def run(*flat: mx.array) -> Arrays:
            with _holding(module, names, flat[: len(names)]):
                outputs[:] = [module(*_filled(args, iter(flat[len(names) :])))]
            return _leaves(outputs[0])

        def backward(primals: Any, cotangents: Any, _: Any) -> Arrays:
            primals, cotangents = _after(_list(primals), _list(cotangents)), _list(cotangents)
            gradients = _gradients(run, primals, cotangents)
            return _with_zeros(primals, gradients)

        unit: Any = mx.custom_function(lambda *flat: run(*_after(list(flat), list(flat))))
        unit.vjp(backward)
        found = _list(unit(*weights, *_leaves(args)))
        return _filled(outputs[0], iter(found))

    return call


def summed_over_chunks(
    module: mlx.nn.Module, function: Callable[..., tuple[mx.array, ...]], arrays: Sequence[mx.array], rows: int
) -> tuple[mx.array, ...]:
    """The sum of ``function(*chunk)`` over chunks of rows, one chunk in memory at a time, in both directions.

    Raises:
        ValueError: for arrays without rows.
        NotImplementedError: for second derivatives and those in forward mode.
    """
    names, weights = _trainable(module)
    count = arrays[0].shape[0]
    if count == 0:
        raise ValueError("summed_over_chunks: the arrays have no rows; expected at least one")
    cuts = list(range(rows, count, rows))

    def part(*flat: mx.array) -> Arrays:
        with _holding(module, names, flat[: len(names)]):
            return list(function(*flat[len(names) :]))

    def chunks(arrays: Arrays) -> Iterator[Arrays]:
        for chunk in zip(*(mx.split(array, cuts) for array in arrays), strict=True):
            yield list(chunk)

    def forward(*flat: mx.array) -> Arrays:
        totals: Arrays = []
        for chunk in chunks(list(flat[len(names) :])):
            parts = part(*flat[: len(names)], *_after(chunk, totals))
            totals = _settled([a + b for a, b in zip(totals, parts, strict=True)] if totals else parts)
        return totals

    def backward(*primals_and_cotangents: mx.array) -> Arrays:
        both = list(primals_and_cotangents)
        primals, cotangents = both[: len(weights) + len(arrays)], both[len(weights) + len(arrays) :]
        primals = _after(primals, cotangents)
        held, given = primals[: len(names)], primals[len(names) :]
        of_weights: Arrays = []
        of_chunks: list[Arrays] = []
        for chunk in chunks(given):
            chunk = _after(chunk, of_weights + (of_chunks[-1] if of_chunks else []))
            found = _gradients(part, [*held, *chunk], cotangents)
            found = _with_zeros([*held, *chunk], found)
            new, of_chunk = found[: len(names)], found[len(names) :]
            of_weights = [a + b for a, b in zip(of_weights, new, strict=True)] if of_weights else new
            settled = _settled(of_weights + of_chunk)
            of_weights = settled[: len(names)]
            of_chunks.append(settled[len(names) :])
        return of_weights + [mx.concatenate(list(parts), 0) for parts in zip(*of_chunks, strict=True)]

    unit = differentiable_once(
        forward, backward, "compute the loss from the logits", what="a sum over chunks, as a loss without logits is"
    )
    return tuple(_list(unit(*weights, *arrays)))


def _trainable(module: mlx.nn.Module) -> tuple[list[str], Arrays]:
    flat: Any = tree_flatten(module.trainable_parameters())
    return [name for name, _ in flat], [array for _, array in flat]


@contextmanager
def _holding(module: mlx.nn.Module, names: Sequence[str], arrays: Sequence[mx.array]) -> Iterator[None]:
    """Let the module have these trainable parameters for a while."""
    _, before = _trainable(module)
    if names:
        module.update(tree_unflatten(list(zip(names, arrays, strict=True))))
    try:
        yield
    finally:
        if names:
            module.update(tree_unflatten(list(zip(names, before, strict=True))))


def _gradients(function: Callable[..., Arrays], primals: Arrays, cotangents: Arrays) -> list[mx.array | None]:
    """The gradient of each primal that is of floats; of the others None. All are there at once or none is."""
    places = [i for i, x in enumerate(primals) if _is_float(x)]
    wanted = [i for i, x in enumerate(cotangents) if _is_float(x)]  # whose dtypes are those of the results

    def of_floats(*floats: mx.array) -> Arrays:
        full = list(primals)
        for place, x in zip(places, floats, strict=True):
            full[place] = x
        outputs = function(*full)
        return [outputs[i] for i in wanted]

    _, found = mx.vjp(of_floats, [primals[i] for i in places], [cotangents[i] for i in wanted])
    gradients: list[mx.array | None] = [None] * len(primals)
    for place, gradient in zip(places, _after(list(found), list(found)), strict=True):
        gradients[place] = gradient
    return gradients


def _with_zeros(primals: Arrays, gradients: Sequence[mx.array | None]) -> Arrays:
    return [mx.zeros_like(x) if g is None else g for x, g in zip(primals, gradients, strict=True)]


def _after(arrays: Arrays, others: Arrays) -> Arrays:
    """The arrays, not computed with before the others are there."""
    return list(mx.depends(arrays, others)) if arrays and others else arrays


def _settled(arrays: Arrays) -> Arrays:
    """On the CPU, the same values computed now, without what they were computed from.

    There, MLX takes memory for operations long before it runs them, in whatever order. A GPU's command buffers are
    bounded. Inside ``mx.compile``, which decides for itself, nothing may be computed.
    """
    return [ops.from_numpy(ops.to_numpy(x)) for x in arrays] if computable(*arrays) else arrays


def _is_float(x: mx.array) -> bool:
    return mx.issubdtype(x.dtype, mx.floating)


def _list(tree: Any) -> Arrays:
    """What ``mx.custom_function`` hands over: an array by itself where there is but one."""
    return [tree] if isinstance(tree, mx.array) else list(tree)


def _leaves(tree: Any) -> Arrays:
    if isinstance(tree, mx.array):
        return [tree]
    return [leaf for part in tree for leaf in _leaves(part)] if isinstance(tree, (list, tuple)) else []


def _filled(tree: Any, leaves: Iterator[mx.array]) -> Any:
    """The tree with other arrays in the places of its own; named tuples stay named."""
    if isinstance(tree, mx.array):
        return next(leaves)
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(_filled(part, leaves) for part in tree))
    return type(tree)(_filled(part, leaves) for part in tree) if isinstance(tree, (list, tuple)) else tree
