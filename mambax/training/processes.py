"""The processes that train a model together, before there is a model."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any, NamedTuple

from mambax.registry import get_backend


def _stay() -> None:
    """Nobody to wait for."""


class Processes(NamedTuple):
    """This process among those that a launcher started together.

    Attributes:
        process: its number, from 0. Process 0 writes what all of them share, and says what happens.
        processes: how many there are.
        wait: returns when every one has called it.
    """

    process: int = 0
    processes: int = 1
    wait: Callable[[], object] = _stay


def started_by(backend: str, processes: int) -> str:
    """The beginning of a command of mambax, as a person starts it in so many processes.

    Without ``--``, torchrun takes ``--run`` for an option of its own, and mlx.launch ``--backend``.
    """
    if processes == 1:
        return "mambax"
    if backend == "mlx":
        return f"mlx.launch -n {processes} -- command.py"
    return f"torchrun --nproc-per-node={processes} -m -- mambax.cli"


class ProcessFailed(RuntimeError):
    """Another process failed, and this one stops with it; the message of the other says what was wrong."""


def distributed_module(nn: Any) -> Any:
    """The module of a backend that knows about processes; None for one that trains in one alone."""
    name = f"{nn.__name__}.distributed"
    return None if importlib.util.find_spec(name) is None else importlib.import_module(name)


def join(backend: str, device: str) -> Processes:
    """Meet the other processes, as the launcher of a backend's framework has started them.

    Args:
        backend: name of the backend that trains.
        device: of this process.
    """
    module = distributed_module(get_backend(backend))
    return Processes() if module is None else module.join(device)


def own_device(backend: str, device: str) -> str:
    """The device of this process, of those that a recipe names for all of them."""
    module = distributed_module(get_backend(backend))
    return device if module is None else module.own_device(device)


def check_launcher(backend: str) -> None:
    """Refuse processes that would not find each other, and each train alone into the same folder.

    Raises:
        ValueError: for processes that the launcher of another framework has started.
    """
    by_torchrun = int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ
    by_mlx = "MLX_RANK" in os.environ
    if backend == "mlx" and by_torchrun and not by_mlx:
        raise ValueError(
            "the backend is 'mlx', but these processes were started by torchrun; start them with mlx.launch, or "
            "train with backend='torch'"
        )
    if backend == "torch" and by_mlx and not by_torchrun:
        raise ValueError(
            "the backend is 'torch', but these processes were started by mlx.launch; start them with torchrun, or "
            "train with backend='mlx'"
        )
