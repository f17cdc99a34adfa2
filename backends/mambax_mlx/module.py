"""Structure: MLX's own modules, built from NumPy values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn
from mlx.utils import tree_flatten

from mambax.init import Initial, Placeholder
from mambax_mlx import ops
from mambax_mlx.repacking import repacked


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

    Matrices as mambax's other backends quantise them (see :mod:`mambax.quantization`) are repacked for MLX.

    Raises:
        KeyError: for a path that leads nowhere.
    """
    held = parameters(module)
    values = repacked(values, held)
    unknown = values.keys() - held.keys()
    if unknown:
        raise KeyError(min(unknown))
    _keep_resident()
    module.load_weights(list(values.items()), strict=False)


@cache
def _keep_resident() -> None:
    """Let macOS keep as much of MLX's memory wired as it recommends, or it pages weights out between tokens.

    Once for the process, as the server and the trainer of mlx-lm do it.
    """
    if mx.metal.is_available():
        mx.set_wired_limit(int(mx.device_info()["max_recommended_working_set_size"]))
