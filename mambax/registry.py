"""Finding backends: entry points of the group ``mambax.backends``, imported on demand."""

from __future__ import annotations

import importlib
import importlib.util
import platform
import sys
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import cast

from mambax.backend import Backend

GROUP = "mambax.backends"
FRAMEWORKS = {"torch": "torch", "mlx": "mlx.core", "numpy": "numpy"}
"""The module that each of our own backends needs. A backend that is not here says so itself when imported."""


@cache
def _entry_points() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


def backend_names() -> tuple[str, ...]:
    """Names of all backends that are registered, whether or not their framework is installed."""
    return tuple(sorted(_entry_points()))


def is_installed(name: str) -> bool:
    """Whether the framework of a registered backend can be imported. Imports nothing but its parent package."""
    framework = FRAMEWORKS.get(name)
    if framework is None:
        return name in _entry_points()
    try:
        return importlib.util.find_spec(framework) is not None
    except ModuleNotFoundError:
        return False


def get_backend(name: str) -> Backend:
    """The backend of this name, imported now.

    Raises:
        ValueError: for a name that no installed distribution registers.
        ImportError: when its framework is missing, with the command that installs it.
    """
    point = _entry_points().get(name)
    if point is None:
        known = ", ".join(backend_names()) or "none: install mambax with pip, so that its entry points exist"
        raise ValueError(f"unknown backend {name!r}; expected one of: {known}")
    if not is_installed(name):
        raise ImportError(f"backend {name!r} needs {FRAMEWORKS[name]}: {install_command(name)}")
    return cast(Backend, point.load())


def install_command(name: str) -> str:
    """What installs the framework of one of our own backends on this machine."""
    if name == "mlx" and sys.platform != "darwin":
        return "pip install 'mlx[cpu]'"
    return f"pip install {name}"


def default_backend() -> str:
    """The best backend installed for this machine.

    MLX on Apple silicon, torch with CUDA, torch, MLX, NumPy, in this order.
    """
    apple = sys.platform == "darwin" and platform.machine() == "arm64"
    if apple and is_installed("mlx"):
        return "mlx"
    return next(name for name in ("torch", "mlx", "numpy") if is_installed(name))
