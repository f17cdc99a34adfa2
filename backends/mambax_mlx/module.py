"""Structure: MLX's own modules, built from NumPy values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn
from mlx.utils import tree_flatten

from mambax.init import Initial, Placeholder
from mambax_mlx import ops


class Module(mlx.nn.Module):
    """An MLX module that is called through ``forward``, as the definitions are written."""

    forward: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)


def ModuleList(modules: Sequence[Any]) -> list[Any]:
    """A list: MLX looks for modules in lists."""
    return list(modules)


def Parameter(value: Initial) -> mx.array:
    """An array from initial values. A placeholder becomes NaN everywhere, in no memory, until it is set."""
    if isinstance(value, Placeholder):
        return mx.broadcast_to(mx.array(float("nan")), value.shape)
    return ops.from_numpy(value)


def parameters(module: mlx.nn.Module) -> dict[str, mx.array]:
    """Every parameter by dotted path, frozen ones included."""
    return dict(tree_flatten(module.parameters()))  # pyright: ignore[reportCallIssue, reportArgumentType]


def set_parameters(module: mlx.nn.Module, values: Mapping[str, mx.array]) -> None:
    """Replace parameters by dotted path, without copying.

    Raises:
        KeyError: for a path that leads nowhere.
    """
    unknown = values.keys() - parameters(module).keys()
    if unknown:
        raise KeyError(min(unknown))
    module.load_weights(list(values.items()), strict=False)


def quantize(model: Any, kind: str, group_size: int = 32) -> Any:
    """MLX quantises in a format of its own.

    Raises:
        ValueError: saying how.
    """
    raise ValueError(
        f"quantize={kind!r} runs on the numpy backend and on torch on the CPU, not on mlx; load the model as it is "
        f"and use mlx.nn.quantize(model, group_size={group_size}, bits={kind.removeprefix('int')})"
    )
