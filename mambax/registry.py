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


def choose_backend(name: str | None) -> Backend:
    """The backend of this name, or :func:`default_backend` for None. Raises as :func:`get_backend`."""
    return get_backend(default_backend() if name is None else name)


def choose_device(nn: Backend, device: str | None) -> str:
    """A device of a backend by its name (``"cuda"``, ``"cuda:1"``), its preferred one for None.

    Raises:
        ValueError: for a device that the backend does not have here, with those that it has.
    """
    known = nn.devices()
    if device is None:
        return known[0]
    if not isinstance(device, str) or device.partition(":")[0] not in known:
        names = ", ".join(map(repr, known))
        raise ValueError(f"device is {device!r}; the {nn.name} backend has {names} here")
    return device


def install_command(name: str) -> str:
    """What installs the framework of one of our own backends on this machine."""
    if name == "mlx" and sys.platform != "darwin":
        return "pip install 'mlx[cpu]'"
    return f"pip install {name}"


def default_backend() -> str:
    """The best backend installed here: MLX on Apple silicon, elsewhere the first of torch, MLX and NumPy."""
    apple = sys.platform == "darwin" and platform.machine() == "arm64"
    if apple and is_installed("mlx"):
        return "mlx"
    return next(name for name in ("torch", "mlx", "numpy") if is_installed(name))
