"""MLX arrays on the CPU: whether their values can be had now, and those values as NumPy sees them.

MLX computes an array when it is asked for it. What runs on the CPU outside of MLX, the kernels of
:mod:`mambax_cpu` and NumPy, asks at once. MLX allows that everywhere but inside ``mx.compile`` and ``mx.vmap``, and
there its own operations have to do. Gradients go through: such a function is an ``mx.custom_function``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import ml_dtypes
import mlx.core as mx
import numpy as np

_without_gradients: ContextVar[bool] = ContextVar("without_gradients", default=False)


def default_device() -> str:
    """``"gpu"`` or ``"cpu"``: where MLX computes."""
    return "gpu" if mx.default_device().type == mx.DeviceType.gpu else "cpu"


@contextmanager
def without_gradients() -> Iterator[None]:
    """A promise that no gradient of what is computed in here will be asked for."""
    token = _without_gradients.set(True)
    try:
        yield
    finally:
        _without_gradients.reset(token)


def no_gradients() -> bool:
    """Whether this runs inside :func:`without_gradients`."""
    return _without_gradients.get()


def computable(*arrays: mx.array | None) -> bool:
    """Whether these arrays are on the CPU and their values can be had now. Computes them if so."""
    if default_device() != "cpu":
        return False
    try:
        mx.eval([x for x in arrays if x is not None])
    except ValueError:  # MLX's answer inside compile and vmap; it has no other way of telling
        return False
    return True


def values(x: mx.array) -> np.ndarray:
    """The values of an array, in the same memory."""
    if x.dtype == mx.bfloat16:
        return np.array(x.view(mx.uint16), copy=False).view(ml_dtypes.bfloat16)
    return np.array(x, copy=False)


def differentiable_once(
    run: Callable[..., Any],
    gradient: Callable[..., Sequence[mx.array]],
    otherwise: str,
    *,
    what: str = "the fused CPU kernels",
) -> Callable[..., Any]:
    """A function of arrays whose values are had on the way, and so are constants to MLX, with first gradients.

    Args:
        run: arrays to an array, or to several.
        gradient: the same arrays, and for each result its cotangent, to the gradient of each array.
        otherwise: what to do for derivatives of other kinds, which raise a NotImplementedError that says so.
        what: the function, for that message.
    """

    def refuse(*_: Any) -> Any:
        raise NotImplementedError(
            f"{what}: first gradients in reverse mode are all there is; for others {otherwise}"
        )

    forward: Any = mx.custom_function(run)
    backward: Any = mx.custom_function(gradient)

    @forward.vjp
    def _(arrays: Any, cotangents: Any, results: Any) -> Any:
        return backward(*arrays, *(cotangents if isinstance(cotangents, (list, tuple)) else [cotangents]))

    for function in (forward.jvp, backward.jvp, backward.vjp):
        function(refuse)
    return forward


def exp(x: mx.array) -> mx.array:
    """e to the x; on the CPU by NumPy, whose vector code takes a twentieth of the time of MLX's for Linux."""
    return _exp(x) if x.dtype == mx.float32 and computable(x) else mx.exp(x)


def _by_numpy(x: mx.array) -> mx.array:
    with np.errstate(over="ignore"):  # infinity, as MLX gives
        return mx.array(np.exp(values(x)))


_exp: Any = mx.custom_function(_by_numpy)


@_exp.vjp
def _exp_gradient(x: mx.array, cotangent: mx.array, y: mx.array) -> mx.array:
    return cotangent * exp(x)


@_exp.jvp
def _exp_tangent(x: Any, tangent: Any) -> mx.array:
    (x,), (tangent,) = (value if isinstance(value, (list, tuple)) else (value,) for value in (x, tangent))
    return tangent * exp(x)
