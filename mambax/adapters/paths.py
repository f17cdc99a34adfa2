"""Modules by dotted path, the same way on every backend."""

from __future__ import annotations

from typing import Any


def at(model: Any, path: str) -> Any:
    """The module at a path such as ``backbone.layers.0.mixer``; the model itself for an empty one."""
    for part in path.split(".") if path else ():
        model = model[int(part)] if part.isdigit() else getattr(model, part)
    return model


def put(model: Any, path: str, module: Any) -> None:
    """Set another module at a path that does not end in a number."""
    owner, _, name = path.rpartition(".")
    setattr(at(model, owner), name, module)


def owners(model: Any) -> list[str]:
    """The paths of all modules that hold parameters themselves."""
    return sorted({name.rpartition(".")[0] for name in model.nn.parameters(model)})
